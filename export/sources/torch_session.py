"""PyTorch as one more runtime: a model, eager or compiled, under a `Session` like any artifact. Needs torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from nsm.bundle import Bundle
from nsm.errors import InputError, RunError, UnsupportedError
from nsm.export.capture import line_of_error
from nsm.models import State as Tensors
from nsm.models import StepModel, duplicate, fingerprint, load_checkpoint, on_cpu
from nsm.runtimes import CheckedRuntime, Handles, Runtime, State
from nsm.runtimes.parity import Perturbation
from nsm.runtimes.session import Session
from nsm.spec import StepSpec
from nsm.trace import Array, Arrays

TARGET = "pytorch"

_Call = Callable[[dict[str, torch.Tensor], Tensors], tuple[dict[str, torch.Tensor], Tensors]]


class TorchRuntime(CheckedRuntime):
    """Runs the entries of a model through `StepModel.call`, in inference mode and in the dtype of its weights.

    Args:
        model: in eval mode, on the CPU.
        spec: of the model, with the lanes and tokens a call that are wanted.
        compiled: whether the entries go through torch.compile, which works at their first calls.
    """

    def __init__(self, model: StepModel, spec: StepSpec, compiled: bool = False) -> None:
        super().__init__(Handles())
        self._dtype = model.dtype
        self.effective_precision = "fp64" if self._dtype == torch.float64 else "fp32"
        self._calls = {entry.name: _call_of(model, entry.name, compiled) for entry in spec.entries}
        self._outputs = {entry.name: [item.name for item in entry.outputs] for entry in spec.entries}
        self._tensors: Tensors = {}
        self._answered: tuple[torch.Tensor, ...] = ()

    def load_state(self, arrays: Mapping[str, Array]) -> State:
        self._check_open()
        self._handles.consume()
        self._tensors = _dense({name: self._tensor(value) for name, value in arrays.items()})
        self._answered = ()
        return self._handles.new()

    def call(self, entry: str, inputs: Mapping[str, Array], state: State) -> tuple[Arrays, State]:
        self._check(state)
        given = {name: self._tensor(value) for name, value in inputs.items()}
        try:
            with torch.inference_mode():
                outputs, after = self._calls[entry](given, self._tensors)
        except Exception as error:  # whatever a module raises
            line = line_of_error(error)
            raise RunError(f"PyTorch failed while it ran {entry}: {line or ''}{error}") from error
        self._handles.check(state)  # a signal handler may have used it meanwhile
        handle = self._handles.new()
        self._tensors = after
        self._answered = tuple(outputs[name] for name in self._outputs[entry])
        return {name: outputs[name].numpy().copy() for name in self._outputs[entry]}, handle

    def read_state(self, state: State) -> Arrays:
        self._check(state)
        return {name: value.detach().numpy().copy() for name, value in self._tensors.items()}

    def finite(self, state: State) -> bool:
        self._check(state)
        written = (*self._tensors.values(), *self._answered)
        return all(bool(torch.isfinite(value).all()) for value in written if value.is_floating_point())

    def close(self) -> None:
        self._open = False
        self._calls.clear()
        self._tensors, self._answered = {}, ()

    def _tensor(self, value: Array) -> torch.Tensor:
        tensor = torch.from_numpy(np.array(value))
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor


def model_session(
    model: StepModel, spec: StepSpec, identity: str, compiled: bool = False, perturbation: Perturbation | None = None
) -> Session:
    """Return a session over a model in eval mode; `identity` is its fingerprint."""
    with torch.no_grad():
        initial = {name: value.numpy() for name, value in model.initial_state(spec.batch).items()}
    runtime: Runtime = TorchRuntime(model, spec, compiled)
    if perturbation is not None:
        runtime = perturbation.runtime(runtime)
    return Session(runtime, spec, initial, identity, TARGET)


def reference(model: StepModel | str | os.PathLike[str], batch: int = 1, tokens_per_call: int | None = None) -> Session:
    """A session over the PyTorch model itself: the reference of artifacts, and one more place to continue a stream.

    A snapshot taken from an artifact of the model can be restored here, and the other way round.

    Args:
        model: a model in float32, or in float64 to see how much is rounding; or a checkpoint written by `nsm.save`.
            Of a model on another device, or in training mode, the session has a copy as it is now, on the CPU; the
            model stays as it is.
        batch: lanes.
        tokens_per_call: K of a `step`, a multiple of the model's chunk (default: one chunk).

    Raises:
        CheckpointError: see `nsm.load`.
        InputError: the model does not take so many tokens a call.
        ConfigError: the model is in a lower precision.
    """
    if isinstance(model, StepModel):
        if model.dtype != torch.float64:
            model.check_float32()
        identity, found = fingerprint(model), on_cpu(model)
    else:
        checkpoint = load_checkpoint(model)
        found, identity = checkpoint.model, checkpoint.fingerprint
    found = in_eval_mode(found)
    return model_session(found, found.spec(batch, tokens_per_call), identity)


def in_eval_mode(model: StepModel) -> StepModel:
    """The model in eval mode: a copy if a part is in training mode, so that the training is not disturbed."""
    training = any(part.training for part in model.modules())
    return duplicate(model).eval() if training else model


def compiled_session(model: StepModel, spec: StepSpec, identity: str, tokens: Array) -> Session:
    """A session over a model all of whose entries went through torch.compile.

    Args:
        model: in eval mode, on the CPU.
        spec: of the model.
        identity: its fingerprint.
        tokens: [T, B, K, ...], real inputs to compile with.

    Raises:
        UnsupportedError: torch.compile failed, for instance because there is no C++ compiler, or it could compile
            the model in parts only.
    """
    try:
        session = model_session(model, spec, identity, compiled=True)
        for index in range(2):
            session.step(tokens[index % len(tokens)])
        if spec.has("decode"):
            session.reset()
            single = np.ascontiguousarray(tokens[0][:, :1])
            for _ in range(spec.chunk_size + 1):
                session.decode(single)
    except Exception as error:  # whatever the compiler's many parts raise
        cause = error.__cause__ or error
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        raise UnsupportedError(
            f"torch.compile cannot compile this model here ({type(cause).__name__}: {' '.join(lines[:2])}). "
            "It needs a C++ compiler (g++), and a model it takes as a whole. PyTorch as it is: --against eager"
        ) from error
    session.reset()
    return session


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
    def call(inputs: dict[str, torch.Tensor], state: Tensors) -> tuple[dict[str, torch.Tensor], Tensors]:
        outputs, after = model.call(entry, inputs, state)
        return outputs, _dense(after)

    # Whole graphs or an error: torch would else go on without compiling, and its time would be taken for compiled.
    return torch.compile(call, dynamic=False, fullgraph=True) if compiled else call


def _dense(state: Tensors) -> Tensors:
    """The state in the layout that every call finds, since torch compiles anew for each."""
    return {name: value.contiguous() for name, value in state.items()}
