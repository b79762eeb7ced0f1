from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import openvino as ov
import pytest

from nsm.bundle import Bundle
from nsm.errors import BuildError, BundleDamagedError, BundleError, DeviceUnavailableError, StreamError
from nsm.runtimes.backends import onnxruntime, onnxruntime_unoptimized, openvino
from nsm.runtimes.base import Runtime
from nsm.runtimes.opening.artifacts import open_bundle
from nsm.runtimes.targets import find_target
from nsm.spec import StepSpec
from nsm.trace import Array, Arrays
from tests.runtimes.fake import assert_same, fake_spec


@pytest.fixture
def runtime(bundle: Bundle, target: str) -> Runtime:
    """The bare runtime of a target, without a session."""
    return _load(bundle, target, None)


def _load(bundle: Bundle, target: str, threads: int | None) -> Runtime:
    found = find_target(target)
    spec = bundle.manifest.spec
    files = {entry.name: bundle.path / found.folder / f"{entry.name}{found.suffix}" for entry in spec.entries}
    loaded: Runtime = found.runtime_module().load(files, spec, "cpu", threads)
    return loaded


def _inputs(seed: int = 0) -> dict[str, Array]:
    return {"tokens": np.random.default_rng(seed).integers(0, 20, (2, 8)), "valid": np.full(2, 8)}


def test_a_runtime_refuses_a_consumed_state(bundle: Bundle, runtime: Runtime) -> None:
    first = runtime.load_state(bundle.state_init())
    _, second = runtime.call("step", _inputs(), first)
    kept = runtime.read_state(second)
    with pytest.raises(StreamError, match="consumed by an earlier call"):
        runtime.call("step", _inputs(), first)
    with pytest.raises(StreamError, match="consumed by an earlier call"):
        runtime.read_state(first)
    assert_same(runtime.read_state(second), kept)


def test_a_runtime_refuses_the_state_of_another(bundle: Bundle, runtime: Runtime) -> None:
    foreign = _load(bundle, "onnx", 1).load_state(bundle.state_init())
    with pytest.raises(StreamError, match="belongs to another runtime"):
        runtime.call("step", _inputs(), foreign)


def test_a_state_goes_in_and_comes_out_bit_by_bit(bundle: Bundle, runtime: Runtime) -> None:
    spec, random = bundle.manifest.spec, np.random.default_rng(0)
    arrays = {s.name: random.integers(0, 2, s.shape).astype(s.dtype) for s in spec.states}
    for state in spec.states:
        if state.dtype == "float32":
            arrays[state.name] = random.standard_normal(state.shape).astype(np.float32)
            arrays[state.name].ravel()[:3] = [-0.0, np.float32(1e-45), 3e38]
    assert_same(runtime.read_state(runtime.load_state(arrays)), arrays)


@pytest.mark.parametrize(("value", "finite"), [(np.nan, False), (np.inf, False), (-np.inf, False), (3e38, True)])
def test_a_runtime_sees_a_number_that_is_not_finite(
    bundle: Bundle, runtime: Runtime, value: float, finite: bool
) -> None:
    for state in bundle.manifest.spec.states:
        arrays = bundle.state_init()
        assert runtime.finite(runtime.load_state(arrays))
        if state.dtype == "float32":
            arrays[state.name].flat[-1] = value
            assert runtime.finite(runtime.load_state(arrays)) == finite


def test_outputs_that_are_kept_stay_and_those_that_are_not_give_their_memory_back(
    bundle: Bundle, runtime: Runtime
) -> None:
    kept: list[tuple[Array, Array]] = []
    state = runtime.load_state(bundle.state_init())
    for seed in range(60):
        outputs, state = runtime.call("step", _inputs(seed), state)
        kept.append((outputs["outputs"][1, 2:], outputs["outputs"].copy()[1, 2:]))
    assert len({wanted.tobytes() for _, wanted in kept}) == len(kept)
    for found, wanted in kept:
        np.testing.assert_array_equal(found, wanted)
    kept.clear()
    places = set()
    for seed in range(20):
        outputs, state = runtime.call("step", _inputs(seed), state)
        places.add(outputs["outputs"].ctypes.data)
    assert len(places) == 2


def test_the_effective_precision_is_fp32(runtime: Runtime) -> None:
    assert runtime.effective_precision == "fp32"


def test_a_runtime_computes_in_what_it_says(bundle: Bundle, target: str) -> None:
    """In bf16 the error of a single step is a thousand times this."""
    trace = bundle.trace().first(1)
    with open_bundle(bundle, target) as session:
        lanes = [0, 1]
        outputs = session.step(trace.inputs["tokens"][lanes, 0])["outputs"]
    reference = trace.outputs["outputs"][lanes, 0]
    assert np.abs(outputs - reference).max() <= 1e-5 * np.abs(reference).max()


