"""A device, without the time to set one up: a process that finds neither torch nor the packages of ONNX.

`test_bare_device.py` does the same in environments that really lack them, and takes minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nsm.bundle import Bundle
from tests.export.helpers import PROGRAMS

# Python runs it whenever it starts, so in the processes that a command starts too.
_DEVICE = """
import sys
from importlib.machinery import PathFinder

ABSENT = {"torch", "onnx", "onnxscript", "onnx_ir", "openvino", "tensorrt", "tensorrt_rtx", "cuda", "sklearn"}
found = PathFinder.find_spec
PathFinder.find_spec = lambda name, *more: None if name.partition(".")[0] in ABSENT else found(name, *more)
"""
_RUN = """
import json, sys
import numpy as np
import nsm
from nsm.bundle import Bundle

trace = Bundle("copy.nsm").trace()
tokens = trace.inputs["tokens"]
with nsm.open("copy.nsm", "onnxruntime") as session:
    lanes = tokens[: session.batch]
    outputs = session.run(lanes.reshape(len(lanes), -1))["outputs"]
np.save("outputs.npy", outputs)
print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))
"""


@pytest.fixture
def device(bundle_copy: Path) -> Callable[..., Any]:
    """Runs a program there, in the folder of the bundle `copy.nsm`; what it prints is JSON."""
    folder = bundle_copy.parent
    (folder / "sitecustomize.py").write_text(_DEVICE)

    def run(*command: str | Path) -> Any:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment["PYTHONPATH"] = str(folder)
        done = subprocess.run(
            list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_a_bundle_is_opened_and_answers_as_torch_did(device: Callable[..., Any], bundle_copy: Path) -> None:
    loaded = device(sys.executable, "-c", _RUN)
    assert {"nsm", "onnxruntime"} <= set(loaded)
    assert not {"torch", "onnx", "openvino"} & set(loaded)
    outputs = np.load(bundle_copy.parent / "outputs.npy")
    wanted = Bundle(bundle_copy).trace().outputs["outputs"][: len(outputs)]
    np.testing.assert_allclose(outputs.reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-5)


def test_it_is_checked_and_measured_by_the_commands(device: Callable[..., Any]) -> None:
    few = ("--steps", "16", "--json")
    results = {item["target"]: item for item in device(PROGRAMS / "nsm", "parity", "copy.nsm", *few)["results"]}
    assert results["onnxruntime"]["status"] == "passed"
    assert results["onnxruntime"]["free_run"]["p99"] <= 1e-4
    assert results["openvino"]["status"] == "not_run"
    assert 'pip install "nsm-toolkit[openvino]"' in results["openvino"]["reason"]

    options = ("-t", "onnxruntime", "--steps", "10", "--json")
    (measured,) = device(PROGRAMS / "nsm", "bench", "copy.nsm", *options)["results"]
    assert measured["latency_us"]["p50"] > 0
    assert measured["peak_rss_mb"] > 10
