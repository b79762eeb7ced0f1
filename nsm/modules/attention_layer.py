"""AttentionLayer: a transformer layer with a bounded window, for streams."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor, nn

from nsm.errors import ConfigError
from nsm.modules.attention import LocalAttention
from nsm.modules.ops import count_tokens, join_heads
from nsm.modules.protocol import Clock, LayerState
from nsm.spec import StateSpec


class AttentionLayer(nn.Module):
    """Pre-norm attention over the last W tokens, and a feed-forward part (Vaswani et al. 2017; Xiong et al. 2020).

    The state is that of `LocalAttention`: keys and values of the window, and of the open chunk.

    Args:
        token_dim: d.
        num_heads: H, must divide d.
        window: W >= chunk_size.
        chunk_size: C.
        feed_forward: width of the feed-forward part as a multiple of d.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    def __init__(
        self,
        token_dim: int,
        num_heads: int = 8,
        window: int = 128,
        chunk_size: int = 16,
        feed_forward: float = 4.0,
        causal: bool = True,
    ) -> None:
        super().__init__()
        if not isfinite(feed_forward * token_dim) or feed_forward <= 0:
            raise ConfigError(f"feed_forward must be finite and > 0; given {feed_forward}.")
        self.chunk_size = chunk_size
        self.causal = causal
        self.norm = nn.LayerNorm(token_dim)
        self.attention = LocalAttention(token_dim, num_heads, window, chunk_size, causal)
        self.out = nn.Linear(token_dim, token_dim, bias=False)
        hidden = max(1, round(feed_forward * token_dim))
        self.forward_norm = nn.LayerNorm(token_dim)
        self.feed_forward = nn.Sequential(nn.Linear(token_dim, hidden), nn.GELU(), nn.Linear(hidden, token_dim))

    @property
    def carried_rows(self) -> int:
        return self.attention.rows

    @property
    def periods(self) -> tuple[int, ...]:
        return ()

    @property
    def routing_shape(self) -> None:
        """None: the layer has no slots."""
        return None

    @property
    def adapts(self) -> bool:
        """False: the layer has no slots."""
        return False

    def state_specs(self, prefix: str, batch: int) -> list[StateSpec]:
        return self.attention.state_specs(prefix, batch)

    def touched(self, entry: str, roles: Sequence[str], partial: bool) -> tuple[list[str], list[str]]:
        settled, opened = ["key", "value"], ["open_key", "open_value"]
        if entry == "decode":
            return list(roles), opened
        if entry == "commit":
            return list(roles), list(roles)
        return (list(roles), list(roles)) if partial else (settled, settled)

    def initial_state(self, batch: int) -> LayerState:
        bias = self.attention.bias
        return {
            spec.name[1:]: torch.zeros(spec.shape, dtype=bias.dtype, device=bias.device)
            for spec in self.state_specs("", batch)
        }

    def scan(
        self, tokens: Tensor, state: LayerState, clock: Clock, valid: Tensor | None = None
    ) -> tuple[Tensor, LayerState, None]:
        """Process whole chunks; see `NSMLayer.scan`."""
        count = tokens.shape[1] // self.chunk_size
        projected = self.attention.qkv(self.norm(tokens)).reshape(-1, self.chunk_size, 3 * tokens.shape[-1])
        counted = None if valid is None else count_tokens(valid, count, self.chunk_size)
        attended, state = self.attention.scan(self.attention.heads(projected), state, clock.filled, counted)
        return self._rest(tokens, join_heads(attended).reshape(tokens.shape)), state, None

    def decode(
        self, tokens: Tensor, state: LayerState, clock: Clock, valid: Tensor | None = None
    ) -> tuple[Tensor, LayerState, None]:
        """Process one token per lane; see `NSMLayer.decode`."""
        heads = self.attention.heads(self.attention.qkv(self.norm(tokens)))
        attended, state = self.attention.decode(heads, state, clock.filled, clock.offset, valid)
        return self._rest(tokens, join_heads(attended)), state, None

    def commit(self, state: LayerState, full: Tensor, clock: Clock) -> LayerState:  # noqa: ARG002
        """End the chunk on the lanes where it is full."""
        return self.attention.commit(state, full)

    def _rest(self, tokens: Tensor, attended: Tensor) -> Tensor:
        tokens = tokens + self.out(attended)
        fed: Tensor = tokens + self.feed_forward(self.forward_norm(tokens))
        return fed
