"""ONNX Runtime on an NVIDIA GPU: the state stays in device memory, and a call replays a captured CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from nsm.errors import BuildError, DeviceUnavailableError, RunError, UnsupportedError
from nsm.runtimes.backends.onnxruntime import SLOWER_ON_CPU, graph_precision, open_graph
from nsm.runtimes.base import CheckedRuntime, Runtime, Sides, State, Watched, all_finite
from nsm.spec import EntrySpec, StateSpec, StepSpec, TensorSpec
from nsm.trace import Array, Arrays

PROVIDER = "CUDAExecutionProvider"


def load(
    files: Mapping[str, Path],
    spec: StepSpec,
    device: str,
    threads: int | None,
    precision: str = "fp32",
) -> Runtime:
    """Open the graphs of a bundle on the first GPU.

    Args:
        files: the `.onnx` file of each entry.
        spec: spec of the model.
        device: "cuda", the only device of this target.
        threads: CPU threads for the few shape operations that stay on the CPU.
        precision: precision of the artifact.

    Raises:
        DeviceUnavailableError: no usable GPU, or ONNX Runtime was built without CUDA.
        BuildError: ONNX Runtime refuses a file.
    """
    if PROVIDER not in ort.get_available_providers():
        raise DeviceUnavailableError(
            f"The installed ONNX Runtime ({ort.__version__}, {', '.join(ort.get_available_providers())}) "
            'has no CUDA. Replace it: pip uninstall onnxruntime, then pip install "nsm-toolkit[gpu]"'
        )
    return OnCuda(files, spec, device, threads, precision)


class OnCuda(CheckedRuntime):
    """A runtime over sessions with inputs, outputs and states bound to device memory.

    Every state has two buffers, written in turn. Each assignment of the states to their buffers has its own binding and
    its own CUDA graph. While it captures a graph, ONNX Runtime runs the model several times (its issue 32243): a state
    that is updated in place would then be several steps ahead. Here, inputs and outputs are separate buffers, so all
    those runs give the same result.

    Args:
        files: the `.onnx` file of each entry.
        spec: spec of the model.
        device: device of the memory: "cuda"; "cpu" runs the same code without a GPU, for tests.
        threads: threads of the CPU operations.
        precision: precision of the artifact.
    """

    def __init__(
        self, files: Mapping[str, Path], spec: StepSpec, device: str, threads: int | None, precision: str = "fp32"
    ) -> None:
        if any(state.append_axis is not None for state in spec.states):
            raise UnsupportedError("onnxruntime-cuda does not support appended states yet. Build for another target.")
        self._files, self._spec, self._device, self._threads = dict(files), spec, device, threads
        self._watched = Watched(*{path.parent for path in files.values()})
        self._sides = Sides(spec)
        super().__init__(self._sides)
        first = next(iter(files))
        session, captures = _session(
            files[first], device, threads
        )  # opened before allocating memory on a device that may be missing
        self.effective_precision = graph_precision(session, files[first], precision)
        self._buffers = {state.name: (self._memory(state), self._memory(state)) for state in spec.states}
        self._entries = {first: self._entry(first, session, captures)}
        self._written: list[ort.OrtValue] = []
        self._answered: list[Array] = []

    def load_state(self, arrays: Mapping[str, Array]) -> State:
        self._check_open()
        self._sides.consume()
        for spec in self._spec.states:
            self._buffers[spec.name][0].update_inplace(np.ascontiguousarray(arrays[spec.name], spec.numpy_dtype))
        self._written = [self._buffers[spec.name][0] for spec in self._spec.states if spec.numpy_dtype.kind == "f"]
        self._answered = []
        return self._sides.reset()

    def call(self, entry: str, inputs: Mapping[str, Array], state: State) -> tuple[Arrays, State]:
        self._check(state)
        found = self._entries.get(entry) or self._opened(entry)
        try:
            outputs = found.run(inputs, self._sides)
        except Exception as error:  # the backend's errors have no common base
            raise RunError(f"ONNX Runtime failed while it ran {entry} on {self._device}: {error}") from error
        handle = self._sides.flip(entry, state)
        self._written = [self._buffers[name][self._sides[name]] for name in found.written]
        self._answered = [array.reshape(-1) for array in outputs.values() if array.dtype.kind == "f"]
        return outputs, handle

    def read_state(self, state: State) -> Arrays:
        self._check(state)
        return {name: np.array(pair[self._sides[name]].numpy()) for name, pair in self._buffers.items()}

    def finite(self, state: State) -> bool:
        """See `Runtime.finite`; downloads the written states."""
        self._check(state)
        return all_finite([*self._answered, *(value.numpy().reshape(-1) for value in self._written)])

    def close(self) -> None:
        self._open = False
        self._entries.clear()
        self._buffers.clear()
        self._files.clear()
        self._written = []

    def _opened(self, name: str) -> _Entry:
        self._watched.check()
        self._entries[name] = self._entry(name, *_session(self._files[name], self._device, self._threads))
        return self._entries[name]

    def _entry(self, name: str, session: ort.InferenceSession, captures: bool) -> _Entry:
        entry = self._spec.entry(name)
        inputs = {item.name: self._memory(item) for item in entry.inputs}
        outputs = {item.name: self._memory(item) for item in entry.outputs}
        return _Entry(session, captures, entry, self._spec, self._buffers, inputs, outputs, self._sides)

    def _memory(self, spec: TensorSpec | StateSpec) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_shape_and_type(list(spec.shape), spec.numpy_dtype.type, self._device, 0)


class _Entry:
    """One graph, bound to the buffers that hold the states at the time of the call."""

    def __init__(
        self,
        session: ort.InferenceSession,
        captures: bool,
        entry: EntrySpec,
        spec: StepSpec,
        buffers: Mapping[str, tuple[ort.OrtValue, ort.OrtValue]],
        inputs: Mapping[str, ort.OrtValue],
        outputs: Mapping[str, ort.OrtValue],
        sides: Sides,
    ) -> None:
        self._session = session
        self.written = [state.name for state in spec.states_of(entry.writes) if state.numpy_dtype.kind == "f"]
        self._captures = captures
        self._inputs, self._outputs, self._buffers = inputs, outputs, buffers
        self._reads, self._writes = spec.states_of(entry.reads), spec.states_of(entry.writes)
        self._touched = sides.mask({*entry.reads, *entry.writes})
        self._bound: dict[int, tuple[Any, ort.RunOptions]] = {}

    def run(self, inputs: Mapping[str, Array], sides: Sides) -> Arrays:
        for name, value in self._inputs.items():
            value.update_inplace(np.ascontiguousarray(inputs[name]))
        key = sides.bits & self._touched
        if key not in self._bound:
            self._bound[key] = self._bind(sides)
        binding, options = self._bound[key]
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding, options)
        binding.synchronize_outputs()
        return {name: np.array(value.numpy()) for name, value in self._outputs.items()}

    def _bind(self, sides: Sides) -> tuple[Any, ort.RunOptions]:
        binding = self._session.io_binding()
        for name, value in self._inputs.items():
            binding.bind_ortvalue_input(name, value)
        for state in self._reads:
            binding.bind_ortvalue_input(state.past, self._buffers[state.name][sides[state.name]])
        for name, value in self._outputs.items():
            binding.bind_ortvalue_output(name, value)
        for state in self._writes:
            binding.bind_ortvalue_output(state.present, self._buffers[state.name][1 - sides[state.name]])
        options = ort.RunOptions()
        if self._captures:
            options.add_run_config_entry("gpu_graph_id", str(len(self._bound) + 1))
        return binding, options


def _session(path: Path, device: str, threads: int | None) -> tuple[ort.InferenceSession, bool]:
    """Open a graph; also return whether its calls are captured, which needs all operations on CUDA."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # a refused capture is not an error: run without it
    if threads is not None:
        options.intra_op_num_threads = threads
    if device == "cpu":
        return open_graph(path, options, without=SLOWER_ON_CPU), False
    plain = {"device_id": "0", "use_tf32": "0"}  # TF32 is on by default, and less precise than fp32
    try:
        session, captures = open_graph(path, options, [(PROVIDER, {**plain, "enable_cuda_graph": "1"})]), True
    except BuildError:
        session, captures = open_graph(path, options, [(PROVIDER, plain), "CPUExecutionProvider"]), False
    if PROVIDER not in session.get_providers():
        raise DeviceUnavailableError(
            "ONNX Runtime could not start CUDA on this machine, so the graphs were not run. Is there an NVIDIA "
            "GPU with its driver, and the CUDA and cuDNN that this ONNX Runtime was built for? `nsm doctor` shows the "
            "GPU."
        )
    return session, captures
