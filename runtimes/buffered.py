"""BufferedRuntime: the Runtime of every backend that works on memory of the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from nsm.errors import RunError, StreamError
from nsm.runtimes.base import State
from nsm.spec import EntrySpec, StateSpec, StepSpec, TensorSpec
from nsm.trace import Array, Arrays

Run = Callable[[], object]
Bind = Callable[[Arrays, Arrays], Run]
"""(arrays to read by input name, arrays to write by output name) -> a function that runs the graph on them."""


class BufferedRuntime:
    """State in two sets of buffers, A and B, written in turn.

    One buffer bound as both input and output of a state may be overwritten before it is read (ONNX Runtime did so,
    silently, in one of two valid orders of the nodes). So each entry is bound twice, from A to B and from B to A,
    once for all; a step then is a copy of the inputs, a run, and a copy of the outputs.

    Args:
        spec: of the model.
        entries: for each entry, how its graph is bound to arrays.
        effective_precision: as the backend says.
    """

    def __init__(self, spec: StepSpec, entries: Mapping[str, Bind], effective_precision: str) -> None:
        self.effective_precision = effective_precision
        self._states = spec.states
        self._sides = (_buffers(spec.states), _buffers(spec.states))
        self._entries = {
            name: _Entry(spec.entry(name), bind, spec.states, self._sides) for name, bind in entries.items()
        }
        self._flat = tuple([b.reshape(-1) for b in side.values() if b.dtype.kind == "f"] for side in self._sides)
        self._live: State | None = None

    def load_state(self, arrays: Mapping[str, Array]) -> State:
        for name, buffer in self._sides[0].items():
            buffer[...] = arrays[name]
        return self._handle(0)

    def call(self, entry: str, inputs: Mapping[str, Array], state: State) -> tuple[Arrays, State]:
        side = state.side(self)
        if not self._entries:
            raise StreamError("The session is closed. Open the bundle again.")
        try:
            outputs = self._entries[entry].run(inputs, side)
        except Exception as error:  # the backends' errors have no common base
            raise RunError(f"The backend failed while it ran {entry}: {error}") from error
        return outputs, self._handle(1 - side)

    def read_state(self, state: State) -> Arrays:
        return {name: buffer.copy() for name, buffer in self._sides[state.side(self)].items()}

    def finite(self, state: State) -> bool:
        # A sum of squares is one pass without a temporary; where it overflows, the numbers are looked at one by one.
        flat = self._flat[state.side(self)]
        with np.errstate(over="ignore", invalid="ignore"):
            return all(np.isfinite(np.dot(array, array)) or np.isfinite(array).all() for array in flat)

    def close(self) -> None:
        self._entries.clear()

    def _handle(self, side: int) -> State:
        if self._live is not None:
            self._live.live = False
        self._live = State(self, side)
        return self._live


class _Entry:
    """One graph bound in both directions."""

    def __init__(
        self, spec: EntrySpec, bind: Bind, states: tuple[StateSpec, ...], sides: tuple[Arrays, Arrays]
    ) -> None:
        self._inputs = _buffers(spec.inputs)
        self._outputs = _buffers(spec.outputs)
        self._runs = [
            bind(
                {**self._inputs, **{state.past: source[state.name] for state in states}},
                {**self._outputs, **{state.present: target[state.name] for state in states}},
            )
            for source, target in (sides, sides[::-1])
        ]

    def run(self, inputs: Mapping[str, Array], side: int) -> Arrays:
        for name, buffer in self._inputs.items():
            np.copyto(buffer, inputs[name])
        self._runs[side]()
        return {name: buffer.copy() for name, buffer in self._outputs.items()}


def _buffers(specs: Iterable[TensorSpec | StateSpec]) -> Arrays:
    return {spec.name: np.zeros(spec.shape, spec.numpy_dtype) for spec in specs}
