"""A model in PyTorch, eager or compiled, as a stream that can be measured beside sessions. Needs torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from nsm.bundle import Bundle
from nsm.errors import InputError, UnsupportedError
from nsm.models.checkpoint import load_checkpoint
from nsm.models.step import State, StepModel
from nsm.spec import StepSpec
from nsm.trace import Array, Arrays

_Call = Callable[[dict[str, torch.Tensor], State], tuple[dict[str, torch.Tensor], State]]


class TorchStream:
    """Streams through `StepModel.call` in inference mode; arrays in and out, like a `Session`.

    Args:
        model: in eval mode, on the CPU.
        spec: of the model, with the lanes and tokens a call that are wanted.
        compiled: whether the entries go through torch.compile, which works at their first calls.
    """

    def __init__(self, model: StepModel, spec: StepSpec, compiled: bool = False) -> None:
        self.spec = spec
        self._model = model
        self._calls = {entry.name: _call_of(model, entry.name, compiled) for entry in spec.entries}
        self.reset()

    def reset(self) -> None:
        """Start all lanes afresh."""
        with torch.inference_mode():
            self._state = _dense(self._model.initial_state(self.spec.batch))
        self._decoded = 0

    def step(self, tokens: Array) -> Arrays:
        """Take tokens [B, K, ...], all of which count: the outputs by name, [B, K, ...]."""
        return self._run("step", {"tokens": torch.from_numpy(tokens)})

    def decode(self, tokens: Array) -> Arrays:
        """Take one token a lane [B, 1, ...], and commit the chunk when it is full: the outputs by name, [B, 1, ...]."""
        outputs = self._run("decode", {"tokens": torch.from_numpy(tokens)})
        self._decoded += 1
        if "commit" in self._calls and self._decoded % self.spec.chunk_size == 0:
            self._run("commit", {})
        return outputs

    def _run(self, entry: str, inputs: dict[str, torch.Tensor]) -> Arrays:
        with torch.inference_mode():
            outputs, self._state = self._calls[entry](inputs, self._state)
        return {name: value.numpy() for name, value in outputs.items()}


def compiled_stream(model: StepModel, spec: StepSpec, tokens: Array) -> TorchStream:
    """A `TorchStream` through torch.compile, all of whose entries are compiled.

    Args:
        model: in eval mode, on the CPU.
        spec: of the model.
        tokens: [T, B, K, ...], real inputs to compile with.

    Raises:
        UnsupportedError: torch.compile failed, for instance because there is no C++ compiler, or it could compile
            the model in parts only.
    """
    try:
        stream = TorchStream(model, spec, compiled=True)
        for index in range(2):
            stream.step(tokens[index % len(tokens)])
        if spec.has("decode"):
            stream.reset()
            single = np.ascontiguousarray(tokens[0][:, :1])
            for _ in range(spec.chunk_size + 1):
                stream.decode(single)
    except Exception as error:  # whatever the compiler's many parts raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UnsupportedError(
            f"torch.compile cannot compile this model here ({type(error).__name__}: {' '.join(lines[:2])}). "
            "It needs a C++ compiler (g++), and a model it takes as a whole. PyTorch as it is: --against eager"
        ) from error
    stream.reset()
    return stream


def load_matching(path: Path, bundle: Bundle) -> StepModel:
    """The model of a checkpoint, if it is the one that the bundle was made from.

    Raises:
        CheckpointError: see `load_checkpoint`.
        InputError: it is another model.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.fingerprint != bundle.manifest.fingerprint:
        raise InputError(
            f"{path} is not the model in {bundle.path}: its fingerprint is {checkpoint.fingerprint[:12]}, the bundle's "
            f"{bundle.manifest.fingerprint[:12]}. Give the checkpoint that the bundle was exported from, or export "
            "this one (without --compact, which makes another model)."
        )
    return checkpoint.model


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch use so many threads while the block runs (default: its own choice)."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _call_of(model: StepModel, entry: str, compiled: bool) -> _Call:
    def call(inputs: dict[str, torch.Tensor], state: State) -> tuple[dict[str, torch.Tensor], State]:
        return model.call(entry, inputs, state)

    def dense(inputs: dict[str, torch.Tensor], state: State) -> tuple[dict[str, torch.Tensor], State]:
        outputs, after = call(inputs, state)
        return outputs, _dense(after)

    # Whole graphs or an error: torch would else go on without compiling, and its time would be taken for compiled.
    return torch.compile(dense, dynamic=False, fullgraph=True) if compiled else call


def _dense(state: State) -> State:
    """The state in the layout that every call finds, since torch compiles anew for each."""
    return {name: value.contiguous() for name, value in state.items()}
