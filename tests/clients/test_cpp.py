"""The C++ client, built and run: against Python's session and the golden trace."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nsm
from nsm.baselines import TransformerLM
from nsm.bundle import Bundle
from nsm.export.api import export_model
from nsm.runtimes.targets import find_target
from tests.export.attentions import LAYERS, WIDTH, WINDOW, Attentions, frames
from tests.small_models import CHUNK, make_model, make_sequences

ROOT = Path(__file__).resolve().parents[2]
OLDER = ("qemu-x86_64-static", "-cpu", "Haswell")
"""What emulates a processor without VNNI."""
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
        "-DCMAKE_BUILD_TYPE=Debug",  # compiles in half the time
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
    export_model(make_model(), "openvino", output, samples, tokens_per_call=2 * CHUNK, golden_steps=10, num_samples=2)
    return output


def agrees(client: Path, bundle: Path, streams: str) -> None:
    """The client's own check passes, of every state and the output, in whole calls and then token by token."""
    result = run(client, bundle, "--check", "--threads", 1)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1].startswith(f"passed: {streams}")
    names = {*Bundle(bundle).manifest.spec.state_names, "outputs"}
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("ok ")]
    assert sorted(line[1] for line in lines) == sorted([*names, *names])
    assert all(int(line[2]) > 0 for line in lines)


def test_it_is_built_and_the_golden_trace_agrees(client: Path, exported: Path) -> None:
    agrees(client, exported, "8 streams of 64 steps")