def test_openvino_is_asked_for_fp32_and_says_what_it_does(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[Any, Any]] = []
    answers = iter(["bf16", "dynamic"])

    class Compiled:
        inputs = ()

        def get_property(self, name: object) -> SimpleNamespace:
            return SimpleNamespace(get_type_name=lambda: next(answers))

        def create_infer_request(self) -> SimpleNamespace:
            return SimpleNamespace(set_tensor=lambda name, tensor: None)

    class Core:
        def get_property(self, device: str, name: object) -> list[str]:
            return ["FP32"]

        def read_model(self, path: Path, weights: Path) -> Path:
            assert weights == path.with_name("weights.bin")
            return path

        def compile_model(self, path: Path, device: str, config: dict[Any, Any]) -> Compiled:
            asked.append(config)
            return Compiled()

    monkeypatch.setattr("openvino.Core", Core)
    assert _load(bundle, "openvino", None).effective_precision == "bf16"
    assert _load(bundle, "openvino", 3).effective_precision == "dynamic"
    assert [config["INFERENCE_PRECISION_HINT"].get_type_name() for config in asked] == ["f32", "f32"]
    assert [config.get("INFERENCE_NUM_THREADS") for config in asked] == [None, 3]


@pytest.mark.parametrize(("precision", "other"), [("bf16", "FP16"), ("fp16", "BF16")])
def test_half_precision_is_not_run_on_a_processor_that_has_none(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, precision: str, other: str
) -> None:
    """OpenVINO would compute in fp32 then, without a word."""
    values = {"OPTIMIZATION_CAPABILITIES": ["FP32", "INT8", other], "FULL_DEVICE_NAME": "Old One"}
    monkeypatch.setattr("openvino.Core", lambda: SimpleNamespace(get_property=lambda device, name: values[name]))
    spec = bundle.manifest.spec
    files = {entry.name: bundle.path / "openvino" / f"{entry.name}.xml" for entry in spec.entries}
    with pytest.raises(DeviceUnavailableError, match=rf"\(Old One\) does not compute in {precision}"):
        find_target("openvino").runtime_module().load(files, spec, "cpu", None, precision)


def test_nothing_is_told_to_anyone_by_openvino() -> None:
    """Its telemetry forks a process for every import and conversion."""
    code = "import nsm.runtimes, openvino, openvino.tools.ovc.telemetry_utils as t; print(t.tm.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "openvino.tools.ovc.telemetry_stub"


def test_masked_slots_do_not_matter(bundle: Bundle, target: str) -> None:
    """Poison: what lies in a slot that is off reaches no output and no other slot, whatever the entry."""
    off = [1, 4]
    tokens = np.random.default_rng(0).integers(0, 20, (6, 2, 13))
    slot_axis = {"bank": 2, "cell": 2, "importance": 1}
    answers: list[tuple[list[Arrays], Arrays]] = []
    with open_bundle(bundle, target) as session:
        for poison in (0.0, 1e30, -1e30):
            state = bundle.state_init()
            for name, value in state.items():
                layer, _, role = name.rpartition(".")
                if role in slot_axis:
                    np.moveaxis(value, slot_axis[role], 0)[off] = poison
                elif role == "mask":
                    assert value.all(), layer
                    value[:, off] = False
            session.load_state(state)
            outputs = [session.feed(step) for step in tokens]
            after = session.read_state()
            for name in after:
                role = name.rpartition(".")[2]
                if role in slot_axis:
                    after[name] = np.delete(after[name], off, slot_axis[role])
            answers.append((outputs, after))
        session.reset()
        whole = [session.feed(step) for step in tokens]
    assert not np.array_equal(whole[0]["outputs"], answers[0][0][0]["outputs"])
    for outputs, after in answers[1:]:
        for given, wanted in zip(outputs, answers[0][0], strict=True):
            assert_same(given, wanted)
        assert_same(after, answers[0][1])


