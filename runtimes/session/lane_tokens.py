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
    """Number of tokens since the reset of each lane; immutable.

    The usual call, with all tokens valid on all lanes, costs two additions.

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
        """Return the counts after further tokens, [B]."""
        return LaneTokens(self.lanes + counts)

    def plus_all(self, length: int) -> LaneTokens:
        """Return the counts after the same number of further tokens on every lane."""
        later = LaneTokens.__new__(LaneTokens)
        later._counts, later._more, later.most = self._counts, self._more + length, self.most + length
        return later

    def with_lane(self, lane: int, count: int) -> LaneTokens:
        """Return the counts with the count of one lane replaced."""
        counts = self.lanes
        counts[lane] = count
        return LaneTokens(counts)


class Capacity:
    """The maximum number of tokens of a lane between two resets.

    Args:
        spec: spec of a session, with a capacity.
        initial: initial values of the states, by name.
    """

    def __init__(self, spec: StepSpec, initial: Mapping[str, Array]) -> None:
        assert spec.capacity is not None
        self.tokens = spec.capacity
        self._batch = spec.batch
        self._counters = [state for state in spec.states if state.per_token is not None]
        self._initial = {state.name: initial[state.name] for state in self._counters}

    def after(self, had: LaneTokens, counts: Array, all_lanes: bool) -> LaneTokens:
        """Return the counts after a call.

        Args:
            had: the counts before the call.
            counts: [B], number of valid tokens of the call.
            all_lanes: whether all tokens of the call are valid on all lanes.

        Raises:
            StreamError: a lane would exceed the capacity.
        """
        if all_lanes and had.most + (length := int(counts[0])) <= self.tokens:
            return had.plus_all(length)
        self.check(had, counts)
        return had.plus(counts)

    def check(self, had: LaneTokens, counts: Array) -> None:
        """Raise `StreamError` if a lane would exceed the capacity with the further tokens, [B]."""
        lanes = had.lanes
        full = np.flatnonzero((counts > 0) & (lanes + counts > self.tokens)).tolist()
        if full:
            resets = ", ".join(f"reset({lane})" for lane in full)
            raise StreamError(
                f"A lane takes at most {self.tokens:,} tokens between two resets (the model's capacity, or "
                f"the artifact's limit; see nsm inspect). Lanes {full} have had {lanes[full].tolist()} and are given "
                f"{counts[full].tolist()} more. Restart them with {resets}, or give them fewer tokens. The "
                "state is unchanged.",
                full,
            )

    def given(self, tokens: ArrayLike | None, arrays: Mapping[str, Array]) -> LaneTokens:
        """Return the given counts, or read them from the states.

        Raises:
            InputError: no counts are given and no state counts tokens, or the given counts are invalid.
        """
        if tokens is None:
            if not self._counters:
                raise InputError(
                    f"The model takes at most {self.tokens:,} tokens per lane, and none of its states counts them. "
                    "Pass the number of tokens of each lane: load_state(arrays, tokens=[...])."
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
        """Return the counts after a snapshot was restored into one lane, or into all.

        Args:
            had: the counts before the restore.
            held: the counts in the snapshot; None if its session did not count tokens.
            arrays: the whole states after the restore.
            lane: the restored lane, None for all.

        Raises:
            SnapshotError: neither the snapshot nor a state contains the counts.
        """
        if held is None and not self._counters:
            raise SnapshotError(
                f"The model takes at most {self.tokens:,} tokens per lane, and the snapshot does not contain the "
                "number of tokens of its lanes, because its session had no limit. Take one in a session with it."
            )
        if lane is None:
            return LaneTokens(np.array(held, np.int64) if held is not None else self._counted(arrays))
        return had.with_lane(lane, held[0] if held is not None else int(self._counted(arrays)[lane]))

    def _counted(self, arrays: Mapping[str, Array]) -> Array:
        """[B], the largest token count that any state holds for each lane."""
        counts = []
        for state in self._counters:
            assert state.per_token is not None
            # Python integers do not overflow: a foreign state may have any value of its dtype.
            grown = arrays[state.name].astype(object) - self._initial[state.name].astype(object)
            lanes = np.moveaxis(grown, state.batch_axis, 0).reshape(self._batch, -1)
            counts.append([max(0, -(-max(lane) // state.per_token)) for lane in lanes])
        most = [min(max(lane), np.iinfo(np.int64).max // 2) for lane in zip(*counts, strict=True)]
        return np.array(most, np.int64)
