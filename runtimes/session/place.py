"""Place: where the lanes of a session are in their chunks, and how many tokens they have had."""

from __future__ import annotations

import numpy as np

from nsm.errors import StreamError
from nsm.runtimes.session.lane_tokens import LaneTokens
from nsm.spec import StepSpec
from nsm.trace import Array


class Place:
    """Where the lanes are. A session never changes one: it replaces it together with the state.

    Args:
        offsets: [B] int64, how many tokens the open chunk of each lane has.
        chunk: C, the tokens of a chunk.
        tokens: since the reset of each lane; None where the model has no capacity.

    Attributes:
        aligned: whether all lanes stand at a chunk's beginning.
        full: whether a chunk is to be committed.
    """

    __slots__ = ("aligned", "chunk", "full", "offsets", "tokens")

    def __init__(self, offsets: Array, chunk: int, tokens: LaneTokens | None = None) -> None:
        self.offsets, self.chunk, self.tokens = offsets, chunk, tokens
        self.aligned = not offsets.any()
        self.full = not self.aligned and bool((offsets == chunk).any())

    def reset(self, lane: int) -> Place:
        """The place with one lane at the beginning of its stream."""
        offsets = np.where(np.arange(len(self.offsets)) == lane, 0, self.offsets)
        return Place(offsets, self.chunk, None if self.tokens is None else self.tokens.with_lane(lane, 0))

    def moved(self, counts: Array) -> Place:
        """The place after so many tokens [B]; a chunk that is full is still to be committed."""
        return Place(self.offsets + counts, self.chunk, self.tokens)

    def counted(self, tokens: LaneTokens) -> Place:
        """The place with other counts of tokens."""
        place = Place.__new__(Place)
        place.offsets, place.chunk, place.tokens = self.offsets, self.chunk, tokens
        place.aligned, place.full = self.aligned, self.full
        return place

    def committed(self) -> Place:
        """The place after the full chunks have ended."""
        return Place(np.where(self.offsets == self.chunk, 0, self.offsets), self.chunk, self.tokens)

    def check_at_beginning(self, counts: Array, spec: StepSpec) -> None:
        """Raise `StreamError` if a lane that has tokens stands inside a chunk.

        Args:
            counts: [B], how many tokens each lane has.
            spec: of the model.
        """
        inside = (self.offsets > 0) & (counts > 0)
        if np.any(inside):
            lanes = np.flatnonzero(inside).tolist()
            way_out = (
                "Use feed or run, which align any split, reset these lanes, or give them valid=0."
                if spec.has("decode")
                else "There is no entry decode here, so a partial chunk ends a stream: reset these lanes, or give them "
                "valid=0."
            )
            raise StreamError(
                f"The streams on lanes {lanes} stand inside a chunk of {self.chunk} tokens (offsets "
                f"{self.offsets.tolist()}), and step starts at a chunk's beginning. {way_out}",
                lanes,
            )
