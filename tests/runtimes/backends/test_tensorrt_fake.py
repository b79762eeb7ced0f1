"""TensorRT, on a device that is the memory of this process."""

from __future__ import annotations

import ctypes
import enum
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nsm.errors import (
    BuildError,
    DeviceUnavailableError,
    MissingDependencyError,
    RunError,
    StreamError,
    UnsupportedError,
)
from nsm.runtimes.backends import tensorrt
from nsm.runtimes.backends.tensorrt import TensorRt
from nsm.runtimes.parity.budgets import find_budget
from nsm.runtimes.parity.comparison import compare
from nsm.runtimes.session.session import Session
from nsm.spec import StateSpec, StepSpec, TensorSpec
from nsm.trace import Array
from tests.runtimes.fake import (
    CHUNK,
    FINGERPRINT,
    assert_same,
    fake_initial,
    fake_run,
    fake_session,
    fake_spec,
    fake_trace,
)


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
        return (self._status("cudaStreamDestroy"),)

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
        return (self._status("cudaFree"),)

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
        self.contexts: dict[str, FakeContext] = {}
        self.enqueues, self.creates_contexts = True, True
        self.Logger = _Logger
        self.Runtime = lambda logger: self

    def deserialize_cuda_engine(self, data: bytes) -> FakeEngine | None:
        kind, _, entry = data.decode().partition(" for ")
        return FakeEngine(self, entry) if kind == "engine" else None


class FakeEngine:
    def __init__(self, trt: FakeTrt, entry: str) -> None:
        self.trt, self.entry = trt, entry

    def create_execution_context(self) -> FakeContext | None:
        if not self.trt.creates_contexts:
            return None
        self.trt.contexts[self.entry] = FakeContext(self.trt, self.entry)
        return self.trt.contexts[self.entry]


class _Logger:
    ERROR = 1

    def __init__(self, level: int) -> None:
        self.level = level


class FakeContext:
    """Runs an entry on the memory that its tensors were given, and knows no other tensors than the entry's."""

    def __init__(self, trt: FakeTrt, entry: str) -> None:
        self.trt, self.entry = trt, trt.spec.entry(entry)
        self.reads, self.writes = (trt.spec.states_of(names) for names in (self.entry.reads, self.entry.writes))
        self.tensors = {item.name for item in (*self.entry.inputs, *self.entry.outputs)}
        self.tensors |= {state.past for state in self.reads} | {state.present for state in self.writes}
        self.pointers: dict[str, int] = {}

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        assert pointer in self.trt.cuda.blocks
        if name not in self.tensors:
            return False
        self.pointers[name] = pointer
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if not self.trt.enqueues:
            return False
        assert stream in self.trt.cuda.streams
        assert set(self.pointers) == self.tensors
        self.trt.cuda.queue.append(self._run)
        return True

    def _run(self) -> None:
        read = {state.name: self._memory(state.past, state) for state in self.reads}
        written = {state.name: self._memory(state.present, state) for state in self.writes}
        for array in written.values():
            array[...] = 0  # what an aliased input would lose
        inputs = {item.name: self._memory(item.name, item) for item in self.entry.inputs}
        unread = {name: value for name, value in fake_initial(self.trt.spec).items() if name not in read}
        outputs, state = fake_run(self.entry.name, inputs, {**unread, **read})
        for item in self.entry.outputs:
            self._memory(item.name, item)[...] = outputs[item.name]
        for name, array in written.items():
            array[...] = state[name]

    def _memory(self, name: str, spec: StateSpec | TensorSpec) -> Array:
        block = self.trt.cuda.blocks[self.pointers[name]]
        return block[: int(np.prod(spec.shape)) * spec.numpy_dtype.itemsize].view(spec.numpy_dtype).reshape(spec.shape)


class Gpu:
    """Fakes, engine files, and the session over them."""

    def __init__(self, directory: Path, spec: StepSpec | None = None) -> None:
        self.spec = fake_spec() if spec is None else spec
        self.cuda = FakeCuda()
        self.trt = FakeTrt(self.cuda, self.spec)
        self.files = {entry.name: directory / f"{entry.name}.engine" for entry in self.spec.entries}
        for name, path in self.files.items():
            path.write_text(f"engine for {name}")

    def runtime(self) -> TensorRt:
        return TensorRt(self.trt, self.cuda, self.files, self.spec, "sm86")

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
        answers += [both.feed(step[:, :3]) for step in tokens[4:]]
        both.reset(0)
        answers += [both.decode(step[:, :1]) for step in tokens]
        answers.append(both.read_state())
        both.reset()
        answers += [both.step(tokens[0]), both.read_state()]
        kept.append(answers)
    for given, wanted in zip(*kept, strict=True):
        assert_same(given, wanted)


def test_tensorrt_passes_the_comparison(gpu: Gpu) -> None:
    with gpu.session() as session:
        compare(fake_trace(steps=16), session, find_budget("fp32")).require()


