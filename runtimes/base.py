"""The Runtime protocol: the minimal interface of a backend. `Session` holds the logic that all backends share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NoReturn, Protocol, SupportsIndex

import numpy as np

from nsm.errors import BundleDamagedError, NotCopyableError, StreamError
from nsm.spec import StepSpec
from nsm.trace import Array, Arrays

Progress = Callable[[int, int], None]
"""(steps done, steps in all) of a comparison."""


class NotCopyable:
    """Base of classes with memory of a backend, which cannot be copied or pickled."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise NotCopyableError(
            f"A {type(self).__name__} can be neither copied nor pickled: it holds memory of a backend. To go on with a "
            "stream twice, call session.fork(lane, into), or take session.snapshot() and restore it in another session "
            "of the same model; in another process too, which opens the bundle itself."
        )


class State(NotCopyable):
    """A handle on the state that a runtime holds, on its device perhaps. Passing it to a call consumes it."""

    __slots__ = ()


class ConsumedError(StreamError):
    """A State was consumed before, or belongs to another runtime."""


class Handles:
    """The handles that a runtime has given out: the last one is good.

    An exception can come between any two instructions: Ctrl-C, a time limit. So a runtime consumes the last handle
    before it changes the state, and returns the next one when the state is whole. In between nobody has a good one.
    """

    def __init__(self) -> None:
        self._last = State()

    def new(self) -> State:
        """A handle in place of the last one, which is consumed now."""
        self._last = State()
        return self._last

    def consume(self) -> None:
        """No handle that was given out is good, until the next one is made."""
        self._last = State()

    def give_back(self, handle: State) -> None:
        """Make a handle that was consumed good again: nothing has happened to the state."""
        self._last = handle

    def check(self, handle: State) -> None:
        """Raise `ConsumedError` if a handle was consumed before, or belongs to another runtime."""
        if handle is not self._last:
            raise ConsumedError(
                "This State was consumed by an earlier call, or belongs to another runtime. "
                "Use the State that the last call returned, or load_state again."
            )


class Sides(Handles):
    """Which of its two buffers, 0 or 1, each state lies in; a call turns those over that its entry writes.

    `bits` has a bit for each state, in the order of the spec.
    """

    def __init__(self, spec: StepSpec) -> None:
        super().__init__()
        self.bits = 0
        self._bit = {name: 1 << index for index, name in enumerate(spec.state_names)}
        appended = {state.name for state in spec.states if state.append_axis is not None}
        self._turned = {entry.name: self.mask(set(entry.writes) - appended) for entry in spec.entries}

    def __getitem__(self, name: str) -> int:
        return int(self.bits & self._bit[name] != 0)

    def mask(self, names: Iterable[str]) -> int:
        """The bits of these states."""
        return sum(self._bit[name] for name in names)

    def reset(self) -> State:
        """All states lie in buffer 0 now; the new handle on them."""
        handle = self.new()
        self.bits = 0
        return handle

    def flip(self, entry: str, state: State) -> State:
        """Consume `state`, on which an entry has run; return the handle of the new state.

        Raises:
            ConsumedError: somebody has used `state` meanwhile, a signal handler for instance.
        """
        self.check(state)
        handle = self.new()
        self.bits ^= self._turned[entry]
        return handle

    def turn(self, entry: str) -> None:
        """The states that an entry writes lie in their other buffer now."""
        self.bits ^= self._turned[entry]


class Watched:
    """Files that were verified when a bundle was opened, and may be read later: they must still be the same.

    Args:
        folders: whose files are watched. Broken links are ignored.
    """

    def __init__(self, *folders: Path) -> None:
        self._folders = folders
        self._seen = self._look()

    def check(self) -> None:
        """Raise `BundleDamagedError` if a file has changed."""
        if self._look() != self._seen:
            raise BundleDamagedError(
                f"The files in {', '.join(map(str, self._folders))} were replaced while the session was open. "
                "Close it, and open the bundle again."
            )

    def _look(self) -> dict[Path, tuple[int, int, int]]:
        files = (path for folder in self._folders if folder.is_dir() for path in sorted(folder.iterdir()))
        stats = ((path, path.stat()) for path in files if path.is_file())
        return {path: (s.st_ino, s.st_size, s.st_mtime_ns) for path, s in stats}


class Runtime(Protocol):
    """One loaded artifact. It holds one live state at a time; `load_state` and `call` make a new one.

    Where `call` raises, the state is as before and its handle good, or the handle is consumed; see `Handles`.
    """

    @property
    def effective_precision(self) -> str:
        """The precision of the computation, read back from the backend if possible."""
        ...

    def load_state(self, arrays: Mapping[str, Array]) -> State:
        """Put a whole state, by state name and with all lanes, where the backend keeps it."""
        ...

    def call(self, entry: str, inputs: Mapping[str, Array], state: State) -> tuple[Arrays, State]:
        """Run one entry. Inputs have the dtypes and shapes of the spec. The outputs are the caller's own."""
        ...

    def read_state(self, state: State) -> Arrays:
        """A copy of the state, by state name."""
        ...

    def finite(self, state: State) -> bool:
        """Whether every number is finite that the last call answered, or that it or `load_state` wrote into the state.

        Only values written since the last check are examined. It is called after every step, so it must be cheap.
        """
        ...

    def close(self) -> None:
        """Free the memory of the backend; the runtime cannot be used afterwards."""
        ...


Loader = Callable[[Mapping[str, Path], StepSpec, str, int | None, str], Runtime]
"""(file of each entry, spec, device, threads, precision) -> Runtime; every backend module has one, named `load`."""


def all_finite(arrays: Iterable[Array]) -> bool:
    """Whether arrays of floating point numbers hold neither NaN nor infinity.

    A sum of squares is one pass without a temporary; where it overflows, the numbers are looked at one by one. By
    `vdot`, which unlike `dot` does not warn of that: turning warnings off costs more than the sum.
    """
    for array in arrays:  # noqa: SIM110 - a generator costs as much as looking at a small array
        if not (math.isfinite(np.vdot(array, array)) or np.isfinite(array).all()):
            return False
    return True
