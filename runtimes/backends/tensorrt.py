"""TensorRT (or TensorRT for RTX) on an NVIDIA GPU: state in two sets of device buffers, written in turn."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nsm.errors import (
    BuildError,
    DeviceUnavailableError,
    MissingDependencyError,
    RunError,
    UnsupportedError,
)
from nsm.runtimes.base import CheckedRuntime, Runtime, Sides, State
from nsm.runtimes.targets import find_target
from nsm.spec import StateSpec, StepSpec, TensorSpec
from nsm.trace import Array, Arrays


def load(
    files: Mapping[str, Path],
    spec: StepSpec,
    device: str,
    threads: int | None,  # noqa: ARG001
    precision: str = "fp32",
) -> Runtime:
    """Deserialise the engines of a bundle on the current GPU.

    Args:
        files: the `.engine` file of each entry.
        spec: spec of the model.
        device: device of the engine; TensorRT refuses an engine for another GPU.
        threads: ignored on a GPU.
        precision: precision of the artifact; the engines are strongly typed and built without TF32, so they compute in
            it.

    Raises:
        DeviceUnavailableError: no usable GPU in this machine, or the engine was built for another one.
        MissingDependencyError: the CUDA bindings are not installed.
    """
    package = find_target("tensorrt").require()
    try:
        cuda: Any = importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise MissingDependencyError(
            "Running a TensorRT engine needs the package cuda-bindings. "
            'Install it with: pip install "nsm-toolkit[tensorrt]"'
        ) from error
    status, count = cuda.cudaGetDeviceCount()
    if int(status) != 0 or count == 0:
        raise DeviceUnavailableError(
            f"There is no usable NVIDIA GPU in this machine ({status.name}), so the engine was not run here."
        )
    return TensorRt(importlib.import_module(package), cuda, files, spec, device, precision)


class TensorRt(CheckedRuntime):
    """A runtime over TensorRT execution contexts on one CUDA stream.

    The state stays on the device between calls; a step uploads its inputs and downloads its outputs.
    """

    def __init__(
        self,
        trt: Any,
        cuda: Any,
        files: Mapping[str, Path],
        spec: StepSpec,
        device: str,
        precision: str = "fp32",
    ) -> None:
        self._sides = Sides(spec)
        super().__init__(self._sides)
        self.effective_precision = precision  # as in the graph: strongly typed, without TF32
        self._cuda = cuda
        self._spec = spec
        self._pointers: list[int] = []
        self._answered: tuple[Array, ...] = ()
        self._entries: dict[str, tuple[Arrays, Arrays, dict[str, int], Any]] = {}
        self._stream = self._value(cuda.cudaStreamCreate())
        try:
            if any(state.append_axis is not None for state in spec.states):
                raise UnsupportedError("tensorrt does not support appended states yet. Build for another target.")
            self._buffers = {state.name: (self._allocate(state), self._allocate(state)) for state in spec.states}
            self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
            for name, path in files.items():
                engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
                if engine is None:
                    raise DeviceUnavailableError(
                        f"TensorRT {trt.__version__} cannot load {path.name}, built for {device}, on this GPU. "
                        f"Build it here: nsm build BUNDLE --target tensorrt --precision {precision} --force"
                    )
                self._entries[name] = self._bind(engine, name)
        except BaseException:
            with contextlib.suppress(RunError):  # the first error is the useful one
                self.close()
            raise

    def load_state(self, arrays: Mapping[str, Array]) -> State:
        self._check_open()
        self._sides.consume()
        for spec in self._spec.states:
            self._upload(self._buffers[spec.name][0], np.ascontiguousarray(arrays[spec.name], spec.numpy_dtype))
        self._synchronize()
        self._answered = ()
        return self._sides.reset()

    def call(self, entry: str, inputs: Mapping[str, Array], state: State) -> tuple[Arrays, State]:
        self._check(state)
        host_in, host_out, pointers, context = self._entries[entry]
        for name, buffer in host_in.items():
            np.copyto(buffer, inputs[name])
            self._upload(pointers[name], buffer)
        spec = self._spec.entry(entry)
        for item in self._spec.states_of(spec.reads):
            context.set_tensor_address(item.past, self._buffers[item.name][self._sides[item.name]])
        for item in self._spec.states_of(spec.writes):
            context.set_tensor_address(item.present, self._buffers[item.name][1 - self._sides[item.name]])
        if not context.execute_async_v3(int(self._stream)):
            raise RunError("TensorRT could not enqueue the engine; its log has the reason.")
        for name, buffer in host_out.items():
            self._download(buffer, pointers[name])
        self._synchronize()
        self._answered = tuple(host_out.values())
        return {name: buffer.copy() for name, buffer in host_out.items()}, self._sides.flip(entry, state)

    def read_state(self, state: State) -> Arrays:
        self._check(state)
        arrays = {spec.name: np.empty(spec.shape, spec.numpy_dtype) for spec in self._spec.states}
        for name, array in arrays.items():
            self._download(array, self._buffers[name][self._sides[name]])
        self._synchronize()
        return arrays

    def finite(self, state: State) -> bool:
        arrays = [*self.read_state(state).values(), *self._answered]
        return all(np.isfinite(array).all() for array in arrays if array.dtype.kind == "f")

    def close(self) -> None:
        """Free all memory even if CUDA fails on a part, then raise the first error."""
        self._open = False
        self._entries.clear()
        freed = []
        while self._pointers:
            freed.append(self._cuda.cudaFree(self._pointers.pop()))
        if self._stream is not None:
            stream, self._stream = self._stream, None
            freed.append(self._cuda.cudaStreamDestroy(stream))
        for result in freed:
            self._value(result)

    def _bind(self, engine: Any, name: str) -> tuple[Arrays, Arrays, dict[str, int], Any]:
        """Host buffers, device pointers and the context of an entry; each call binds the states."""
        entry = self._spec.entry(name)
        host_in = {item.name: np.zeros(item.shape, item.numpy_dtype) for item in entry.inputs}
        host_out = {item.name: np.zeros(item.shape, item.numpy_dtype) for item in entry.outputs}
        pointers = {item.name: self._allocate(item) for item in (*entry.inputs, *entry.outputs)}
        context = engine.create_execution_context()
        if context is None:
            raise BuildError(f"TensorRT could not make an execution context for {name}: too little GPU memory?")
        bound = dict(pointers)
        bound |= {item.past: self._buffers[item.name][0] for item in self._spec.states_of(entry.reads)}
        bound |= {item.present: self._buffers[item.name][1] for item in self._spec.states_of(entry.writes)}
        for tensor, pointer in bound.items():
            if not context.set_tensor_address(tensor, pointer):
                raise BuildError(f"The engine of {name} has no tensor {tensor}. Build it again.")
        return host_in, host_out, pointers, context

    def _allocate(self, spec: TensorSpec | StateSpec) -> int:
        size = max(int(np.prod(spec.shape)) * spec.numpy_dtype.itemsize, 1)
        pointer = int(self._value(self._cuda.cudaMalloc(size)))
        self._pointers.append(pointer)
        return pointer

    def _upload(self, pointer: int, array: Array) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._value(self._cuda.cudaMemcpyAsync(pointer, array.ctypes.data, array.nbytes, kind, self._stream))

    def _download(self, array: Array, pointer: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._value(self._cuda.cudaMemcpyAsync(array.ctypes.data, pointer, array.nbytes, kind, self._stream))

    def _synchronize(self) -> None:
        self._value(self._cuda.cudaStreamSynchronize(self._stream))

    def _value(self, result: tuple[Any, ...]) -> Any:
        status, *values = result
        if int(status) != 0:
            raise RunError(f"CUDA failed: {status.name}.")
        return values[0] if values else None
