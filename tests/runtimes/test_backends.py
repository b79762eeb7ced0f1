from __future__ import annotations

import ctypes
import enum
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from nsm.bundle import Bundle
from nsm.errors import BuildError, DeviceUnavailableError, MissingDependencyError, RunError, StreamError
from nsm.runtimes import onnxruntime, onnxruntime_plain, openvino, tensorrt
from nsm.runtimes.base import Runtime
from nsm.runtimes.budgets import find_budget
from nsm.runtimes.opening import open_bundle
from nsm.runtimes.parity import compare
from nsm.runtimes.session import Session
from nsm.runtimes.targets import find_target
from nsm.runtimes.tensorrt import TensorRt
from nsm.spec import StateSpec, StepSpec, TensorSpec
from nsm.trace import Array, Arrays
from tests.runtimes.fake import (
    CHUNK,
    FINGERPRINT,
    assert_same,
    fake_initial,
    fake_session,
    fake_spec,
    fake_step,
    fake_trace,
)

# -- the targets that run on a CPU --------------------------------------------------------------------------------


@pytest.fixture
def runtime(bundle: Bundle, target: str) -> Runtime:
    """The bare runtime of a target, without a session."""
    return _load(bundle, target, None)


def _load(bundle: Bundle, target: str, threads: int | None) -> Runtime:
    found = find_target(target)
    files = {"step": bundle.path / found.folder / f"step{found.suffix}"}
    loaded: Runtime = found.runtime_module().load(files, bundle.manifest.spec, "cpu", threads)
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
        def get_property(self, name: object) -> SimpleNamespace:
            return SimpleNamespace(get_type_name=lambda: next(answers))

        def create_infer_request(self) -> SimpleNamespace:
            return SimpleNamespace(set_tensor=lambda name, tensor: None)

    class Core:
        def compile_model(self, path: str, device: str, config: dict[Any, Any]) -> Compiled:
            asked.append(config)
            return Compiled()

    monkeypatch.setattr("openvino.Core", Core)
    assert _load(bundle, "openvino", None).effective_precision == "bf16"
    assert _load(bundle, "openvino", 3).effective_precision == "dynamic"
    assert [config["INFERENCE_PRECISION_HINT"].get_type_name() for config in asked] == ["f32", "f32"]
    assert [config.get("INFERENCE_NUM_THREADS") for config in asked] == [None, 3]


def test_masked_slots_do_not_matter(bundle: Bundle, target: str) -> None:
    """Poison: what lies in a slot that is off reaches no output and no other slot."""
    off = [1, 4]
    tokens = np.random.default_rng(0).integers(0, 20, (6, 2, 8))
    roles = ("bank", "pending", "importance", "written", "cell")
    answers: list[tuple[list[Arrays], Arrays]] = []
    with open_bundle(bundle, target) as session:
        for poison in (0.0, 1e30, -1e30):
            state = bundle.state_init()
            for name, value in state.items():
                layer, _, role = name.rpartition(".")
                if role in roles:
                    value[:, off] = poison
                elif role == "mask":
                    assert value.all(), layer
                    value[:, off] = False
            session.load_state(state)
            outputs = [session.step(step) for step in tokens]
            after = session.read_state()
            for name in after:
                if name.rpartition(".")[2] in roles:
                    after[name] = np.delete(after[name], off, 1)
            answers.append((outputs, after))
        session.reset()
        whole = [session.step(step) for step in tokens]
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
        (onnxruntime_plain.load, ".onnx", "ONNX Runtime cannot open"),
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
    levels = []
    open_session = ort.InferenceSession

    def spy(path: str, options: Any, **kwargs: Any) -> Any:
        levels.append((options.graph_optimization_level.name, options.intra_op_num_threads))
        return open_session(path, options, **kwargs)

    monkeypatch.setattr(ort, "InferenceSession", spy)
    _load(bundle, "onnx", 1)
    _load(bundle, "onnxruntime", 2)
    assert levels == [("ORT_DISABLE_ALL", 1), ("ORT_ENABLE_ALL", 2)]


# -- TensorRT, on a device that is the memory of this process ------------------------------------------------------


class Status(enum.IntEnum):
    cudaSuccess = 0  # noqa: N815 (CUDA's names)
    cudaErrorMemoryAllocation = 2  # noqa: N815
    cudaErrorNoDevice = 100  # noqa: N815
    cudaErrorIllegalAddress = 700  # noqa: N815


