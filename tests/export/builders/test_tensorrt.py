from __future__ import annotations

import importlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from nsm.bundle import Bundle
from nsm.errors import BuildError, MissingDependencyError, UnsupportedError
from nsm.export.builders import tensorrt
from nsm.export.builders.base import Request
from nsm.export.verify.artifact import build_target
from nsm.runtimes.targets import find_target
from nsm.spec import StepSpec

FILES = (
    "tensorrt/step.engine",
    "tensorrt/decode.engine",
    "tensorrt/commit.engine",
    "tensorrt/build.log",
    "tensorrt/layers.json",
)


@pytest.fixture
def trt() -> Any:
    return importlib.import_module(find_target("tensorrt").require())


@pytest.fixture
def stage(exported: Path, tmp_path: Path) -> Path:
    """A bundle in the making: graphs only."""
    (tmp_path / "stage").mkdir()
    shutil.copytree(exported / "graphs", tmp_path / "stage" / "graphs")
    return tmp_path / "stage"


def request_for(stage: Path, spec: StepSpec, device: str | None = None) -> Request:
    return Request(stage, stage / "tensorrt", spec, device)


def kept_log(error: BuildError, stage: Path) -> str:
    """The text of the log, which must outlive the unfinished bundle and be named in the message."""
    assert error.log is not None
    assert error.log.parent == stage.parent
    assert str(error).endswith(f"The builder's log: {error.log}")
    return error.log.read_text(encoding="utf-8")


# -- what is built ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "wanted"), [(None, "portable"), ("portable", "portable"), ("sm86", "sm86")])
def test_an_engine_is_built_with_its_log_and_layers(
    stage: Path, bundle: Bundle, device: str | None, wanted: str
) -> None:
    built = tensorrt.build(request_for(stage, bundle.manifest.spec, device))
    assert built.device == wanted
    assert built.files == FILES
    assert sorted(f"tensorrt/{path.name}" for path in (stage / "tensorrt").iterdir()) == sorted(FILES)
    engine = (stage / "tensorrt" / "step.engine").read_bytes()
    assert len(engine) > 100_000
    layers = json.loads((stage / "tensorrt" / "layers.json").read_text())
    assert list(layers) == ["step", "decode", "commit"]
    assert len(layers["step"]) > 100
    assert any("MATRIX_MULTIPLY" in line for line in layers["step"])
    log = (stage / "tensorrt" / "build.log").read_text()
    assert all(f"{entry}.onnx" in log for entry in layers)
    assert any(f"for {wanted}" in note for note in built.notes)
    assert list(stage.parent.iterdir()) == [stage], "nothing is left beside the bundle"


def test_the_engine_in_the_bundle_is_pristine_and_says_for_what_it_is(bundle: Bundle, trt: Any) -> None:
    artifact = bundle.artifact("tensorrt")
    assert artifact.device == "portable"
    assert {record.path for record in artifact.files} == set(FILES)
    assert artifact.parity.status == "passed" or artifact.parity.reason
    assert any(trt.__version__ in note for note in artifact.notes)


# -- devices ---------------------------------------------------------------------------------------------------------


def test_a_device_the_package_does_not_know_is_refused(stage: Path, bundle: Bundle, trt: Any) -> None:
    with pytest.raises(
        UnsupportedError,
        match=rf"{trt.__name__} {re.escape(trt.__version__)} does not build for --device sm999\..*sm86",
    ):
        tensorrt.build(request_for(stage, bundle.manifest.spec, "sm999"))


def test_none_is_no_device(stage: Path, bundle: Bundle) -> None:
    with pytest.raises(UnsupportedError, match="does not build for --device none"):
        tensorrt.build(request_for(stage, bundle.manifest.spec, "none"))


def test_a_device_without_fp32_products_is_a_build_error_with_the_reason_in_its_log(
    stage: Path, bundle: Bundle
) -> None:
    with pytest.raises(BuildError, match=r"parsed step\.onnx but could not build an engine for sm75") as caught:
        tensorrt.build(request_for(stage, bundle.manifest.spec, "sm75"))
    assert "Turing" in kept_log(caught.value, stage)


def full_tensorrt() -> Any:
    """The part of the full TensorRT's API that chooses a device."""
    levels = SimpleNamespace(AMPERE_PLUS="ampere and later")
    return SimpleNamespace(__name__="tensorrt", __version__="10.13.0", HardwareCompatibilityLevel=levels)


@pytest.mark.parametrize(("device", "level"), [("portable", "ampere and later"), ("current", "untouched")])
def test_the_full_tensorrt_builds_for_this_gpu_or_for_ampere_and_later(device: str, level: str) -> None:
    config = SimpleNamespace(hardware_compatibility_level="untouched")
    tensorrt._set_device(full_tensorrt(), config, device)
    assert config == SimpleNamespace(hardware_compatibility_level=level)


