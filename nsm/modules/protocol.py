"""StreamLayer: what a stream and its layers tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from nsm.spec import StateSpec

LayerState = dict[str, Tensor]
"""A layer's part of the state by role; see `NSMLayer`."""


class Clock(NamedTuple):
    """Where the lanes stand when a run of tokens begins. Every member is [B] int64.

    filled: rows that are there in the windows; offset: tokens in the open chunk; chunk: chunks since the start,
    modulo the common cycle of the model's periods (None where every period is one chunk).
    """

    filled: Tensor
    offset: Tensor
    chunk: Tensor | None


class Routed(NamedTuple):
    """How the tokens of n chunks chose slots, [B, n, R, C, S1], and which slots were active, [B, n, S] bool."""

    weights: Tensor
    mask: Tensor


class StreamLayer(Protocol):
    """What a layer of a `StreamModel` offers; `NSMLayer` says what each of these means."""

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