class FakeCuda:
    """The part of the CUDA runtime that is used: device memory, one queue that runs when it is waited for."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="to device", cudaMemcpyDeviceToHost="to host")  # noqa: N815

    def __init__(self, devices: int = 1) -> None:
        self.devices = devices
        self.blocks: dict[int, Array] = {}
        self.streams: set[int] = set()
        self.queue: list[Callable[[], object]] = []
        self.fails: dict[str, Status] = {}

    def _status(self, name: str) -> Status:
        return self.fails.get(name, Status.cudaSuccess)

    def cudaGetDeviceCount(self) -> tuple[Status, int]:  # noqa: N802
        return self._status("cudaGetDeviceCount"), self.devices

    def cudaStreamCreate(self) -> tuple[Any, ...]:  # noqa: N802
        if status := self._status("cudaStreamCreate"):
            return (status, None)
        self.streams.add(77)
        return (Status.cudaSuccess, 77)

    def cudaStreamDestroy(self, stream: int) -> tuple[Status]:  # noqa: N802
        self.streams.remove(stream)
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Status]:  # noqa: N802
        assert stream in self.streams
        while self.queue:
            self.queue.pop(0)()
        return (self._status("cudaStreamSynchronize"),)

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:  # noqa: N802
        if status := self._status("cudaMalloc"):
            return (status, None)
        block = np.full(size, 0xAB, np.uint8)
        self.blocks[block.ctypes.data] = block
        return (Status.cudaSuccess, block.ctypes.data)

    def cudaFree(self, pointer: int) -> tuple[Status]:  # noqa: N802
        del self.blocks[pointer]
        return (Status.cudaSuccess,)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: str, stream: int) -> tuple[Status]:  # noqa: N802
        assert stream in self.streams
        if status := self._status("cudaMemcpyAsync"):
            return (status,)
        device = to if kind == "to device" else source
        assert self.blocks[device].nbytes >= size
        if kind == "to device":  # pageable memory is staged before the call returns
            staged = ctypes.string_at(source, size)
            self.queue.append(lambda: ctypes.memmove(to, staged, size))
        else:
            self.queue.append(lambda: ctypes.memmove(to, source, size))
        return (Status.cudaSuccess,)


class FakeTrt:
    """The part of TensorRT that is used; an engine is the recurrence of the fake runtime."""

    __version__ = "10.0"

    def __init__(self, cuda: FakeCuda, spec: StepSpec) -> None:
        self.cuda, self.spec = cuda, spec
        self.contexts: list[FakeContext] = []
        self.enqueues, self.creates_contexts = True, True
        self.Logger = _Logger
        self.Runtime = lambda logger: self

    def deserialize_cuda_engine(self, data: bytes) -> FakeTrt | None:
        return self if data == b"engine" else None

    def create_execution_context(self) -> FakeContext | None:
        if not self.creates_contexts:
            return None
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


class _Logger:
    ERROR = 1

    def __init__(self, level: int) -> None:
        self.level = level


class FakeContext:
    def __init__(self, trt: FakeTrt) -> None:
        self.trt = trt
        self.pointers: dict[str, int] = {}

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        assert pointer in self.trt.cuda.blocks
        self.pointers[name] = pointer
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if not self.trt.enqueues:
            return False
        assert stream in self.trt.cuda.streams
        self.trt.cuda.queue.append(self._run)
        return True

    def _run(self) -> None:
        spec, entry = self.trt.spec, self.trt.spec.entry("step")
        read = {s.name: self._memory(s.past, s) for s in spec.states}
        written = {s.name: self._memory(s.present, s) for s in spec.states}
        for array in written.values():
            array[...] = 0  # what an aliased input would lose
        inputs = {item.name: self._memory(item.name, item) for item in entry.inputs}
        outputs, state = fake_step(inputs["tokens"], inputs["valid"], read)
        self._memory("outputs", entry.outputs[0])[...] = outputs["outputs"]
        for name, array in written.items():
            array[...] = state[name]

    def _memory(self, name: str, spec: StateSpec | TensorSpec) -> Array:
        block = self.trt.cuda.blocks[self.pointers[name]]
        return block[: int(np.prod(spec.shape)) * spec.numpy_dtype.itemsize].view(spec.numpy_dtype).reshape(spec.shape)


class Gpu:
    """Fakes, an engine file, and the session over them."""

    def __init__(self, directory: Path, batch: int = 2) -> None:
        self.spec = fake_spec(batch)
        self.cuda = FakeCuda()
        self.trt = FakeTrt(self.cuda, self.spec)
        self.engine = directory / "step.engine"
        self.engine.write_bytes(b"engine")

    def runtime(self) -> TensorRt:
        return TensorRt(self.trt, self.cuda, {"step": self.engine}, self.spec, "sm86")

    def session(self) -> Session:
        return Session(self.runtime(), self.spec, fake_initial(self.spec), FINGERPRINT, "tensorrt")


@pytest.fixture
def gpu(tmp_path: Path) -> Gpu:
    return Gpu(tmp_path)


def test_tensorrt_steps_resets_and_resumes_like_the_model(gpu: Gpu) -> None:
    session, honest = gpu.session(), fake_session()
    tokens = np.random.default_rng(0).integers(0, 11, (7, 2, CHUNK))
    kept = []
    for both in (session, honest):
        answers = [both.step(step) for step in tokens[:3]]
        snapshot = both.snapshot(0)
        both.reset(1)
        answers += [both.step(tokens[3], [CHUNK, 0]), both.read_state()]
        both.restore(snapshot, 1)
        answers += [both.step(step) for step in tokens[4:]]
        answers.append(both.read_state())
        both.reset()
        answers += [both.step(tokens[0]), both.read_state()]
        kept.append(answers)
    for given, wanted in zip(*kept, strict=True):
        assert_same(given, wanted)


def test_tensorrt_passes_the_comparison(gpu: Gpu) -> None:
    with gpu.session() as session:
        compare(fake_trace(steps=16), session, find_budget("fp32")).require()


def test_tensorrt_swaps_two_sets_of_buffers(gpu: Gpu) -> None:
    gpu.session()
    there, back = gpu.trt.contexts
    for state in gpu.spec.states:
        assert there.pointers[state.past] == back.pointers[state.present]
        assert there.pointers[state.present] == back.pointers[state.past]
        assert there.pointers[state.past] != there.pointers[state.present]
    for item in (*gpu.spec.entry("step").inputs, *gpu.spec.entry("step").outputs):
        assert there.pointers[item.name] == back.pointers[item.name]
    assert set(there.pointers.values()) == set(gpu.cuda.blocks)


def test_tensorrt_gives_copies_and_refuses_a_consumed_state(gpu: Gpu) -> None:
    runtime = gpu.runtime()
    inputs = {"tokens": np.ones((2, CHUNK), np.int64), "valid": np.full(2, CHUNK)}
    first = runtime.load_state(fake_initial(gpu.spec))
    outputs, second = runtime.call("step", inputs, first)
    kept = outputs["outputs"].copy()
    with pytest.raises(StreamError, match="consumed"):
        runtime.call("step", inputs, first)
    with pytest.raises(StreamError, match="consumed"):
        runtime.read_state(first)
    runtime.call("step", {**inputs, "tokens": inputs["tokens"] + 1}, second)
    np.testing.assert_array_equal(outputs["outputs"], kept)


def test_tensorrt_takes_states_in_any_layout(gpu: Gpu) -> None:
    initial = fake_initial(gpu.spec)
    initial["0.bank"] = np.asfortranarray(initial["0.bank"].astype(np.float64))
    runtime = gpu.runtime()
    assert_same(runtime.read_state(runtime.load_state(initial)), fake_initial(gpu.spec))


def test_tensorrt_frees_what_it_holds(gpu: Gpu) -> None:
    session = gpu.session()
    assert gpu.cuda.blocks
    session.close()
    session.close()
    assert not gpu.cuda.blocks
    assert not gpu.cuda.streams


def test_an_engine_for_another_gpu_is_unavailable_and_leaves_nothing_allocated(gpu: Gpu) -> None:
    gpu.engine.write_bytes(b"engine of another GPU")
    with pytest.raises(
        DeviceUnavailableError, match=r"TensorRT 10\.0 cannot load step\.engine, built for sm86.*nsm build"
    ):
        gpu.runtime()
    assert not gpu.cuda.blocks
    assert not gpu.cuda.streams


def test_an_engine_that_cannot_be_enqueued_fails_the_call_and_keeps_the_state(gpu: Gpu) -> None:
    session, tokens = gpu.session(), np.ones((2, CHUNK), int)
    session.step(tokens)
    before = session.read_state()
    gpu.trt.enqueues = False
    with pytest.raises(RunError, match="could not enqueue the engine"):
        session.step(tokens)
    gpu.trt.enqueues = True
    assert_same(session.read_state(), before)
    session.step(tokens)


def test_an_engine_without_room_for_a_context_fails_with_a_message(gpu: Gpu) -> None:
    gpu.trt.creates_contexts = False
    with pytest.raises(BuildError, match="context"):
        gpu.runtime()
    assert not gpu.cuda.blocks


@pytest.mark.parametrize(
    ("call", "status"),
    [
        ("cudaStreamCreate", Status.cudaErrorMemoryAllocation),
        ("cudaMalloc", Status.cudaErrorMemoryAllocation),
        ("cudaMemcpyAsync", Status.cudaErrorIllegalAddress),
        ("cudaStreamSynchronize", Status.cudaErrorIllegalAddress),
    ],
)
def test_errors_of_cuda_are_named(gpu: Gpu, call: str, status: Status) -> None:
    gpu.cuda.fails[call] = status
    with pytest.raises(RunError, match=rf"CUDA failed: {status.name}\."):
        gpu.session()


@pytest.mark.parametrize("allocations", [0, 1, 7, 12])
def test_a_device_that_runs_out_of_memory_leaves_nothing_allocated(gpu: Gpu, allocations: int) -> None:
    gpu.runtime().close()
    malloc = gpu.cuda.cudaMalloc

    def limited(size: int) -> tuple[Any, ...]:
        return malloc(size) if len(gpu.cuda.blocks) < allocations else (Status.cudaErrorMemoryAllocation, None)

    gpu.cuda.cudaMalloc = limited  # type: ignore[method-assign]
    with pytest.raises(RunError, match="cudaErrorMemoryAllocation"):
        gpu.runtime()
    assert not gpu.cuda.blocks
    assert not gpu.cuda.streams


@pytest.mark.parametrize(("value", "finite"), [(np.nan, False), (np.inf, False), (3e38, True)])
def test_tensorrt_sees_a_number_that_is_not_finite(gpu: Gpu, value: float, finite: bool) -> None:
    runtime, arrays = gpu.runtime(), fake_initial(gpu.spec)
    assert runtime.finite(runtime.load_state(arrays))
    arrays["0.written"][1, 0] = value
    assert runtime.finite(runtime.load_state(arrays)) == finite


def _install(monkeypatch: pytest.MonkeyPatch, cuda: object, package: object) -> None:
    """Let `tensorrt_rtx` and the CUDA bindings be these objects; None is a package that is not there."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "tensorrt_rtx" else None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)


