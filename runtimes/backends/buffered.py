"""BufferedRuntime: the Runtime of every backend that works in host memory."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from sys import getrefcount
from typing import NamedTuple

import numpy as np

from nsm.errors import RunError
from nsm.runtimes.base import CheckedRuntime, Sides, State, all_finite
from nsm.spec import COUNT, VALID, EntrySpec, StateSpec, StepSpec, TensorSpec
from nsm.trace import Array, Arrays

Run = Callable[[], object]
Point = Callable[[str, Array], None]
"""Write the output of this name into that array from the next run on."""


class BoundGraph(NamedTuple):
    """A graph bound to memory.

    Args:
        run: runs the graph by the fastest call of the backend.
        point: redirects an output to another array.
        documented: runs the graph by the documented call of the backend, which `BufferedRuntime.bare` measures;
            None if `run` is that call.
    """

    run: Run
    point: Point
    documented: Run | None = None


Bind = Callable[[Arrays, Arrays], BoundGraph]
"""Bind a graph: (arrays to read by input name, arrays to write by output name) -> bound graph."""
Opener = Callable[[], Bind]
"""Open a graph; called at the first use, because an open graph has a copy of the weights."""

COUNTED = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()
"""Whether `sys.getrefcount` is exact. In free-threaded builds it is not, and each call writes to new memory."""

_LINE = 16
"""Number of float32 values in a cache line."""


class BufferedRuntime(CheckedRuntime):
    """A runtime with two buffers per state, written in turn, and one buffer per appended state.

    With one buffer bound as both input and output of a state, the backend may overwrite it before it reads it (ONNX
    Runtime did so, silently, in one of two valid orders of the nodes). So the runtime binds an entry once for each
    assignment of the states it touches to their two buffers, when the assignment first occurs. A call is then a copy
    of the inputs and a run. A state that an entry does not touch stays in its buffer.

    Outputs are not copied: the caller gets the memory that the graph wrote, and a later call reuses it only when no
    reference to it is left. Otherwise the later call writes to new memory.

    Args:
        spec: spec of the model.
        entries: the function that opens the graph of each entry.
        effective_precision: precision that the backend reports.
    """

    def __init__(self, spec: StepSpec, entries: Mapping[str, Opener], effective_precision: str) -> None:
        self._sides = Sides(spec)
        super().__init__(self._sides)
        self.effective_precision = effective_precision
        self._spec = spec
        self._banks = Banks(spec)
        self._openers = dict(entries)
        self._entries: dict[str, _Entry] = {}
        self._written: Sequence[Array] = ()

    def load_state(self, arrays: Mapping[str, Array]) -> State:
        self._check_open()
        self._sides.consume()
        for name, buffers in self._banks.buffers.items():
            buffers[0][...] = arrays[name]
        handle = self._sides.reset()
        names = self._spec.state_names
        self._written = self._banks.flat(names, dict.fromkeys(names, 0))
        return handle

    def call(self, entry: str, inputs: Mapping[str, Array], state: State) -> tuple[Arrays, State]:
        self._sides.check(state)
        found = self._entries.get(entry) or self._opened(entry)
        try:
            bound = found.run(inputs, self._sides)
        except Exception as error:  # the backends' errors have no common base
            raise RunError(f"The backend failed while it ran {entry}: {error}") from error
        # Tokens of the lanes before this call; the call flips the count's buffers with those of the other states.
        count = self._banks.buffers[COUNT][self._sides[COUNT]] if found.rings else None
        handle = self._sides.flip(entry, state)
        if count is not None:
            for ring in found.rings:
                ring.append(count, inputs.get(VALID))
        self._written = bound.written
        return bound.answers(), handle

    def read_state(self, state: State) -> Arrays:
        self._check(state)
        return {name: buffers[self._sides[name]].copy() for name, buffers in self._banks.buffers.items()}

    def finite(self, state: State) -> bool:
        self._check(state)
        return all_finite(self._written)

    def bare(self, entry: str) -> Run:
        """Return the bare backend call, as in a hand-written loop over one stream.

        It uses the documented call of the backend, without the checks of this class. It leaves the streams in an
        undefined state: reset them afterwards.
        """
        found = self._entries.get(entry) or self._opened(entry)
        runs = []
        for _ in range(2):
            bound = found.bound(self._sides)
            bound.let_go()
            runs.append(bound.documented)
            self._sides.turn(entry)
        turns = itertools.cycle(runs)

        def run() -> object:
            return next(turns)()

        return run

    def close(self) -> None:
        self._open = False
        self._openers.clear()
        self._entries.clear()
        self._banks.free()
        self._written = ()

    def _opened(self, entry: str) -> _Entry:
        self._check_open()  # checked here and not in `call`, because a closed runtime has no entries
        bind = self._openers[entry]()
        self._entries[entry] = _Entry(self._spec.entry(entry), bind, self._spec, self._banks, self._sides)
        return self._entries[entry]


class Banks:
    """The buffers of all states: `buffers[name]` is the pair of a state, the same buffer twice for an appended state.

    float32 states are stored in one array per side, grouped by the entries that write them, so that one reduction
    checks all values that a call wrote.
    """

    def __init__(self, spec: StepSpec) -> None:
        self._places: dict[str, tuple[int, int]] = {}
        end = 0
        for state in sorted(spec.states, key=lambda state: [state.name not in entry.writes for entry in spec.entries]):
            if state.append_axis is None and state.dtype == "float32":
                size = int(np.prod(state.shape))
                self._places[state.name] = end, size
                end += -(-size // _LINE) * _LINE
        self._arenas = _aligned_zeros(end), _aligned_zeros(end)
        self.buffers: dict[str, tuple[Array, Array]] = {}
        for state in spec.states:
            if state.name in self._places:
                start, size = self._places[state.name]
                first, second = (arena[start : start + size].reshape(state.shape) for arena in self._arenas)
            else:
                first = _zeros(state)
                second = first if state.append_axis is not None else _zeros(state)
            self.buffers[state.name] = first, second

    def flat(self, names: Iterable[str], sides: Mapping[str, int]) -> list[Array]:
        """Return these states as the fewest possible flat floating-point arrays.

        `sides` gives the buffer of each state. States between two others on the same side are included.
        """
        spans: list[tuple[int, int, int]] = []
        others = []
        for name in names:
            if name in self._places:
                start, size = self._places[name]
                spans.append((sides[name], start, start + size))
            elif self.buffers[name][0].dtype.kind == "f":
                others.append(self.buffers[name][sides[name]].reshape(-1))
        joined: list[tuple[int, int, int]] = []
        for side, start, end in sorted(spans):
            if joined and joined[-1][0] == side and self._same_side(sides, side, joined[-1][2], start):
                joined[-1] = side, joined[-1][1], end
            else:
                joined.append((side, start, end))
        return [*(self._arenas[side][start:end] for side, start, end in joined), *others]

    def free(self) -> None:
        """Release all memory."""
        self.buffers.clear()
        self._arenas = _aligned_zeros(0), _aligned_zeros(0)

    def _same_side(self, sides: Mapping[str, int], side: int, start: int, end: int) -> bool:
        between = (name for name, (place, _) in self._places.items() if start <= place < end)
        return all(sides[name] == side for name in between)


class _Bound:
    """A bound graph, and the arrays that it writes.

    Args:
        graph: the bound graph.
        outputs: arrays of the outputs, by name.
        states: arrays of the states, flat.
    """

    def __init__(self, graph: BoundGraph, outputs: Arrays, states: Sequence[Array]) -> None:
        self.run, self._point, documented = graph
        self.documented = documented or self.run
        self._outputs, self._states = outputs, states
        self._pointed = True  # whether the graph is bound to these outputs
        self.written = self._all()
        # Reference count without a caller: this object and the expression itself, which `let_go` repeats.
        self._unheld = {name: getrefcount(self._outputs[name]) for name in outputs}

    def let_go(self) -> None:
        """Give the next call new memory for outputs that the caller still refers to."""
        if not self._pointed:  # the last call was interrupted
            for name in self._outputs:
                self._renew(name)
        for name, unheld in self._unheld.items():
            if not COUNTED or getrefcount(self._outputs[name]) > unheld:
                self._renew(name)

    def answers(self) -> Arrays:
        """Return views of the outputs. A view of a view refers to the base array and raises its reference count."""
        return {name: array[...] for name, array in self._outputs.items()}

    def _renew(self, name: str) -> None:
        self._pointed = False
        self._outputs[name] = np.zeros_like(self._outputs[name])
        self._point(name, self._outputs[name])
        self.written = self._all()
        self._pointed = True

    def _all(self) -> Sequence[Array]:
        flat = (array.reshape(-1) for array in self._outputs.values() if array.dtype.kind == "f")
        return [*self._states, *flat]


class _Entry:
    """One graph, bound to the buffers that hold the states at the time of the call."""

    def __init__(self, spec: EntrySpec, bind: Bind, model: StepSpec, banks: Banks, sides: Sides) -> None:
        tokens = spec.inputs[0].shape[1] if spec.inputs else 0
        self._inputs = {item.name: _zeros(item) for item in spec.inputs}
        self._outputs = spec.outputs
        self._bind, self._banks = bind, banks
        self._reads, self._writes = model.states_of(spec.reads), model.states_of(spec.writes)
        self._rings = {
            state.name: _Ring(
                state, np.zeros(state.present_shape(tokens), state.numpy_dtype), banks.buffers[state.name][0]
            )
            for state in self._writes
            if state.append_axis is not None
        }
        self.rings = tuple(self._rings.values())
        self._touched = sides.mask({*spec.reads, *spec.writes})
        self._all: dict[int, _Bound] = {}

    def run(self, inputs: Mapping[str, Array], sides: Sides) -> _Bound:
        for name, buffer in self._inputs.items():
            buffer[...] = inputs[name]
        bound = self.bound(sides)
        bound.let_go()
        bound.run()
        return bound

    def bound(self, sides: Sides) -> _Bound:
        key = sides.bits & self._touched
        found = self._all.get(key)
        if found is None:
            found = self._all[key] = self._make(sides)
        return found

    def _make(self, sides: Sides) -> _Bound:
        buffers = self._banks.buffers
        read = {state.past: buffers[state.name][sides[state.name]] for state in self._reads}
        written = {
            state.present: self._rings[state.name].rows
            if state.name in self._rings
            else buffers[state.name][1 - sides[state.name]]
            for state in self._writes
        }
        outputs = {item.name: _zeros(item) for item in self._outputs}
        graph = self._bind({**self._inputs, **read}, {**outputs, **written})
        rows = [ring.rows.reshape(-1) for ring in self._rings.values() if ring.rows.dtype.kind == "f"]
        turned = [state.name for state in self._writes if state.name not in self._rings]
        after = {name: sides[name] ^ (name in turned) for name in buffers}
        return _Bound(graph, outputs, [*self._banks.flat(turned, after), *rows])


class _Ring:
    """An appended state: its buffer, and the rows that a call of one entry returns.

    Args:
        state: spec of a state with `append_axis`.
        rows: output of the graph, shaped like the buffer with K on the append axis.
        buffer: buffer of the state.
    """

    def __init__(self, state: StateSpec, rows: Array, buffer: Array) -> None:
        assert state.append_axis is not None
        self.rows = rows
        axes = (state.batch_axis, state.append_axis)
        self._rows, self._buffer = (np.moveaxis(array, axes, (0, 1)) for array in (rows, buffer))

    def append(self, count: Array, valid: Array | None) -> None:
        """Write the rows into the ring buffer.

        Args:
            count: [B], tokens of each lane before the call.
            valid: [B], number of valid rows (default: all).
        """
        size, length = self._buffer.shape[1], self._rows.shape[1]
        for lane in range(len(count)):
            new = length if valid is None else int(valid[lane])
            rows = self._rows[lane, max(0, new - size) : new]  # if the rows exceed the buffer, keep the last ones
            first = (int(count[lane]) + new - len(rows)) % size
            head = min(len(rows), size - first)
            self._buffer[lane, first : first + head] = rows[:head]
            if len(rows) > head:
                self._buffer[lane, : len(rows) - head] = rows[head:]


def _aligned_zeros(count: int) -> Array:
    """Return `count` float32 zeros, aligned to a cache line."""
    room = np.zeros(count + _LINE, np.float32)
    first = -(room.ctypes.data // 4) % _LINE
    return room[first : first + count]


def _zeros(spec: TensorSpec | StateSpec) -> Array:
    return np.zeros(spec.shape, spec.numpy_dtype)
