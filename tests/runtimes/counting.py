"""A toy model that counts, in plain numpy, and what a careless backend makes of its integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from nsm.errors import RunError
from nsm.runtimes.base import Handles, State
from nsm.runtimes.session.session import Session
from nsm.spec import EntrySpec, StateSpec, StepSpec, TensorSpec
from nsm.trace import Array, Arrays

Step = Callable[[Array, Arrays], tuple[Array, Arrays]]
"""(tokens [B, K], states by name) -> (outputs [B, K, 1], states)."""


def counting_spec(states: Mapping[str, tuple[str, tuple[int, ...]]], batch: int = 2, length: int = 1) -> StepSpec:
    """States by name, a dtype and what follows the lanes in their shape; tokens are numbers."""
    held = tuple(StateSpec(name, (batch, *shape), dtype) for name, (dtype, shape) in states.items())
    names = tuple(states)
    tokens = TensorSpec("tokens", (batch, length), "float32", 1)
    outputs = TensorSpec("outputs", (batch, length, 1), "float32", 1)
    return StepSpec((EntrySpec("step", (tokens,), (outputs,), names, names),), held, 1, batch)


class CountingRuntime:
    """A function behind the Runtime protocol."""

    effective_precision = "fp32"

    def __init__(self, step: Step) -> None:
        self._step = step
        self._arrays: Arrays = {}
        self._handles = Handles()
        self.calls = 0

    def load_state(self, arrays: Mapping[str, Array]) -> State:
        self._arrays = {name: value.copy() for name, value in arrays.items()}
        return self._handles.new()

    def call(self, entry: str, inputs: Mapping[str, Array], state: State) -> tuple[Arrays, State]:
        self._handles.check(state)
        self.calls += 1
        try:
            outputs, self._arrays = self._step(inputs["tokens"], self._arrays)
        except IndexError as error:
            raise RunError(f"{entry} failed: {error}") from error
        return {"outputs": outputs.astype(np.float32)}, self._handles.new()

    def read_state(self, state: State) -> Arrays:
        self._handles.check(state)
        return {name: value.copy() for name, value in self._arrays.items()}

    def finite(self, state: State) -> bool:
        self._handles.check(state)
        return all(np.isfinite(value).all() for value in self._arrays.values())

    def close(self) -> None:
        self._arrays = {}


def counting_session(step: Step, spec: StepSpec) -> Session:
    initial = {state.name: np.zeros(state.shape, state.numpy_dtype) for state in spec.states}
    return Session(CountingRuntime(step), spec, initial, "f" * 64, "counting")


def tokens_of(spec: StepSpec, calls: int = 16) -> Array:
    """[T, B, K] random numbers."""
    shape = spec.entry("step").inputs[0].shape
    return np.random.default_rng(0).standard_normal((calls, *shape)).astype(np.float32)
