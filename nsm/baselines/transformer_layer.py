"""TransformerLayer: attention over a cache that is read in place, and over the new tokens beside it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nsm.modules.ops import join_heads


class Places(NamedTuple):
    """Values that the layers share in a call of K tokens over N cached rows.

    cos, sin: [B, 1, K, e / 2], the rotations of the new tokens.
    cached: [B, 1, K, N], the additive mask for cached rows, None without a cache.
    new: [K, K], the additive mask for new tokens.
    """

    cos: Tensor
    sin: Tensor
    cached: Tensor | None
    new: Tensor


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); [B, K, d] -> [B, K, d]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.forward_norm = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(
        self, tokens: Tensor, ring: tuple[Tensor, Tensor] | None, places: Places
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B, K, d] and the keys and values [B, H, K, e] of the new tokens; `ring`: those of the cached."""
        batch, length, _ = tokens.shape
        parts = self.qkv(self.norm(tokens)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        query = _rotate(query, places) * query.shape[-1] ** -0.5
        key = _rotate(key, places)
        scores = query @ key.transpose(-1, -2) + places.new
        if ring is None or places.cached is None:
            attended = scores.softmax(-1) @ value
        else:
            cached = query @ ring[0].transpose(-1, -2) + places.cached
            weights = torch.cat([cached, scores], -1).softmax(-1)
            rows = cached.shape[-1]
            attended = weights[..., :rows] @ ring[1] + weights[..., rows:] @ value
        tokens = tokens + self.out(join_heads(attended))
        return tokens + self.feed_forward(self.forward_norm(tokens)), key, value


def _rotate(x: Tensor, places: Places) -> Tensor:
    """Turn the pairs (x_i, x_i+e/2) of [B, H, K, e] by the angles of their positions."""
    one, other = x.chunk(2, -1)
    return torch.cat([one * places.cos - other * places.sin, other * places.cos + one * places.sin], -1)