def test_the_full_tensorrt_does_not_build_for_other_devices() -> None:
    config = SimpleNamespace(hardware_compatibility_level="untouched")
    with pytest.raises(UnsupportedError, match=r"TensorRT 10\.13\.0 builds for .*given --device sm86.*tensorrt-rtx"):
        tensorrt._set_device(full_tensorrt(), config, "sm86")
    assert config.hardware_compatibility_level == "untouched"


def test_without_tensorrt_the_extra_is_named(stage: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        MissingDependencyError,
        match=r'needs the package tensorrt or tensorrt_rtx.*pip install "nsm-toolkit\[tensorrt\]"',
    ):
        tensorrt.build(request_for(stage, bundle.manifest.spec))


# -- what it refuses -------------------------------------------------------------------------------------------------


def test_rubbish_instead_of_a_graph_keeps_a_log(stage: Path, bundle: Bundle) -> None:
    (stage / "graphs" / "step.onnx").write_bytes(b"rubbish")
    with pytest.raises(BuildError, match=r"TensorRT cannot parse step\.onnx: \S+") as caught:
        tensorrt.build(request_for(stage, bundle.manifest.spec))
    assert "ERROR" in kept_log(caught.value, stage)


def test_an_operator_that_tensorrt_does_not_know_keeps_a_log(stage: Path, bundle: Bundle) -> None:
    proto = onnx.load(str(stage / "graphs" / "step.onnx"), load_external_data=False)
    first = proto.graph.node[0]
    first.op_type, first.domain = "Unheard", "com.example"
    proto.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    onnx.save(proto, str(stage / "graphs" / "step.onnx"))
    with pytest.raises(BuildError, match=r"TensorRT cannot parse step\.onnx: .*Unheard") as caught:
        build_target(stage, bundle.manifest.spec, find_target("trt"), "sm86")
    assert "Unheard" in kept_log(caught.value, stage)
    assert caught.value.log is not None
    assert caught.value.log.name == "tensorrt-sm86-build.log"
    with pytest.raises(BuildError) as again:
        build_target(stage, bundle.manifest.spec, find_target("trt"), "sm86")
    assert again.value.log is not None
    assert again.value.log.name == "tensorrt-sm86-build-2.log", "what is there stays"


def test_a_device_that_cannot_compute_the_graph_keeps_the_log_with_the_layers(stage: Path, bundle: Bundle) -> None:
    """TensorRT for RTX has no fp32 matrix product on Turing."""
    with pytest.raises(BuildError, match=r"could not build an engine for sm75.*FP32 GEMM is not supported") as caught:
        build_target(stage, bundle.manifest.spec, find_target("trt"), "sm75")
    log = kept_log(caught.value, stage)
    assert "FP32 GEMM is not supported" in log
    assert sum(line.startswith("layer of step: ") for line in log.splitlines()) > 100


def _other_shape(spec: StepSpec) -> StepSpec:
    states = [replace(s, shape=(2, 7)) if s.name == "1.mask" else s for s in spec.states]
    return replace(spec, states=tuple(states))


def _other_dtype(spec: StepSpec) -> StepSpec:
    return replace(spec, states=tuple(replace(s, dtype="int64") if s.name == "0.mask" else s for s in spec.states))


def _one_more(spec: StepSpec) -> StepSpec:
    more = replace(spec.states[0], name="2.bank", past="p", present="q")
    step, *others = spec.entries
    step = replace(step, reads=(*step.reads, "2.bank"))
    return replace(spec, states=(*spec.states, more), entries=(step, *others))


def _one_less(spec: StepSpec) -> StepSpec:
    step, *others = spec.entries
    step = replace(step, reads=tuple(name for name in step.reads if name != "1.tail"))
    return replace(spec, entries=(step, *others))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_shape, r"parsed past_state\.1\.mask as \(\(2, 6\), 'bool'\); expected \(\(2, 7\)"),
        (_other_dtype, r"parsed past_state\.0\.mask as \(\(2, 6\), 'bool'\); expected \(\(2, 6\), 'int64'\)"),
        (_one_more, r"parsed p as absent; expected"),
        (_one_less, r"parsed past_state\.1\.tail as .*; expected absent"),
    ],
)
def test_states_that_do_not_fit_the_spec_are_a_build_error(
    stage: Path, bundle: Bundle, change: Any, message: str
) -> None:
    with pytest.raises(BuildError, match=message) as caught:
        tensorrt.build(request_for(stage, change(bundle.manifest.spec)))
    assert "step.onnx" in kept_log(caught.value, stage)
    assert not (stage / "tensorrt" / "step.engine").exists()