def test_load_takes_the_package_that_is_installed(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, gpu.cuda, gpu.trt)
    runtime = tensorrt.load({"step": gpu.engine}, gpu.spec, "sm86", None)
    assert runtime.effective_precision == "fp32"
    assert_same(runtime.read_state(runtime.load_state(fake_initial(gpu.spec))), fake_initial(gpu.spec))


def test_load_needs_the_cuda_bindings(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, None, gpu.trt)
    with pytest.raises(
        MissingDependencyError, match=r'needs the package cuda-\w+.*pip install "nsm-toolkit\[tensorrt\]"'
    ):
        tensorrt.load({"step": gpu.engine}, gpu.spec, "sm86", None)


@pytest.mark.parametrize("status", [Status.cudaSuccess, Status.cudaErrorNoDevice])
def test_load_needs_a_gpu(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, status: Status) -> None:
    gpu.cuda.devices = 0
    gpu.cuda.fails["cudaGetDeviceCount"] = status
    _install(monkeypatch, gpu.cuda, gpu.trt)
    with pytest.raises(DeviceUnavailableError, match=rf"no usable NVIDIA GPU in this machine \({status.name}\)"):
        tensorrt.load({"step": gpu.engine}, gpu.spec, "sm86", None)


def test_load_needs_tensorrt(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="needs the package tensorrt or tensorrt_rtx"):
        tensorrt.load({"step": gpu.engine}, gpu.spec, "sm86", None)