@pytest.mark.slow
def test_the_golden_trace_agrees_on_one_lane(client: Path, single: Path) -> None:
    agrees(client, single, "2 streams of 10 steps")


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [1, 2])
def test_a_file_is_streamed_as_python_does(
    lanes: int, client: Path, single: Path, exported: Path, tmp_path: Path
) -> None:
    bundle = {1: single, 2: exported}[lanes]
    with nsm.open(bundle, "openvino") as session:
        assert session.batch == lanes
        for length in (1, 7, 8, 16, 17, 37):  # 1 and 17 end with `decode`
            tokens = make_sequences(lanes, length, seed=length)
            np.save(tmp_path / "tokens.npy", tokens[0])
            (tmp_path / "tokens.raw").write_bytes(tokens[0].astype(np.uint8).tobytes())
            session.reset()
            wanted = session.feed(tokens)["outputs"][0]
            for file in ("tokens.npy", "tokens.raw"):
                result = run(client, bundle, tmp_path / file, tmp_path / "out.npy")
                assert result.returncode == 0, result.stderr
                given = np.load(tmp_path / "out.npy")
                (tmp_path / "out.npy").unlink()
                assert given.shape == wanted.shape
                np.testing.assert_allclose(given, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
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


@pytest.mark.slow
def test_frames_of_a_foreign_model_are_streamed_beside_an_idle_lane(client: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nsm.as_step(torch.nn.GRU(3, 8, num_layers=2))
    frames = np.random.default_rng(0).standard_normal((2, 80, 3)).astype(np.float32)
    export_model(
        model, "openvino", tmp_path / "m.nsm", frames, batch=2, tokens_per_call=4, num_samples=2, golden_steps=8
    )
    checked = run(client, tmp_path / "m.nsm", "--check")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    np.save(tmp_path / "frames.npy", np.asfortranarray(frames[0, :11]))
    assert run(client, tmp_path / "m.nsm", tmp_path / "frames.npy", tmp_path / "out.npy").returncode == 0
    with nsm.open(tmp_path / "m.nsm") as session:
        wanted = session.feed(frames[:, :11])
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), wanted["outputs"][0], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("child_process")
def test_a_graph_that_crashes_the_compiler_is_opened_with_the_recorded_options(client: Path, tmp_path: Path) -> None:
    samples = frames(2, 12)
    step = nsm.as_step(Attentions().eval(), [torch.zeros(1, WINDOW, WIDTH)] * LAYERS, token_shape=samples.shape[2:])
    bundle = tmp_path / "m.nsm"
    export_model(step, "openvino", bundle, samples.numpy(), golden_steps=6)
    result = run(client, bundle, "--check")
    assert result.returncode == 0, result.stdout + result.stderr
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["artifacts"][0]["options"] = {"CACHE_DIR": str(tmp_path)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    refused = run(client, bundle, "--check")
    assert refused.returncode == 6
    assert "compile options other than SNIPPETS_MODE=DISABLE" in refused.stderr


@pytest.mark.slow
def test_a_commit_that_is_not_carried_does_not_pass(client: Path, single: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(single, tmp_path / "copy.nsm"))
    manifest = json.loads((copy / "manifest.json").read_text())
    (commit,) = (entry for entry in manifest["spec"]["entries"] if entry["name"] == "commit")
    commit["writes"].remove("0.bank")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    result = run(client, copy, "--check")
    assert result.returncode == 5, result.stderr
    whole, split = result.stdout.split("split ")
    assert "FAILED" not in whole
    assert "FAILED   0.bank" in split


@pytest.mark.slow
def test_a_step_is_timed(client: Path, single: Path) -> None:
    assert "us a step (median of 20, threads: 1)" in run(client, single, "--bench", 20).stdout
    assert "us a step (median of 20, threads: 2)" in run(client, single, "--bench", 20, "--threads", 2).stdout


@pytest.mark.slow
@pytest.mark.parametrize("place", ["capacity", "limit"])
def test_a_stream_ends_with_the_capacity_or_the_limit(place: str, client: Path, single: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(single, tmp_path / "copy.nsm"))
    manifest = json.loads((copy / "manifest.json").read_text())
    (artifact,) = manifest["artifacts"]
    {"capacity": manifest["spec"], "limit": artifact}[place][place] = 37
    {"capacity": artifact, "limit": manifest["spec"]}[place][{"capacity": "limit", "limit": "capacity"}[place]] = 50
    (copy / "manifest.json").write_text(json.dumps(manifest))
    tokens = make_sequences(1, 38)[0]
    for length, code in ((37, 0), (38, 2)):
        np.save(tmp_path / "tokens.npy", tokens[:length])
        result = run(client, copy, tmp_path / "tokens.npy", tmp_path / f"out{length}.npy")
        assert result.returncode == code, result.stderr
    assert "A lane takes at most 37 tokens" in result.stderr
    assert "Lane 0 has had 0 and is given 38 more. Restart it with reset()" in result.stderr
    assert not (tmp_path / "out38.npy").exists()
    assert "us a step (median of 20" in run(client, copy, "--bench", 20).stdout  # which starts streams again


@pytest.mark.slow
def test_other_weights_do_not_pass(client: Path, single: Path, tmp_path: Path) -> None:
    copy = _with_weights(single, tmp_path, lambda numbers: numbers * np.float32(1.01))
    result = run(client, copy, "--check")
    assert result.returncode == 5
    assert result.stdout.splitlines()[-1].startswith("FAILED: 2 streams")
    assert "inf" not in result.stdout
    assert "does not match the recorded model" in result.stderr


@pytest.mark.slow
def test_a_stream_that_is_not_finite_is_refused(client: Path, single: Path, tmp_path: Path) -> None:
    copy = _with_weights(single, tmp_path, lambda numbers: numbers * np.float32(np.nan))
    (tmp_path / "tokens.raw").write_bytes(bytes(9))
    result = run(client, copy, tmp_path / "tokens.raw", tmp_path / "out.npy")
    assert result.returncode == 4, result.stderr
    assert "NaN or infinite numbers" in result.stderr
    assert not (tmp_path / "out.npy").exists()
    checked = run(client, copy, "--check")
    assert checked.returncode == 5
    assert "inf" in checked.stdout


def test_an_artifact_that_failed_is_opened_only_if_allowed(client: Path, single: Path, tmp_path: Path) -> None:
    shutil.copytree(single, tmp_path / "m.nsm")
    manifest = json.loads((single / "manifest.json").read_text())
    manifest["artifacts"][0]["parity"] = {"status": "failed"}
    (tmp_path / "m.nsm" / "manifest.json").write_text(json.dumps(manifest))
    refused = run(client, tmp_path / "m.nsm", "--check")
    assert refused.returncode == 5
    assert "openvino fp32 failed its parity check" in refused.stderr
    assert run(client, tmp_path / "m.nsm", "--check", "--allow-failed").returncode == 0


@pytest.mark.slow
def test_low_precision_is_not_measured_with_the_budget_of_fp32(client: Path, single: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(single, tmp_path / "copy.nsm"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["artifacts"][0]["precision"] = "int8"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    result = run(client, copy, "--check")
    assert result.returncode == 3
    assert "this artifact is in int8" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(OLDER[0]) is None, reason="needs qemu: apt-get install qemu-user-static")
def test_int8_for_processors_with_dot_products_is_refused_on_others(client: Path, single: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", make_sequences(1, 8)[0])
    codes = {}
    for device in ("cpu", "cpu-dot"):
        copy = Path(shutil.copytree(single, tmp_path / f"{device}.nsm"))
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["artifacts"][0] |= {"precision": "int8", "device": device}
        (copy / "manifest.json").write_text(json.dumps(manifest))
        command = [*OLDER, str(client), str(copy), str(tmp_path / "tokens.npy"), str(tmp_path / "out.npy")]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        codes[device] = result.returncode
    assert codes == {"cpu": 0, "cpu-dot": 3}
    assert "for processors with VNNI" in result.stderr
    assert "nsm build BUNDLE --target openvino --precision int8 --force" in result.stderr


def _with_weights(bundle: Path, folder: Path, change: Callable[[Any], Any]) -> Path:
    """A copy of a bundle with its weights changed, and recorded so."""
    copy = Path(shutil.copytree(bundle, folder / "copy.nsm"))
    weights = copy / "openvino" / "weights.bin"
    numbers = np.frombuffer(weights.read_bytes()[: weights.stat().st_size // 4 * 4], np.float32).copy()
    # Others are no floats, shapes for instance, or bounds that a logarithm relies on.
    chosen = (np.abs(numbers) > 1e-3) & (np.abs(numbers) < 0.9)
    numbers[chosen] = change(numbers[chosen])
    weights.write_bytes(numbers.tobytes() + weights.read_bytes()[numbers.nbytes :])
    _record_again(copy, "openvino/weights.bin")
    return copy


def _record_again(bundle: Path, name: str, path: str | None = None) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    data = (bundle / name).read_bytes()
    for record in [*manifest["files"], *(r for a in manifest["artifacts"] for r in a["files"])]:
        if record["path"] == name:
            record.update(path=path or name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["hash", "size", "missing", "json", "version", "key", "climbs", "absolute", "link", "loop", "door"]
)
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
        (copy / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
        message = "format version 99; this client reads version 2"
    elif kind == "key":
        del manifest["spec"]["states"]
        (copy / "manifest.json").write_text(json.dumps(manifest))
    else:
        shutil.copy(weights, tmp_path / "outside.bin")
        paths = {"climbs": "../outside.bin", "absolute": str(tmp_path / "outside.bin")}
        links = {
            "link": (weights, tmp_path / "outside.bin"),
            "loop": (weights, weights),
            "door": (copy / "manifest.json", single / "manifest.json"),
        }
        if kind in paths:
            _record_again(copy, "openvino/weights.bin", paths[kind])
        else:
            place, target = links[kind]
            place.unlink()
            os.symlink(target, place)
        message = "which is outside the bundle"
    result = run(client, copy, "--check")
    assert result.returncode == 6, result.stderr
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")


def _set(place: str, value: Any) -> Callable[[Any], None]:
    """Puts a value at a place of the spec, like "states.0.shape"."""

    def change(spec: Any) -> None:
        *path, last = (int(part) if part.isdigit() else part for part in place.split("."))
        for part in path:
            spec = spec[part]
        spec[last] = value

    return change


def _wide_outputs(spec: Any) -> None:
    for entry in spec["entries"][:2]:
        entry["outputs"][0]["shape"][-1] = 10**9


@pytest.mark.slow
def test_a_manifest_of_a_size_that_none_has_is_not_read(client: Path, single: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(single, tmp_path / "copy.nsm"))
    os.truncate(copy / "manifest.json", 65 << 20)  # a hole
    result = run(client, copy, "--check")
    assert result.returncode == 6
    assert "has 68157440 bytes, too many for a manifest" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (_set("batch", 0), 6, "it has no lanes"),
        (_set("batch", 3), 6, "has no axis of 3 lanes"),
        (_set("states.2.shape", [1, -1]), 6, "0.bank has the shape [1, 18446744073709551615]"),
        (_set("states.2.shape", [1, 2**39, 2**39]), 6, "0.bank has the shape"),
        (_set("states.2.append_axis", 9), 6, "no such axis to append on"),
        (_set("states.2.append_axis", 1), 6, "no state counts the tokens"),
        (_set("states.2.dtype", "float16"), 6, "value of float16"),
        (
            _set("states.2.shape", [1, 2, 10**9]),
            6,
            "value of float32[1, 2, 1000000000] for the state 0.bank",
        ),
        (_set("entries.0.reads", []), 6, "which the manifest lacks"),
        (_set("states.0.dtype", "int32"), 6, "lane.offset is not int64[1]"),
        (_set("entries", []), 6, "it has no step"),
        (_set("entries.0.inputs", []), 6, "step has no inputs or no outputs"),
        (_set("entries.0.inputs.0.shape", [1]), 6, "takes tokens of shape [1]"),
        (_wide_outputs, 6, "and the manifest says [1, 16, 1000000000]"),
        (_set("entries.0.inputs.1.shape", [2]), 6, "valid is not int64[1]"),
        (_set("entries.0.inputs.1.name", "speaker"), 3, "this client supports tokens and valid"),
        (_set("entries.0.outputs.0.shape", [1, 3, 5]), 6, "step gives outputs of shape [1, 3, 5]"),
        (_set("entries.0.reads", ["ghost"]), 6, "undefined state ghost"),
        (_set("entries.1.inputs.0.dtype", "float32"), 6, "of different tokens"),
        (_set("entries.1.name", "decoder"), 0, "passed"),
        (_set("entries.2.name", "comit"), 6, "comit has no inputs"),
        (lambda spec: spec["entries"].pop(), 6, "no commit"),
        (lambda spec: spec["entries"][2]["writes"].remove("lane.offset"), 6, "commit does not write lane.offset"),
        (lambda spec: spec["entries"][1]["writes"].remove("lane.offset"), 6, "decode does not write lane.offset"),
        (_set("capacity", 15), 6, "its capacity is less than a call"),
        (_set("capacity", 0), 6, "limits a stream to 0 tokens; expected a number above 0, or null"),
        (_set("capacity", -1), 6, "limits a stream to -1 tokens"),
        (_set("capacity", 16.5), 6, "limits a stream to 16.5 tokens"),
        (_set("capacity", True), 6, "limits a stream to true tokens"),
        (_set("capacity", 160), 0, "passed"),
        (_set("capacity", 159), 2, "takes at most 159 tokens"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(
    change: Callable[[Any], None], code: int, message: str, client: Path, single: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(single, tmp_path / "copy.nsm"))
    manifest = json.loads((copy / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["spec"]["entries"]] == ["step", "decode", "commit"]
    change(manifest["spec"])
    (copy / "manifest.json").write_text(json.dumps(manifest))
    result = run(client, copy, "--check")
    assert result.returncode == code, result.stderr
    assert message in result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"after/0.bank": None}, "holds 19 of after/; expected 20"),
        ({"after/ghost": np.zeros(1)}, "holds 21 of after/; expected 20"),
        ({"after/0.bank": None, "after/ghost": np.zeros(1)}, "it lacks 0.bank"),
        ({"outputs/outputs": np.zeros((2, 10, 16, 4), np.float32)}, "expected float32[2, 10, 16, 5]"),
        ({"outputs/outputs": np.zeros((2, 10, 16, 5))}, "outputs is float64[2, 10, 16, 5]"),
        ({"inputs/tokens": np.zeros((0, 10, 16), np.int64)}, "it holds no streams"),
        ({"inputs/tokens": np.full((2, 10, 16), 99)}, "ids that the model does not take"),
        ({"positions": np.array([-1])}, "positions are not all below 16"),
        ({"sampled": np.array([], np.int64)}, "sampled is empty"),
        ({"meta": np.array("{}")}, "meta has no fingerprint"),
        ({"meta": np.array('{"fingerprint": "another"}')}, "recorded from another one"),
        ({"meta": np.array("ü")}, "it is no ASCII"),
        ({"meta": np.array(1j)}, "its numbers are <c16"),
    ],
)
def test_a_trace_that_is_not_of_the_model_is_refused(
    changes: dict[str, Any], message: str, client: Path, single: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(single, tmp_path / "copy.nsm"))
    with np.load(copy / "golden.npz") as archive:
        arrays = {name: archive[name] for name in archive.files} | changes
    np.savez(copy / "golden.npz", allow_pickle=False, **{k: v for k, v in arrays.items() if v is not None})
    _record_again(copy, "golden.npz")
    result = run(client, copy, "--check")
    assert result.returncode == 6, result.stdout
    assert message in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Usage: nsm_client BUNDLE"),
        (["{bundle}"], "Usage"),
        (["{bundle}", "--chek"], "--chek."),
        (["{bundle}", "--check", "--threads", "none"], "above 0; given none"),
        (["absent.nsm", "--check"], "There is no bundle absent.nsm"),
        (["{bundle}", "absent.npy", "out.npy"], "absent.npy cannot be opened"),
        (["{bundle}", "{folder}/large.npy", "out.npy"], "must lie in 0 .. 19"),
        (["{bundle}", "{folder}/vectors.npy", "out.npy"], "vectors.npy contains float32; expected integer ids"),
        (["{bundle}", "{folder}/table.npy", "out.npy"], "each token of shape []; given int64[2, 2]"),
        (["{bundle}", "{folder}/empty.npy", "out.npy"], "at least one token; given none"),
        (["{bundle}", "{folder}/empty.raw", "out.npy"], "at least one token; given none"),
        (["{bundle}", "{folder}/text.npy", "out.npy"], "cannot be read as an array: it is no .npy"),
        (["{bundle}", "{folder}", "out.npy"], "cannot be opened as a file"),
        (["{bundle}", "{folder}/good.npy", "{folder}/absent/out.npy"], "cannot be written"),
        (["{bundle}", "{folder}/good.npy", "{folder}/good.npy"], "good.npy exists, and is not replaced. Take another"),
        (["{bundle}", "--check", "--precision", "int8"], "openvino in fp32. Select one with --precision"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: list[str], message: str, client: Path, single: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "large.npy", np.array([1, 99]))
    np.save(tmp_path / "vectors.npy", np.zeros((4, 2), np.float32))
    np.save(tmp_path / "table.npy", np.ones((2, 2), np.int64))
    np.save(tmp_path / "good.npy", np.ones(3, np.int64))
    np.save(tmp_path / "empty.npy", np.array([], np.int64))
    (tmp_path / "empty.raw").touch()
    (tmp_path / "text.npy").write_text("not an array")
    filled = [part.format(bundle=single, folder=tmp_path) for part in arguments]
    result = run(client, *filled)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr


def _with_precisions(bundle: Path, copy: Path, *precisions: str) -> Path:
    """A bundle with an artifact of OpenVINO in each, the same files under several names."""
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (plain,) = manifest["artifacts"]
    manifest["artifacts"] = []
    for precision in precisions:
        folder = find_target("openvino").place(precision)
        if precision != "fp32":
            shutil.copytree(copy / "openvino", copy / folder)
        files = [{**record, "path": record["path"].replace("openvino/", f"{folder}/")} for record in plain["files"]]
        manifest["artifacts"].append({**plain, "precision": precision, "files": files})
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


@pytest.mark.slow
def test_of_several_precisions_the_named_one_is_opened(client: Path, single: Path, tmp_path: Path) -> None:
    copy = _with_precisions(single, tmp_path / "copy.nsm", "int8", "fp32", "bf16")
    (copy / "openvino-int8" / "step.xml").write_bytes(b"spoiled")
    (copy / "openvino-bf16" / "weights.bin").write_bytes(b"spoiled")
    assert run(client, copy, "--check").returncode == 0, "that in fp32"
    assert run(client, copy, "--check", "--precision", "fp32").returncode == 0
    for precision, file in (("int8", "step.xml"), ("bf16", "weights.bin")):
        result = run(client, copy, "--bench", "1", "--precision", precision)
        assert result.returncode == 6
        assert f"openvino-{precision}/{file} is missing or has another size" in result.stderr


@pytest.mark.slow
def test_several_precisions_without_fp32_are_named(client: Path, single: Path, tmp_path: Path) -> None:
    copy = _with_precisions(single, tmp_path / "copy.nsm", "int8", "bf16")
    result = run(client, copy, "--bench", "1")
    assert result.returncode == 2
    assert "openvino in bf16, int8. Select one with --precision" in result.stderr
    assert run(client, copy, "--bench", "1", "--precision", "int8").returncode == 0
    twice = _with_precisions(single, tmp_path / "twice.nsm", "fp32", "fp32")
    result = run(client, twice, "--check")
    assert result.returncode == 6
    assert "two artifacts of openvino in one precision" in result.stderr


@pytest.mark.slow
def test_a_bundle_without_openvino_says_how_to_get_it(client: Path, single: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(single, tmp_path / "copy.nsm"))
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "artifacts": []}))
    result = run(client, copy, "--check")
    assert result.returncode == 2
    assert "nsm build BUNDLE --target openvino" in result.stderr
