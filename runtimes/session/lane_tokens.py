"""Tokens of each lane since its reset, compared with the capacity of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from nsm.errors import InputError, SnapshotError, StreamError
from nsm.runtimes.session.inputs import as_array
from nsm.spec import StepSpec
from nsm.trace import Array


class LaneTokens:
    """Tokens since the reset of each lane. An instance never changes.

    Calls that all lanes take whole are the usual case; they cost two additions.

    Args:
        counts: [B] int64.

    Attributes:
        most: the largest count.
    """

    __slots__ = ("_counts", "_more", "most")

    def __init__(self, counts: Array) -> None:
        self._counts, self._more = counts, 0
        self.most = int(counts.max())

    @property
    def lanes(self) -> Array:
        """[B] int64: the count of each lane."""
        counts: Array = self._counts + self._more
        return counts

    def plus(self, counts: Array) -> LaneTokens:
        """The counts after so many tokens more, [B]."""
        return LaneTokens(self.lanes + counts)

    def plus_all(self, length: int) -> LaneTokens:
        """The counts after so many tokens more on every lane."""
        later = LaneTokens.__new__(LaneTokens)
        later._counts, later._more, later.most = self._counts, self._more + length, self.most + length
        return later

    def with_lane(self, lane: int, count: int) -> LaneTokens:
        """The counts with another one for a lane."""
        counts = self.lanes
        counts[lane] = count
        return LaneTokens(counts)


class Capacity:
    """The tokens that a lane may have from one reset to the next.

    Args:
        spec: of a session, with a capacity.
        initial: the states' initial values, by name.
    """

    def __init__(self, spec: StepSpec, initial: Mapping[str, Array]) -> None:
        assert spec.capacity is not None
        self.tokens = spec.capacity
        self._batch = spec.batch
        self._counters = [state for state in spec.states if state.per_token is not None]
        self._initial = {state.name: initial[state.name] for state in self._counters}

    def after(self, had: LaneTokens, counts: Array, all_lanes: bool) -> LaneTokens:
        """The counts after a call.

        Args:
            had: the counts before it.
            counts: [B], how many tokens of the call count.
            all_lanes: whether all tokens of the call count on all lanes.

        Raises:
            StreamError: a lane would pass the capacity.
        """
        if all_lanes and had.most + (length := int(counts[0])) <= self.tokens:
            return had.plus_all(length)
        self.check(had, counts)
        return had.plus(counts)

    def check(self, had: LaneTokens, counts: Array) -> None:
        """Raise `StreamError` if a lane would pass the capacity with so many tokens more, [B]."""
        lanes = had.lanes
        full = np.flatnonzero((counts > 0) & (lanes + counts > self.tokens)).tolist()
        if full:
            resets = ", ".join(f"reset({lane})" for lane in full)
            raise StreamError(
                f"A lane takes at most {self.tokens:,} tokens from one reset to the next (the model's capacity, or "
                f"the artifact's limit; see nsm inspect). Lanes {full} have had {lanes[full].tolist()} and are given "
                f"{counts[full].tolist()} more. Start them afresh with {resets}, or give them fewer tokens. Nothing "
                "has happened to the state.",
                full,
            )

    def given(self, tokens: ArrayLike | None, arrays: Mapping[str, Array]) -> LaneTokens:
        """The counts of lanes with these whole states: as given, or else as the states count them.

        Raises:
            InputError: neither says it, or the given counts are invalid.
        """
        if tokens is None:
            if not self._counters:
                raise InputError(
                    f"The model takes at most {self.tokens:,} tokens a lane, and none of its states counts them. Say "
                    "how many tokens each lane has had: load_state(arrays, tokens=[...])."
                )
            return LaneTokens(self._counted(arrays))
        counts = as_array("tokens", tokens)
        if counts.shape != (self._batch,) or counts.dtype.kind not in "iu" or counts.min() < 0:
            raise InputError(
                f"tokens holds how many tokens each of the {self._batch} lanes has had, 0 or more; given "
                f"{counts.tolist()}."
            )
        return LaneTokens(counts.astype(np.int64))

    def restored(
        self, had: LaneTokens, held: Sequence[int] | None, arrays: Mapping[str, Array], lane: int | None
    ) -> LaneTokens:
        """The counts after a snapshot was put into one lane, or into all.

        Args:
            had: the counts before it.
            held: those of the snapshot, None where it was taken from a session that does not count.
            arrays: the whole states as they are then.
            lane: that is replaced, None for all.

        Raises:
            SnapshotError: neither the snapshot nor a state says it.
        """
        if held is None and not self._counters:
            raise SnapshotError(
                f"The model takes at most {self.tokens:,} tokens a lane, and the snapshot does not say how many its "
                "lanes have had: it was taken from a session without that limit. Take it from one with it."
            )
        if lane is None:
            return LaneTokens(np.array(held, np.int64) if held is not None else self._counted(arrays))
        return had.with_lane(lane, held[0] if held is not None else int(self._counted(arrays)[lane]))

    def _counted(self, arrays: Mapping[str, Array]) -> Array:
        """[B]: the tokens of the state that counts most of them."""
        counts = []
        for state in self._counters:
            assert state.per_token is not None
            # By Python's numbers: a state from elsewhere may be anywhere in its range.
            grown = arrays[state.name].astype(object) - self._initial[state.name].astype(object)
            lanes = np.moveaxis(grown, state.batch_axis, 0).reshape(self._batch, -1)
            counts.append([max(0, -(-max(lane) // state.per_token)) for lane in lanes])
        most = [min(max(lane), np.iinfo(np.int64).max // 2) for lane in zip(*counts, strict=True)]
        return np.array(most, np.int64)
