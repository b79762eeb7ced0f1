"""LaneTokens: how many tokens each lane has had since its reset, held against what it may have."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from nsm.errors import InputError, SnapshotError, StreamError
from nsm.runtimes.checks import as_array
from nsm.spec import StepSpec
from nsm.trace import Array


class LaneTokens:
    """Counts the tokens of every lane of a session whose spec has a capacity.

    Calls that all lanes take whole are the usual case. A session counts them by `most` alone, which costs an addition
    and a comparison.

    Args:
        spec: of the session, with a capacity.
        initial: the states' initial values, by name.

    Attributes:
        capacity: tokens that a lane may have.
        most: what the lane has had that has had most.
    """

    def __init__(self, spec: StepSpec, initial: Mapping[str, Array]) -> None:
        assert spec.capacity is not None
        self.capacity = spec.capacity
        self._counters = [state for state in spec.states if state.per_token is not None]
        self._initial = {state.name: initial[state.name] for state in self._counters}
        self.most = 0
        self._used = np.zeros(spec.batch, np.int64)
        self._then = 0  # `most` when `_used` was written; all lanes have had the same since

    @property
    def used(self) -> Array:
        """[B] int64: tokens since the reset of each lane."""
        return self._used + (self.most - self._then)

    def check(self, counts: Array) -> None:
        """Raise `StreamError` if a lane would pass the capacity with so many tokens more, [B]."""
        used = self.used
        full = np.flatnonzero((counts > 0) & (used + counts > self.capacity)).tolist()
        if full:
            resets = ", ".join(f"reset({lane})" for lane in full)
            raise StreamError(
                f"A lane takes at most {self.capacity:,} tokens from one reset to the next (the model's capacity, or "
                f"the artifact's limit; see nsm inspect). Lanes {full} have had {used[full].tolist()} and are given "
                f"{counts[full].tolist()} more. Start them afresh with {resets}, or give them fewer tokens. Nothing "
                "has happened to the state."
            )

    def put(self, used: Array) -> None:
        """Set what every lane has had, [B]."""
        self._used = used
        self.most = self._then = int(used.max())

    def of(self, lane: int | None) -> list[int]:
        """What one lane, or each of them, has had, for a snapshot."""
        return [int(count) for count in (self.used if lane is None else self.used[[lane]])]

    def put_lane(self, lane: int, used: int) -> None:
        """Set what one lane has had."""
        whole = self.used
        whole[lane] = used
        self.put(whole)

    def given(self, tokens: ArrayLike | None, arrays: Mapping[str, Array]) -> Array:
        """[B] tokens that lanes with these whole states have had: as given, or else as the states count them.

        Raises:
            InputError: neither says it, or what is given are no counts.
        """
        if tokens is None:
            if not self._counters:
                raise InputError(
                    f"The model takes at most {self.capacity:,} tokens a lane, and none of its states counts them. Say "
                    "how many tokens each lane has had: load_state(arrays, tokens=[...])."
                )
            return self._counted(arrays)
        counts = as_array("tokens", tokens)
        if counts.shape != self._used.shape or counts.dtype.kind not in "iu" or counts.min() < 0:
            raise InputError(
                f"tokens holds how many tokens each of the {len(self._used)} lanes has had, 0 or more; given "
                f"{counts.tolist()}."
            )
        return counts.astype(np.int64)

    def restored(self, held: list[int] | None, arrays: Mapping[str, Array], lane: int | None) -> Array:
        """[B] tokens that lanes have had after a snapshot was put into one of them, or into all.

        Args:
            held: what the snapshot says, None where it was taken from a session that does not count.
            arrays: the whole states as they are then.
            lane: that is replaced, None for all.

        Raises:
            SnapshotError: neither the snapshot nor a state says it.
        """
        used = self.used
        if held is not None:
            used[slice(None) if lane is None else lane] = held if lane is None else held[0]
            return used
        if not self._counters:
            raise SnapshotError(
                f"The model takes at most {self.capacity:,} tokens a lane, and the snapshot does not say how many its "
                "lanes have had: it was taken from a session without that limit. Take it from one with it."
            )
        counted = self._counted(arrays)
        used[slice(None) if lane is None else lane] = counted if lane is None else counted[lane]
        return used

    def _counted(self, arrays: Mapping[str, Array]) -> Array:
        """The tokens of the state that counts most of them."""
        counts = []
        for state in self._counters:
            assert state.per_token is not None
            # By Python's numbers: a state from elsewhere may be anywhere in its range.
            grown = arrays[state.name].astype(object) - self._initial[state.name].astype(object)
            lanes = np.moveaxis(grown, state.batch_axis, 0).reshape(len(self._used), -1)
            counts.append([max(0, -(-max(lane) // state.per_token)) for lane in lanes])
        most = [min(max(lane), np.iinfo(np.int64).max // 2) for lane in zip(*counts, strict=True)]
        return np.array(most, np.int64)
