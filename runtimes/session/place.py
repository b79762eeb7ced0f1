"""Place: the offset of each lane within its chunk, and its number of tokens so far."""

from __future__ import annotations

import numpy as np

from nsm.errors import StreamError
from nsm.runtimes.session.lane_tokens import LaneTokens
from nsm.spec import StepSpec
from nsm.trace import Array


class Place:
    """Positions of the lanes; immutable. The session replaces it together with the state.

    Args:
        offsets: [B] int64, number of tokens in the open chunk of each lane.
        chunk: C, the tokens of a chunk.
        tokens: tokens since the reset of each lane; None if the model has no capacity.

    Attributes:
        aligned: whether all lanes are at the start of a chunk.
        full: whether a chunk is full and not yet committed.
    """

    __slots__ = ("aligned", "chunk", "full", "offsets", "tokens")

    def __init__(self, offsets: Array, chunk: int, tokens: LaneTokens | None = None) -> None:
        self.offsets, self.chunk, self.tokens = offsets, chunk, tokens
        self.aligned = not offsets.any()
        self.full = not self.aligned and bool((offsets == chunk).any())

    def reset(self, lane: int) -> Place:
        """Return the place with one lane at the start of its stream."""
        offsets = np.where(np.arange(len(self.offsets)) == lane, 0, self.offsets)
        return Place(offsets, self.chunk, None if self.tokens is None else self.tokens.with_lane(lane, 0))

    def moved(self, counts: Array) -> Place:
        """Return the place after `counts` [B] further tokens; full chunks are not committed yet."""
        return Place(self.offsets + counts, self.chunk, self.tokens)

    def counted(self, tokens: LaneTokens) -> Place:
        """Return the place with other token counts."""
        place = Place.__new__(Place)
        place.offsets, place.chunk, place.tokens = self.offsets, self.chunk, tokens
        place.aligned, place.full = self.aligned, self.full
        return place

    def committed(self) -> Place:
        """Return the place after full chunks are committed."""
        return Place(np.where(self.offsets == self.chunk, 0, self.offsets), self.chunk, self.tokens)

    def check_at_beginning(self, counts: Array, spec: StepSpec) -> None:
        """Raise `StreamError` if a lane with tokens is inside a chunk.

        Args:
            counts: [B], number of tokens of each lane.
            spec: spec of the model.
        """
        inside = (self.offsets > 0) & (counts > 0)
        if np.any(inside):
            lanes = np.flatnonzero(inside).tolist()
            way_out = (
                "Use feed or run, which align any split, reset these lanes, or give them valid=0."
                if spec.has("decode")
                else "This bundle has no entry decode, so a partial chunk ends a stream: reset these lanes, or give "
                "them valid=0."
            )
            raise StreamError(
                f"The streams on lanes {lanes} are inside a chunk of {self.chunk} tokens (offsets "
                f"{self.offsets.tolist()}), and step starts at the start of a chunk. {way_out}",
                lanes,
            )