def test_the_number_of_threads_changes_nothing_but_rounding(bundle: Bundle, target: str) -> None:
    outputs = []
    for threads in (1, 2):
        runtime = _load(bundle, target, threads)
        answer, _ = runtime.call("step", _inputs(), runtime.load_state(bundle.state_init()))
        outputs.append(answer["outputs"])
        runtime.close()
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("load", "suffix", "message"),
    [
        (onnxruntime.load, ".onnx", "ONNX Runtime cannot open"),
        (onnxruntime_unoptimized.load, ".onnx", "ONNX Runtime cannot open"),
        (openvino.load, ".xml", "OpenVINO cannot compile"),
    ],
    ids=["onnxruntime", "onnx", "openvino"],
)
def test_a_file_the_backend_cannot_read_is_named(
    load: Callable[[dict[str, Path], StepSpec, str, int | None], Runtime], suffix: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / f"step{suffix}"
    for content in (None, b"", b"no graph"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(BuildError, match=message) as caught:
            load({"step": path}, fake_spec(), "cpu", None)
        assert str(path) in str(caught.value)
        assert caught.value.__cause__ is not None


def test_the_plain_target_runs_the_graph_unoptimised(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[tuple[str, int]] = []
    open_session = ort.InferenceSession

    def spy(path: str, options: Any, **kwargs: Any) -> Any:
        levels.append((options.graph_optimization_level.name, options.intra_op_num_threads))
        return open_session(path, options, **kwargs)

    monkeypatch.setattr(ort, "InferenceSession", spy)
    _load(bundle, "onnx", 1)
    _load(bundle, "onnxruntime", 2)
    assert levels == [("ORT_DISABLE_ALL", 1), ("ORT_ENABLE_ALL", 2)]


def test_the_other_graphs_are_opened_when_they_are_needed(
    bundle: Bundle, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    inference, read_model = ort.InferenceSession, ov.Core.read_model

    def open_onnx(path: str, *args: Any, **kwargs: Any) -> Any:
        opened.append(Path(path).stem)
        return inference(path, *args, **kwargs)

    def open_ir(core: ov.Core, path: Path, *args: Any) -> Any:
        opened.append(path.stem)
        return read_model(core, path, *args)

    monkeypatch.setattr(ort, "InferenceSession", open_onnx)
    monkeypatch.setattr(ov.Core, "read_model", open_ir)
    with open_bundle(bundle, target) as session:
        session.step(_inputs()["tokens"])
        session.step(_inputs()["tokens"])
        assert opened == ["step"]
        session.decode(np.zeros((2, 1), int))
        assert opened == ["step", "decode"]
        session.feed(np.zeros((2, 8), int))
        assert opened == ["step", "decode", "commit"]
        session.reset()
        session.feed(np.zeros((2, 19), int))
        assert opened == ["step", "decode", "commit"]


def test_a_graph_that_was_replaced_leaves_the_session_in_use(bundle_copy: Path, target: str) -> None:
    folder, suffix = find_target(target).folder, find_target(target).suffix
    with open_bundle(bundle_copy, target) as session:
        before = session.read_state()
        (bundle_copy / folder / f"decode{suffix}").write_bytes(b"rubbish")
        with pytest.raises(BundleDamagedError, match="were replaced while the session was open"):
            session.decode(np.zeros((2, 1), int))
        assert_same(session.read_state(), before)
        assert session.offsets.tolist() == [0, 0]
        session.step(_inputs()["tokens"])


def test_a_closed_session_says_so(bundle: Bundle, target: str) -> None:
    session = open_bundle(bundle, target)
    session.step(_inputs()["tokens"])
    session.close()
    session.close()
    for call in (session.step, session.feed, session.run):
        with pytest.raises(StreamError, match="The session is closed"):
            call(_inputs()["tokens"])
    with pytest.raises(StreamError, match="The session is closed"):
        session.decode(np.zeros((2, 1), int))
    for look in (session.read_state, session.snapshot, session.reset, session.is_fresh):
        with pytest.raises(StreamError, match="The session is closed"):
            look()
    with pytest.raises(StreamError, match="The session is closed"):
        session.reset(1)


def test_a_bundle_that_is_replaced_while_it_is_open_does_not_change_the_model(bundle_copy: Path, target: str) -> None:
    """Graphs are opened late; what they are then must be what was verified, or the session must say that it is not."""
    tokens = np.ones((2, 1), int)
    weights = bundle_copy / find_target(target).folder / "weights.bin"
    with open_bundle(bundle_copy, target) as session:
        wanted = session.decode(tokens)["outputs"]
    with open_bundle(bundle_copy, target) as session:
        content = np.frombuffer(weights.read_bytes(), np.uint8).copy()
        weights.unlink()
        content[2::4] ^= 0x40
        content.tofile(weights)
        try:
            given = session.decode(tokens)["outputs"]
        except BundleError:
            return
        np.testing.assert_array_equal(given, wanted)


def test_what_is_slower_on_a_processor_is_really_left_out(exported: Path, tmp_path: Path) -> None:
    """ONNX Runtime says nothing about the name of an optimisation that there is not."""

    def operators(without: tuple[str, ...]) -> bytes:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        options.log_severity_level = 3
        onnxruntime.open_graph(exported / "graphs" / "step.onnx", options, without=without)
        return (tmp_path / "optimised.onnx").read_bytes()

    assert b"SkipLayerNormalization" in operators(())
    assert b"SkipLayerNormalization" not in operators(onnxruntime.SLOWER_ON_CPU)
    # The norm before the gates is written so that it becomes one operation.
    assert b"SimplifiedLayerNormalization" in operators(onnxruntime.SLOWER_ON_CPU)
