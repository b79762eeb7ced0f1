"""Linear ops in int8, on this processor and on older ones: no sum of two of them is cut off."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from onnx import TensorProto, numpy_helper

from nsm.bundle import Bundle
from nsm.errors import DeviceUnavailableError
from nsm.export.graphs.external_data import load_shared
from nsm.export.graphs.low_precision import write_graphs
from nsm.export.verify import acceptance
from nsm.manifest import Artifact
from nsm.quantization.policy import POLICIES, SAFE_SUM, find_policy
from nsm.results import ParityResult
from nsm.runtimes.opening import cpu_features as processor
from nsm.runtimes.opening.artifacts import open_artifact
from nsm.runtimes.targets import find_target
from tests.export.builders.older_processor import ACTIVATIONS, error
from tests.quantization.graphs import largest_pair

OLDER = Path(__file__).with_name("older_processor.py")
"""Checks a linear op, and is a program of its own: a processor is chosen when a process starts."""
QEMU = "qemu-x86_64-static"


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("scheme", ["static", "asymmetric"])
def test_openvino_adds_up_what_the_graph_says(scheme: str, kind: str) -> None:
    assert error(scheme, kind, saturation_safe=True) < 1e-5


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_onnx_runtime_adds_up_what_the_graph_says(kind: str) -> None:
    assert error("dynamic", kind, saturation_safe=True) < 1e-4


def on_older(command: Sequence[str], scheme: str, saturation_safe: bool, **environment: str) -> float:
    """The largest error over all kinds of activations there."""
    call = [*command, sys.executable, str(OLDER), scheme, "saturation-safe" if saturation_safe else "bare"]
    done = subprocess.run(call, capture_output=True, text=True, env=os.environ | environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the fault is one of x86 processors")
@pytest.mark.parametrize("scheme", ["static", "asymmetric"])
@pytest.mark.parametrize("processor", ["AVX2", "AVX512_CORE"])
def test_openvino_is_right_with_the_instructions_of_processors_without_vnni(processor: str, scheme: str) -> None:
    """And would not be without the guard: so the kernels are those of such a processor."""
    assert on_older([], scheme, saturation_safe=True, ONEDNN_MAX_CPU_ISA=processor) < 1e-5
    assert on_older([], scheme, saturation_safe=False, ONEDNN_MAX_CPU_ISA=processor) > 0.1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(QEMU) is None, reason="needs qemu: apt-get install qemu-user-static")
def test_onnx_runtime_is_right_on_a_processor_without_vnni() -> None:
    assert on_older([QEMU, "-cpu", "Haswell"], "dynamic", saturation_safe=True) < 1e-4
    assert on_older([QEMU, "-cpu", "Haswell"], "dynamic", saturation_safe=False) > 0.1


def test_matrices_are_saturation_safe_wherever_a_processor_adds_products_of_bytes() -> None:
    found = {key: policy for key, policy in POLICIES.items() if policy.scheme in ("static", "dynamic")}
    for (target, _), policy in found.items():
        assert policy.saturation_safe == ("cpu" in find_target(target).devices)


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_for_processors_with_dot_products_they_are_not(target: str) -> None:
    policy = find_policy(target, "int8", "CPU-DOT")
    assert policy is not None
    assert not policy.saturation_safe


# -- the processor -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("processor : 0\nflags : fpu sse2 avx2 fma\n", False),
        ("processor : 0\nflags : fpu avx512f avx512_vnni\n", True),
        ("processor : 0\nflags : fpu avx2 avx_vnni\n", True),
        ("processor : 0\nFeatures : fp asimd asimddp\n", True),
        ("processor : 0\nFeatures : fp asimd\n", False),
        ("processor : 0\n", None),
    ],
)
def test_what_a_processor_says_of_itself(
    text: str, found: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "cpuinfo")
    assert processor.int8_dot_products() is found
    if found is False:
        processor.require_device("cpu", "int8")
        processor.require_device("cpu-dot", "fp32")
        with pytest.raises(DeviceUnavailableError, match=r"--device cpu-dot.*nsm build BUNDLE"):
            processor.require_device("cpu-dot", "int8")
    else:
        processor.require_device("cpu-dot", "int8")


def test_elsewhere_than_on_linux_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "absent")
    assert processor.int8_dot_products() is None


@pytest.mark.parametrize(
    ("device", "dot", "named"),
    [("cpu", True, True), ("cpu", False, False), ("cpu", None, False), ("cpu-dot", True, False)],
)
def test_the_more_exact_device_is_named_where_it_would_do(
    device: str, dot: bool | None, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = find_policy("onnxruntime", "int8", device)
    assert policy is not None
    monkeypatch.setattr(acceptance, "int8_dot_products", lambda: dot)
    maker = object.__new__(acceptance.Maker)
    maker.policy = policy
    notes = maker._notes(Artifact("onnxruntime", device, "int8", "int8", (), ParityResult("passed"), ("one",)))
    assert notes[:2] == ("one", policy.note)
    assert any("--device cpu-dot is more exact" in note for note in notes) == named


@pytest.mark.parametrize(("device", "saturation_safe"), [("cpu", True), ("cpu-dot", False)])
def test_the_guard_reaches_the_graphs(device: str, saturation_safe: bool, int8_bundle: Path, tmp_path: Path) -> None:
    policy, spec = find_policy("onnxruntime", "int8", device), Bundle(int8_bundle).manifest.spec
    assert policy is not None
    write_graphs(int8_bundle, tmp_path / "low", spec, policy, None)
    model = load_shared(tmp_path / "low" / "step.onnx")
    matrices = [numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == TensorProto.INT8 and t.dims]
    assert matrices
    assert all((largest_pair(matrix) <= SAFE_SUM) == saturation_safe for matrix in matrices)


def test_no_device_that_is_asked_for_gets_around_the_processor(
    int8_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An artifact is what it was built for."""
    bundle = Bundle(int8_bundle)
    artifact = replace(bundle.artifact("openvino"), device="cpu-dot")
    monkeypatch.setattr(processor, "int8_dot_products", lambda: False)
    for device in (None, "cpu", "cpu-dot"):
        with pytest.raises(DeviceUnavailableError, match="for processors with VNNI"):
            open_artifact(bundle, artifact, device)
    open_artifact(bundle, bundle.artifact("openvino"), "cpu").close()
