"""The C++ client, built and run: against Python's session and the golden trace."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nsm
from nsm.baselines import TransformerLM
from nsm.bundle import Bundle
from nsm.export.api import export_model
from tests.conftest import CHUNK, make_model, make_sequences

ROOT = Path(__file__).resolve().parents[2]
TOOLS = {"cmake": "cmake", "c++": "g++"}
MISSING = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs a C++ compiler: apt-get install {' '.join(MISSING)}")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, built as the documentation says."""
    import nlohmann_json
    import openvino

    build = tmp_path_factory.mktemp("cpp")
    options = [
        "-DCMAKE_BUILD_TYPE=Debug",
        f"-DOpenVINO_DIR={Path(str(openvino.__file__)).parent / 'cmake'}",
        f"-DNLOHMANN_JSON={Path(nlohmann_json.__path__[0]) / 'include'}",
    ]
    subprocess.run(["cmake", "-S", ROOT / "examples" / "cpp", "-B", build, *options], check=True, capture_output=True)
    result = subprocess.run(["cmake", "--build", build, "--parallel", "2"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return build / "nsm_client"


def run(client: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [str(client), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One lane, two chunks a call."""
    output = tmp_path_factory.mktemp("single") / "model.nsm"
    samples = make_sequences(4, 300)
    export_model(make_model(), "openvino", output, samples, chunk=2 * CHUNK, golden_steps=10, num_samples=2)
    return output


def test_the_golden_trace_agrees_on_one_lane_and_on_two(client: Path, single: Path, exported: Path) -> None:
    for bundle, streams in ((single, "2 streams of 10 steps"), (exported, "8 streams of 64 steps")):
        result = run(client, bundle, "--check", "--threads", 1)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(f"passed: {streams}")
        assert "0 masks or counters differ" in result.stdout


@pytest.mark.parametrize("length", [1, 7, 8, 16, 37])
def test_a_file_is_streamed_as_python_does(
    length: int, client: Path, single: Path, exported: Path, tmp_path: Path
) -> None:
    tokens = make_sequences(1, length, seed=length)[0]
    np.save(tmp_path / "tokens.npy", tokens)
    (tmp_path / "tokens.raw").write_bytes(tokens.astype(np.uint8).tobytes())
    for bundle, file in ((single, "tokens.npy"), (single, "tokens.raw"), (exported, "tokens.npy")):
        result = run(client, bundle, tmp_path / file, tmp_path / "out.npy")
        assert result.returncode == 0, result.stderr
        with nsm.open(bundle, "openvino") as session:
            lanes = np.zeros((session.batch, length), np.int64)
            lanes[0] = tokens
            counts = [length] + [0] * (session.batch - 1)
            wanted = session.feed(lanes, counts)["outputs"][0]
        given = np.load(tmp_path / "out.npy")
        assert given.shape == wanted.shape
        np.testing.assert_allclose(given, wanted, rtol=1e-5, atol=1e-6)


def test_a_cache_that_is_written_in_place_works_too(client: Path, tmp_path: Path) -> None:
    model = TransformerLM(20, 16, 1, 2, context=12, chunk_size=4).eval()
    export_model(model, "openvino", tmp_path / "m.nsm", make_sequences(2, 60), num_samples=1, golden_steps=15)
    result = run(client, tmp_path / "m.nsm", "--check")
    assert result.returncode == 0, result.stdout + result.stderr
    tokens = make_sequences(1, 31, seed=9)[0]
    np.save(tmp_path / "tokens.npy", tokens)
    assert run(client, tmp_path / "m.nsm", tmp_path / "tokens.npy", tmp_path / "out.npy").returncode == 0
    with nsm.open(tmp_path / "m.nsm") as session:
        wanted = session.run(tokens)["outputs"]
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), wanted, rtol=1e-4, atol=1e-5)


def test_a_step_is_timed(client: Path, single: Path) -> None:
    assert "us a step (median of 20)" in run(client, single, "--bench", 20).stdout


def test_other_weights_do_not_pass(client: Path, single: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(single, tmp_path / "copy.nsm"))
    weights = copy / "openvino" / "weights.bin"
    numbers = np.frombuffer(weights.read_bytes()[: weights.stat().st_size // 4 * 4], np.float32).copy()
    large = np.abs(numbers) > 1e-3  # what lies between, shapes for instance, is no float
    numbers[large & (np.abs(numbers) < 10)] *= np.float32(1.01)
    weights.write_bytes(numbers.tobytes() + weights.read_bytes()[numbers.nbytes :])
    _record_again(copy, "openvino/weights.bin")
    result = run(client, copy, "--check")
    assert result.returncode == 5
    assert result.stdout.startswith("FAILED")
    assert "not the model that was recorded" in result.stderr


def _record_again(bundle: Path, name: str, path: str | None = None) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    data = (bundle / name).read_bytes()
    for record in [*manifest["files"], *(r for a in manifest["artifacts"] for r in a["files"])]:
        if record["path"] == name:
            record.update(path=path or name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("kind", ["hash", "size", "missing", "json", "version", "key", "climbs", "absolute", "link"])
def test_a_damaged_or_hostile_bundle_is_refused(kind: str, client: Path, single: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(single, tmp_path / "copy.nsm"))
    weights = copy / "openvino" / "weights.bin"
    manifest = json.loads((copy / "manifest.json").read_text())
    message = "manifest.json is damaged"
    if kind in ("hash", "size", "missing"):
        data = weights.read_bytes()
        weights.write_bytes(data[:-1] + b"x" if kind == "hash" else b"")
        if kind == "missing":
            weights.unlink()
        message = "does not have the recorded SHA-256" if kind == "hash" else "is missing or has another size"
    elif kind == "json":
        (copy / "manifest.json").write_text("{")
    elif kind == "version":
        (copy / "manifest.json").write_text(json.dumps({**manifest, "format_version": 2}))
        message = "format version 2; this client reads version 1"
    elif kind == "key":
        del manifest["spec"]["states"]
        (copy / "manifest.json").write_text(json.dumps(manifest))
    else:
        shutil.copy(weights, tmp_path / "outside.bin")
        path = {"climbs": "../outside.bin", "absolute": str(tmp_path / "outside.bin"), "link": "openvino/weights.bin"}
        if kind == "link":
            weights.unlink()
            os.symlink(tmp_path / "outside.bin", weights)
        else:
            _record_again(copy, "openvino/weights.bin", path[kind])
        message = "which is outside the bundle"
    result = run(client, copy, "--check")
    assert result.returncode == 6, result.stderr
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Usage: nsm_client BUNDLE"),
        (["{bundle}"], "Usage"),
        (["{bundle}", "--chek"], "There is no option --chek"),
        (["{bundle}", "--check", "--threads", "none"], "takes a whole number above 0; given none"),
        (["absent.nsm", "--check"], "There is no bundle absent.nsm"),
        (["{bundle}", "absent.npy", "out.npy"], "absent.npy cannot be opened"),
        (["{bundle}", "{folder}/large.npy", "out.npy"], "must lie in 0 .. 19; given 99"),
        (["{bundle}", "{folder}/vectors.npy", "out.npy"], "vectors.npy holds float32; expected are ids"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: list[str], message: str, client: Path, single: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "large.npy", np.array([1, 99]))
    np.save(tmp_path / "vectors.npy", np.zeros((4, 2), np.float32))
    filled = [part.format(bundle=single, folder=tmp_path) for part in arguments]
    result = run(client, *filled)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr


def test_a_bundle_without_openvino_says_how_to_get_it(client: Path, tmp_path: Path) -> None:
    export_model(make_model(), "onnx", tmp_path / "m.nsm", make_sequences(2, 80), num_samples=1, golden_steps=2)
    result = run(client, tmp_path / "m.nsm", "--check")
    assert result.returncode == 2
    assert "nsm build BUNDLE --target openvino" in result.stderr
    assert Bundle(tmp_path / "m.nsm").manifest.artifacts[0].target == "onnx"
