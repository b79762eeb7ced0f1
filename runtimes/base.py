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
"""Progress callback of a comparison: (steps done, total steps)."""


class NotCopyable:
    """Base class of objects that own backend memory: they refuse copy and pickle."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise NotCopyableError(
            f"A {type(self).__name__} can be neither copied nor pickled: it owns memory of a backend. To continue a "
            "stream twice, call session.fork(lane, into), or take session.snapshot() and restore it in another session "
            "of the same model; in another process too, which opens the bundle itself."
        )


class State(NotCopyable):
    """A handle on the state of a runtime, in host or device memory. A call consumes the handle it is given."""

    __slots__ = ()


class ConsumedError(StreamError):
    """An earlier call consumed the State, or the State belongs to another runtime."""


class Handles:
    """The handles that a runtime has issued; only the latest is valid.

    Ctrl-C or a time limit can raise an exception between any two instructions. So a runtime consumes the latest handle
    before it changes the state, and issues the next one when the state is complete. In between no handle is valid.
    """

    def __init__(self) -> None:
        self._last = State()

    def new(self) -> State:
        """Issue a new handle and consume the latest one."""
        self._last = State()
        return self._last

    def consume(self) -> None:
        """Invalidate every issued handle, until the next one is issued."""
        self._last = State()

    def give_back(self, handle: State) -> None:
        """Make a consumed handle valid again, because the state did not change."""
        self._last = handle

    def check(self, handle: State) -> None:
        """Raise `ConsumedError` if a handle was consumed before, or belongs to another runtime."""
        if handle is not self._last:
            raise ConsumedError(
                "This State was consumed by an earlier call, or belongs to another runtime. "
                "Use the State that the last call returned, or load_state again."
            )


class Sides(Handles):
    """The buffer, 0 or 1, that currently holds each state; a call flips the states that its entry writes.

    `bits` has one bit per state, in the order of the spec.
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
        """Mark all states as being in buffer 0 and return the new handle."""
        handle = self.new()
        self.bits = 0
        return handle

    def flip(self, entry: str, state: State) -> State:
        """Consume `state`, on which an entry has run; return the handle of the new state.

        Raises:
            ConsumedError: other code, such as a signal handler, used `state` in the meantime.
        """
        self.check(state)
        handle = self.new()
        self.bits ^= self._turned[entry]
        return handle

    def turn(self, entry: str) -> None:
        """Flip the states that an entry writes to their other buffer."""
        self.bits ^= self._turned[entry]


class CheckedRuntime(NotCopyable):
    """Base class of the runtimes: refuses calls after `close` and handles that were consumed.

    Args:
        handles: the handles that the runtime issues.
    """

    def __init__(self, handles: Handles) -> None:
        self._handles = handles
        self._open = True

    def _check_open(self) -> None:
        """Raise `StreamError` if the runtime is closed."""
        if not self._open:
            raise StreamError("The session is closed. Open the bundle again.")

    def _check(self, state: State) -> None:
        """Raise `StreamError` if the runtime is closed, or its subclass `ConsumedError` if the handle was consumed."""
        self._check_open()
        self._handles.check(state)


class Watched:
    """Detects changes to files that were verified at opening and are read later.

    Args:
        folders: the folders to watch. Broken links are ignored.
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
    """One loaded artifact with one live state at a time; `load_state` and `call` make a new one.

    If `call` raises, either the state is unchanged and its handle valid, or the handle is consumed; see `Handles`.
    """

    @property
    def effective_precision(self) -> str:
        """The precision of the computation, read back from the backend if possible."""
        ...

    def load_state(self, arrays: Mapping[str, Array]) -> State:
        """Load a whole state, by state name and with all lanes, into the backend's memory."""
        ...

    def call(self, entry: str, inputs: Mapping[str, Array], state: State) -> tuple[Arrays, State]:
        """Run one entry. Inputs have the dtypes and shapes of the spec. The caller owns the outputs."""
        ...

    def read_state(self, state: State) -> Arrays:
        """Return a copy of the state, by state name."""
        ...

    def finite(self, state: State) -> bool:
        """Return whether all outputs and state values written since the last check are finite.

        The session calls this after every step, so it must be cheap.
        """
        ...

    def close(self) -> None:
        """Free the memory of the backend. The runtime cannot be used afterwards."""
        ...


Loader = Callable[[Mapping[str, Path], StepSpec, str, int | None, str], Runtime]
"""Type of `load` in every backend module: (file of each entry, spec, device, threads, precision) -> Runtime."""


def all_finite(arrays: Iterable[Array]) -> bool:
    """Return whether floating-point arrays contain neither NaN nor infinity.

    A sum of squares needs one pass and no temporary. If it overflows, the function checks the values one by one. It
    uses `vdot` because `dot` warns of the overflow, and turning warnings off costs more than the sum.
    """
    for array in arrays:  # noqa: SIM110 - a generator costs as much as checking a small array
        if not (math.isfinite(np.vdot(array, array)) or np.isfinite(array).all()):
            return False
    return True
