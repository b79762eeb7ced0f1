"""StreamLayer: the interface between a `StreamModel` and its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from nsm.spec import StateSpec

LayerState = dict[str, Tensor]
"""A layer's part of the state by role; see `NSMLayer`."""


class Clock(NamedTuple):
    """The position of each lane at the beginning of a call. Every member is [B] int64.

    Attributes:
        filled: valid rows of the attention window.
        offset: tokens in the open chunk.
        chunk: chunks since the start of the stream, modulo the common cycle of the model's periods; None if every
            period is one chunk.
    """

    filled: Tensor
    offset: Tensor
    chunk: Tensor | None


class Routed(NamedTuple):
    """Routing weights of the tokens of n chunks, [B, n, R, C, S1], and the active slots, [B, n, S] bool."""

    weights: Tensor
    mask: Tensor


class StreamLayer(Protocol):
    """A layer of a `StreamModel`; `NSMLayer` documents the members."""

    chunk_size: int
    causal: bool

    @property
    def carried_rows(self) -> int: ...
    @property
    def periods(self) -> tuple[int, ...]: ...
    @property
    def routing_shape(self) -> tuple[int, int] | None: ...
    @property
    def adapts(self) -> bool: ...
    def state_specs(self, prefix: str, batch: int) -> list[StateSpec]: ...
    def initial_state(self, batch: int) -> LayerState: ...
    def touched(self, entry: str, roles: Sequence[str], partial: bool) -> tuple[list[str], list[str]]: ...
    def scan(
        self, tokens: Tensor, state: LayerState, clock: Clock, valid: Tensor | None = None
    ) -> tuple[Tensor, LayerState, Routed | None]: ...
    def decode(
        self, tokens: Tensor, state: LayerState, clock: Clock, valid: Tensor | None = None
    ) -> tuple[Tensor, LayerState, Tensor | None]: ...
    def commit(self, state: LayerState, full: Tensor, clock: Clock) -> LayerState: ...
