"""A device: the wheel, numpy and one backend in an environment of its own, outside the checkout; no torch, no onnx."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nsm.bundle import Bundle
from tests.export.helpers import spoil

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
OTHER = {"onnxruntime": "openvino", "openvino": "onnxruntime"}

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dist = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (found,) = dist.glob("*.whl")
    return found


@pytest.fixture(scope="module", params=sorted(OTHER))
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def device(backend: str, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment of a device that has this backend only."""
    path = tmp_path_factory.mktemp(backend)
    venv.create(path, with_pip=True)
    pip = [str(path / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run(
        [*pip, "--constraint", str(ROOT / "constraints.txt"), f"{wheel}[{backend}]"], check=True, capture_output=True
    )
    return path


@pytest.fixture
def nsm(device: Path, bundle_copy: Path) -> Command:
    """The command there, in the folder of the bundle `copy.nsm`."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        command = [str(device / "bin" / "nsm"), *arguments]
        return subprocess.run(
            command, cwd=bundle_copy.parent, capture_output=True, text=True, check=False, env=environment
        )

    return run


def answer(result: subprocess.CompletedProcess[str]) -> Any:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_it_has_what_the_wheel_asks_for_and_no_more(device: Path, backend: str) -> None:
    code = "import importlib.metadata as m; print(*[d.metadata['name'].lower() for d in m.distributions()])"
    shown = subprocess.run([str(device / "bin" / "python"), "-c", code], capture_output=True, text=True, check=True)
    installed = set(shown.stdout.split())
    assert {"nsm-toolkit", "numpy", backend} <= installed
    assert not {"torch", "onnx", "onnxscript", "onnx-ir", "tensorrt-rtx", OTHER[backend]} & installed


def test_a_bundle_is_inspected_checked_run_and_measured(nsm: Command, backend: str, bundle_copy: Path) -> None:
    assert answer(nsm("inspect", "copy.nsm", "--json"))["verified"] is True

    results = {item["target"]: item for item in answer(nsm("parity", "copy.nsm", "--json"))["results"]}
    assert results[backend]["status"] == "passed"
    assert results[backend]["free_run"]["p99"] <= 1e-4
    assert results[OTHER[backend]]["status"] == "not_run"

    ran = answer(nsm("run", "copy.nsm", "--output", "out.npz", "--json"))
    assert ran["target"] == ("onnx" if backend == "onnxruntime" else "openvino"), "the first that is installed"
    trace = Bundle(bundle_copy).trace()
    with np.load(bundle_copy.parent / "out.npz", allow_pickle=False) as written:
        given = written["0/outputs"]
    wanted = trace.outputs["outputs"][0]
    np.testing.assert_allclose(given.reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-5)

    (measured,) = answer(nsm("bench", "copy.nsm", "-t", backend, "--steps", "20", "--json"))["results"]
    assert measured["latency_us"]["p50"] > 0
    assert measured["peak_rss_mb"] > 10


def test_a_person_reads_what_could_not_be_checked_and_why(nsm: Command, backend: str) -> None:
    shown = nsm("parity", "copy.nsm")
    assert shown.returncode == 0
    mend = f'pip install "nsm-toolkit[{OTHER[backend]}]"'
    assert f"{OTHER[backend]}: not run." in shown.stdout + shown.stderr
    assert mend in " ".join((shown.stdout + shown.stderr).split())
    assert mend in nsm("doctor").stdout


OTHERS, QUANTIZE = 'pip install "nsm-toolkit[OTHER]"', 'pip install "nsm-toolkit[quantize]"'


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("run copy.nsm --target OTHER", 3, OTHERS),
        ("bench copy.nsm --target OTHER", 3, OTHERS),
        ("build copy.nsm --target OTHER", 3, OTHERS),
        ("parity copy.nsm --target OTHER", 5, OTHERS),  # what was not compared has not passed
        ("build copy.nsm --target BACKEND -p int8-weights", 3, QUANTIZE),
        ("roofline copy.nsm", 3, QUANTIZE),
        ("export model.pt --target BACKEND", 3, 'pip install "nsm-toolkit[export]"'),
    ],
)
def test_what_it_cannot_do_names_what_is_missing(
    nsm: Command, backend: str, arguments: str, code: int, message: str
) -> None:
    names = {"OTHER": OTHER[backend], "BACKEND": backend}
    result = nsm(*[names.get(item, item) for item in arguments.split()])
    assert result.returncode == code, result.stderr
    assert "Error: " in result.stderr
    assert "Traceback" not in result.stderr
    assert message.replace("OTHER", OTHER[backend]) in " ".join((result.stdout + result.stderr).split())


def test_a_target_is_built_there(nsm: Command, backend: str) -> None:
    targets = ("mobile", "onnxruntime") if backend == "onnxruntime" else ("openvino",)
    for target in targets:
        (artifact,) = answer(nsm("build", "copy.nsm", "--target", target, "--force", "--json"))["artifacts"]
        assert (artifact["target"], artifact["parity"]["status"]) == (target, "passed")


def test_another_model_under_this_name_fails_there(nsm: Command, backend: str, bundle_copy: Path) -> None:
    """The check is a real one: it fails on weights that are off by a thousandth."""
    spoil(bundle_copy)
    result = nsm("build", "copy.nsm", "--target", backend, "--force")
    assert result.returncode == 5, result.stderr
    assert "Traceback" not in result.stderr
    if backend == "onnxruntime":
        result = nsm("parity", "copy.nsm", "--target", backend, "--bisect")
        assert result.returncode == 3, result.stderr
        assert 'pip install "nsm-toolkit[' in result.stderr
