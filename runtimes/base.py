"""The Runtime protocol: the smallest thing a backend must do. What all backends share lives once, in `Session`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from nsm.errors import StreamError
from nsm.spec import StepSpec
from nsm.trace import Array, Arrays


class State:
    """A handle on the state that a runtime holds, on its device perhaps. Passing it to a call consumes it."""

    def __init__(self, owner: object, side: int) -> None:
        self._owner = owner
        self._side = side
        self.live = True

    def side(self, owner: object) -> int:
        """Which of the owner's two sets of buffers holds the state.

        Raises:
            StreamError: the handle was consumed before, or belongs to another runtime.
        """
        if self._owner is not owner or not self.live:
            raise StreamError(
                "This State was consumed by an earlier call, or belongs to another runtime. "
                "Use the State that the last call returned, or load_state again."
            )
        return self._side


class Runtime(Protocol):
    """One loaded artifact. It holds one live state at a time; `load_state` and `call` make a new one."""

    @property
    def effective_precision(self) -> str:
        """What the backend computes in, read back from it where it can say."""
        ...

    def load_state(self, arrays: Mapping[str, Array]) -> State:
        """Put a whole state, by state name and with all lanes, where the backend keeps it."""
        ...

    def call(self, entry: str, inputs: Mapping[str, Array], state: State) -> tuple[Arrays, State]:
        """Run one entry. Inputs have the dtypes and shapes of the spec. The outputs are the caller's own copies."""
        ...

    def read_state(self, state: State) -> Arrays:
        """A copy of the state, by state name."""
        ...

    def finite(self, state: State) -> bool:
        """Whether every number in the state is finite. Called after every step, so it had better be cheap."""
        ...

    def close(self) -> None:
        """Free what the backend holds; the runtime is of no use afterwards."""
        ...


Loader = Callable[[Mapping[str, Path], StepSpec, str, int | None], Runtime]
"""(file of each entry, spec, device, threads) -> Runtime; every backend module has one, named `load`."""