def test_tensorrt_passes_the_states_of_each_entry_where_they_lie(gpu: Gpu) -> None:
    session = gpu.session()
    buffers: dict[str, set[int]] = {state.name: set() for state in gpu.spec.states}
    now: dict[str, int] = {}
    tokens = np.zeros((2, CHUNK), int)

    def check(entry: str) -> None:
        context = gpu.trt.contexts[entry]
        for state in context.reads:
            pointer = context.pointers[state.past]
            assert now.setdefault(state.name, pointer) == pointer, f"{entry} reads {state.name} as it was left"
            buffers[state.name].add(pointer)
        for state in context.writes:
            pointer = context.pointers[state.present]
            assert pointer != now[state.name]
            buffers[state.name].add(pointer)
            now[state.name] = pointer

    for _ in range(2):
        session.step(tokens)
        check("step")
        for index in range(CHUNK):
            session.decode(tokens[:, index : index + 1])
            check("decode")
        check("commit")
        session.decode(tokens[:, :1])
        check("decode")
        session.reset()
        now.clear()
    assert all(len(found) == 2 for name, found in buffers.items() if name != "0.mask")
    assert len(buffers["0.mask"]) == 1, "nothing writes it"
    held = [pointer for found in buffers.values() for pointer in found]
    assert len(set(held)) == len(held)


def test_an_engine_that_lacks_a_tensor_is_a_build_error(gpu: Gpu) -> None:
    gpu.files["decode"].write_text("engine for commit")
    with pytest.raises(BuildError, match=r"The engine of decode has no tensor tokens\. Build it again"):
        gpu.runtime()
    assert not gpu.cuda.blocks
    assert not gpu.cuda.streams


def test_tensorrt_says_that_it_does_not_append(tmp_path: Path) -> None:
    gpu = Gpu(tmp_path, fake_spec(ring=True))
    with pytest.raises(UnsupportedError, match="does not support appended states"):
        gpu.runtime()
    assert not gpu.cuda.blocks
    assert not gpu.cuda.streams


def test_a_closed_session_on_tensorrt_says_so(gpu: Gpu) -> None:
    session = gpu.session()
    session.step(np.zeros((2, CHUNK), int))
    session.close()
    with pytest.raises(StreamError, match="The session is closed"):
        session.step(np.zeros((2, CHUNK), int))
    with pytest.raises(StreamError, match="The session is closed"):
        session.read_state()
    with pytest.raises(StreamError, match="The session is closed"):
        session.reset()


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


@pytest.mark.parametrize("first", ["cudaFree", "cudaStreamDestroy"])
def test_tensorrt_frees_the_rest_where_a_part_cannot_be_freed(gpu: Gpu, first: str) -> None:
    """CUDA also reports there what an earlier, asynchronous call ran into."""
    session = gpu.session()
    gpu.cuda.fails |= {"cudaStreamDestroy": Status.cudaErrorMemoryAllocation, first: Status.cudaErrorIllegalAddress}
    with pytest.raises(RunError, match=r"CUDA failed: cudaErrorIllegalAddress\."):
        session.close()
    assert not gpu.cuda.blocks
    assert not gpu.cuda.streams
    session.close()
    with pytest.raises(StreamError, match="The session is closed"):
        session.read_state()


def test_what_could_not_be_opened_is_told_before_what_could_not_be_freed_then(gpu: Gpu) -> None:
    gpu.files["decode"].write_text("engine for commit")
    gpu.cuda.fails["cudaFree"] = Status.cudaErrorIllegalAddress
    with pytest.raises(BuildError, match="The engine of decode has no tensor tokens"):
        gpu.runtime()
    assert not gpu.cuda.blocks
    assert not gpu.cuda.streams


def test_an_engine_for_another_gpu_is_unavailable_and_leaves_nothing_allocated(gpu: Gpu) -> None:
    gpu.files["step"].write_text("another engine for step")
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


@pytest.mark.parametrize("allocations", [0, 1, 7, 15])
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
    runtime = tensorrt.load(gpu.files, gpu.spec, "sm86", None)
    assert runtime.effective_precision == "fp32"
    assert_same(runtime.read_state(runtime.load_state(fake_initial(gpu.spec))), fake_initial(gpu.spec))


def test_load_needs_the_cuda_bindings(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, None, gpu.trt)
    with pytest.raises(
        MissingDependencyError, match=r'needs the package cuda-\w+.*pip install "nsm-toolkit\[tensorrt\]"'
    ):
        tensorrt.load(gpu.files, gpu.spec, "sm86", None)


@pytest.mark.parametrize("status", [Status.cudaSuccess, Status.cudaErrorNoDevice])
def test_load_needs_a_gpu(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, status: Status) -> None:
    gpu.cuda.devices = 0
    gpu.cuda.fails["cudaGetDeviceCount"] = status
    _install(monkeypatch, gpu.cuda, gpu.trt)
    with pytest.raises(DeviceUnavailableError, match=rf"no usable NVIDIA GPU in this machine \({status.name}\)"):
        tensorrt.load(gpu.files, gpu.spec, "sm86", None)


def test_load_needs_tensorrt(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="needs the package tensorrt or tensorrt_rtx"):
        tensorrt.load(gpu.files, gpu.spec, "sm86", None)
