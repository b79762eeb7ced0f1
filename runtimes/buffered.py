"""BufferedRuntime: the Runtime of every backend that works on memory of the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from nsm.errors import RunError, StreamError
from nsm.runtimes.base import Sides, State
from nsm.spec import COUNT, VALID, EntrySpec, StateSpec, StepSpec, TensorSpec
from nsm.trace import Array, Arrays

Run = Callable[[], object]
Bind = Callable[[Arrays, Arrays], Run]
"""(arrays to read by input name, arrays to write by output name) -> a function that runs the graph on them."""
Opener = Callable[[], Bind]
"""Opens a graph; called when it is first used, because an open graph holds a copy of the weights."""


class BufferedRuntime:
    """Every state in two buffers, written in turn; a state that is appended to in one.

    One buffer bound as both input and output of a state may be overwritten before it is read (ONNX Runtime did so,
    silently, in one of two valid orders of the nodes). So an entry is bound once for each way in which the states it
    touches can lie in their two buffers, when that first happens; a call then is a copy of the inputs, a run, and a
    copy of the outputs. A state that an entry does not touch stays where it is.

    Args:
        spec: of the model.
        entries: for each entry, how its graph is opened.
        effective_precision: as the backend says.
    """

    def __init__(self, spec: StepSpec, entries: Mapping[str, Opener], effective_precision: str) -> None:
        self.effective_precision = effective_precision
        self._buffers = {
            state.name: (first := _zeros(state), first if state.append_axis is not None else _zeros(state))
            for state in spec.states
        }
        self._sides = Sides(spec)
        self._spec = spec
        self._openers = dict(entries)
        self._entries: dict[str, _Entry] = {}

    def load_state(self, arrays: Mapping[str, Array]) -> State:
        for name, buffers in self._buffers.items():
            buffers[0][...] = arrays[name]
        return self._sides.reset(self)

    def call(self, entry: str, inputs: Mapping[str, Array], state: State) -> tuple[Arrays, State]:
        state.check(self)
        if not self._openers:
            raise StreamError("The session is closed. Open the bundle again.")
        if entry not in self._entries:
            bind = self._openers[entry]()
            self._entries[entry] = _Entry(self._spec.entry(entry), bind, self._spec, self._buffers, self._sides)
        try:
            outputs = self._entries[entry].run(inputs)
        except Exception as error:  # the backends' errors have no common base
            raise RunError(f"The backend failed while it ran {entry}: {error}") from error
        return outputs, self._sides.flip(self, entry)

    def read_state(self, state: State) -> Arrays:
        state.check(self)
        return {name: buffers[self._sides[name]].copy() for name, buffers in self._buffers.items()}

    def finite(self, state: State) -> bool:
        # A sum of squares is one pass without a temporary; where it overflows, the numbers are looked at one by one.
        state.check(self)
        flat = (buffers[self._sides[name]].reshape(-1) for name, buffers in self._buffers.items())
        with np.errstate(over="ignore", invalid="ignore"):
            return all(
                np.isfinite(np.dot(array, array)) or np.isfinite(array).all()
                for array in flat
                if array.dtype.kind == "f"
            )

    def close(self) -> None:
        self._openers.clear()
        self._entries.clear()


class _Entry:
    """One graph, bound to the buffers as they lie when it is called."""

    def __init__(
        self, spec: EntrySpec, bind: Bind, model: StepSpec, buffers: Mapping[str, tuple[Array, Array]], sides: Sides
    ) -> None:
        tokens = spec.inputs[0].shape[1] if spec.inputs else 0
        self._inputs = {item.name: _zeros(item) for item in spec.inputs}
        self._outputs = {item.name: _zeros(item) for item in spec.outputs}
        self._bind, self._buffers, self._sides = bind, buffers, sides
        self._reads, self._writes = model.states_of(spec.reads), model.states_of(spec.writes)
        self._rings = {
            state.name: _Ring(state, np.zeros(state.present_shape(tokens), state.numpy_dtype), buffers[state.name][0])
            for state in self._writes
            if state.append_axis is not None
        }
        self._touched = tuple(dict.fromkeys((*spec.reads, *spec.writes)))
        self._runs: dict[tuple[int, ...], Run] = {}

    def run(self, inputs: Mapping[str, Array]) -> Arrays:
        for name, buffer in self._inputs.items():
            np.copyto(buffer, inputs[name])
        key = tuple(self._sides[name] for name in self._touched)
        if key not in self._runs:
            self._runs[key] = self._bound()
        self._runs[key]()
        if self._rings:
            # How many tokens the lanes had before this call: the count has not been turned over yet.
            count = self._buffers[COUNT][self._sides[COUNT]]
            for ring in self._rings.values():
                ring.append(count, inputs.get(VALID))
        return {name: buffer.copy() for name, buffer in self._outputs.items()}

    def _bound(self) -> Run:
        read = {state.past: self._buffers[state.name][self._sides[state.name]] for state in self._reads}
        written = {
            state.present: self._rings[state.name].rows
            if state.name in self._rings
            else self._buffers[state.name][1 - self._sides[state.name]]
            for state in self._writes
        }
        return self._bind({**self._inputs, **read}, {**self._outputs, **written})


class _Ring:
    """A state that is appended to: its buffer, and the rows that a call of one entry gives.

    Args:
        state: with `append_axis`.
        rows: what the graph writes into, like the buffer with K on the append axis.
        buffer: the state.
    """

    def __init__(self, state: StateSpec, rows: Array, buffer: Array) -> None:
        assert state.append_axis is not None
        self.rows = rows
        axes = (state.batch_axis, state.append_axis)
        self._rows, self._buffer = (np.moveaxis(array, axes, (0, 1)) for array in (rows, buffer))

    def append(self, count: Array, valid: Array | None) -> None:
        """Put the rows into the buffer, as a ring.

        Args:
            count: [B], tokens each lane had before the call.
            valid: [B], how many of the rows count (default: all).
        """
        size, length = self._buffer.shape[1], self._rows.shape[1]
        for lane in range(len(count)):
            new = length if valid is None else int(valid[lane])
            rows = self._rows[lane, max(0, new - size) : new]  # of more rows than there is room for, the last stay
            first = (int(count[lane]) + new - len(rows)) % size
            head = min(len(rows), size - first)
            self._buffer[lane, first : first + head] = rows[:head]
            if len(rows) > head:
                self._buffer[lane, : len(rows) - head] = rows[head:]


def _zeros(spec: TensorSpec | StateSpec) -> Array:
    return np.zeros(spec.shape, spec.numpy_dtype)
