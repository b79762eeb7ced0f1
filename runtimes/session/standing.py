"""Standing: the state of a session and the place of its lanes, which change together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import numpy as np

from nsm.errors import StreamError
from nsm.runtimes.base import ConsumedError, Runtime, State
from nsm.runtimes.session.lane_tokens import LaneTokens
from nsm.runtimes.session.place import Place
from nsm.spec import OFFSET, StepSpec
from nsm.trace import Array, Arrays


class Standing:
    """The state of a session and the place of its lanes.

    Args:
        runtime: runtime that stores the state.
        spec: spec of the model.
        initial: the initial state.

    Attributes:
        at: the handle on the state, and the place of the lanes in their chunks: one tuple, assigned at once, so that an
            exception never comes between them. None if the session is closed.
    """

    def __init__(self, runtime: Runtime, spec: StepSpec, initial: Mapping[str, Array]) -> None:
        self._runtime, self._spec = runtime, spec
        # Tokens are counted only for a model with a capacity.
        self._none_yet = None if spec.capacity is None else LaneTokens(np.zeros(spec.batch, np.int64))
        self.at: tuple[State, Place] | None = (runtime.load_state(initial), self._place(initial, None))

    def read(self) -> Arrays:
        """Return a copy of the whole state.

        Raises:
            StreamError: the session is closed, or an interrupted call left no state.
        """
        state, _ = self.at or closed()
        try:
            return self._runtime.read_state(state)
        except ConsumedError as error:
            raise _lost() from error

    def put(self, arrays: Mapping[str, Array], place: Place | None = None, tokens: LaneTokens | None = None) -> None:
        """Replace the whole state.

        Args:
            arrays: the state.
            place: place of the lanes (default: with the offsets in the state).
            tokens: tokens of the lanes since their reset, if no place is given (default: 0).
        """
        _ = self.at or closed()
        self.at = self._runtime.load_state(arrays), place or self._place(arrays, tokens)

    def advance(self, entry: str, inputs: Mapping[str, Array], state: State, place: Place) -> tuple[Arrays, bool]:
        """Run an entry on the state and move the lanes to `place`.

        Returns:
            The outputs, and whether all values that the entry wrote are finite.

        Raises:
            StreamError: an interrupted call left no state.
            RunError: the backend failed; the state is unchanged.
        """
        try:
            outputs, after = self._runtime.call(entry, inputs, state)
        except ConsumedError as error:
            raise _lost() from error
        self.at = after, place
        return outputs, self._runtime.finite(after)

    def commit(self) -> bool:
        """Commit the full chunks; return whether the written values are finite."""
        state, place = self.at or closed()
        _, finite = self.advance("commit", {}, state, place.committed())
        return finite

    def close(self) -> None:
        """Free the memory of the runtime."""
        self.at = None
        self._runtime.close()

    def _place(self, arrays: Mapping[str, Array], tokens: LaneTokens | None) -> Place:
        """Return the place of lanes with this state; models without chunks have offset 0."""
        offsets = arrays.get(OFFSET, np.zeros(self._spec.batch))
        return Place(np.array(offsets, np.int64), self._spec.chunk_size, tokens or self._none_yet)


def closed() -> NoReturn:
    """Raise the `StreamError` of a closed session."""
    raise StreamError("The session is closed. Open the bundle again.")


def _lost() -> StreamError:
    return StreamError(
        "A call of this session was interrupted while it replaced the state, so the state is lost. Restart all "
        "lanes with reset(), or restore a snapshot of all lanes with restore(snapshot)."
    )
