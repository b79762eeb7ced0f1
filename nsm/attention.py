"""HybridAttention: exact attention over a short window, and reading from the bank, fused."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor, nn

from nsm.errors import ConfigError
from nsm.mixing import last_rows
from nsm.router import MASKED_SCORE

_ROTARY_BASE = 1000.0


class HybridAttention(nn.Module):
    """Local attention over the last W tokens and attention over the bank, fused by one learned map of both.

    Letters: B lanes, T tokens, W window, S slots, H heads, d = `token_dim`, D = `state_dim`.

    *Local*: causal, over a sliding window of W tokens, the current one included. Positions are rotary and count
    from the window's start, so nothing depends on how old the stream is. W - 1 unrotated keys and values are
    carried as state; `filled` says how many of them are there, so an empty window is nothing and not zeros.

    *Read*: the first D // 2 numbers of a slot are its address, the others its content, so the bank needs no
    projection. Every head has a query for its part of the address and gets its part of the content. `importance`
    is a prior on the scores. A masked slot is selected to zero before it is used: whatever finite numbers it
    holds, they change nothing. The read uses the largest divisor of `num_heads` that splits both halves.

    Block-recurrent transformers (Hutchins et al. 2022) pair the same two kinds of attention.

    Args:
        token_dim: d; `num_heads` must divide it.
        state_dim: D.
        num_heads: H.
        window: W >= 2.
        chunk_size: the longest run of tokens for which the rotary table is kept.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, token_dim: int, state_dim: int, num_heads: int = 8, window: int = 16, chunk_size: int = 16
    ) -> None:
        super().__init__()
        if token_dim < 1 or state_dim < 2:
            raise ConfigError(
                "Attention needs token_dim >= 1 and state_dim >= 2 (address and content); "
                f"given token_dim={token_dim}, state_dim={state_dim}."
            )
        if num_heads < 1 or token_dim % num_heads:
            raise ConfigError(f"num_heads must divide token_dim={token_dim}; given {num_heads}.")
        if window < 2:
            raise ConfigError(f"window counts the current token and at least one before it; given {window}.")
        self.num_heads = num_heads
        self.window = window
        self.address_dim = state_dim // 2
        self.content_dim = state_dim - self.address_dim
        self.read_heads = gcd(num_heads, self.address_dim, self.content_dim)
        self.qkv = nn.Linear(token_dim, 3 * token_dim, bias=False)
        self.read_query = nn.Linear(token_dim, self.address_dim, bias=False)
        self.fuse = nn.Linear(token_dim + self.content_dim, token_dim, bias=False)
        cos, sin = rotary_table(window - 1 + chunk_size, token_dim // num_heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from the beginning of a stream: tokens [B, T, d], states [B, S, D], mask [B, S] -> [B, T, d]."""
        batch, length, dim = tokens.shape
        window = tokens.new_zeros(batch, self.window - 1, dim)
        nothing = torch.zeros(batch, dtype=torch.int64, device=tokens.device)
        if mask is None:
            mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        importance = states.new_zeros(states.shape[1])
        local, _, _ = self.local(tokens, window, window, nothing, nothing + length)
        return self.combine(local, self.read(tokens, states, mask, importance))

    def local(
        self, tokens: Tensor, key: Tensor, value: Tensor, filled: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention over the window.

        Args:
            tokens: [B, T, d].
            key, value: [B, W - 1, d], the carried rows, newest last.
            filled: [B], how many of the carried rows are there.
            valid: [B], how many of the tokens count.

        Returns:
            [B, T, d] and the keys and values to carry on.
        """
        length, carried = tokens.shape[1], self.window - 1
        query, new_key, new_value = self.qkv(tokens).chunk(3, -1)
        keys, values = torch.cat([key, new_key], 1), torch.cat([value, new_value], 1)
        cos, sin = self._table(carried + length)
        q = rotate(split_heads(query, self.num_heads), cos[carried:], sin[carried:])
        k = rotate(split_heads(keys, self.num_heads), cos, sin)
        place = torch.arange(carried + length, device=tokens.device)
        turn = torch.arange(length, device=tokens.device)[:, None]
        in_window = (place >= turn) & (place <= turn + carried)
        there = place >= (carried - filled)[:, None]
        visible = in_window & there[:, None, :]
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        scores = torch.where(visible[:, None], scores, MASKED_SCORE)
        mixed = join_heads(scores.softmax(-1) @ split_heads(values, self.num_heads))
        return mixed, last_rows(keys, valid, carried), last_rows(values, valid, carried)

    def read(self, tokens: Tensor, states: Tensor, mask: Tensor, importance: Tensor) -> Tensor:
        """Attention of the tokens [B, T, d] over the bank [B, S, D] -> [B, T, D - D // 2].

        Args:
            mask: [B, S] bool, the active slots.
            importance: [S], logits; their log-sigmoid is added to the scores.
        """
        states = torch.where(mask.unsqueeze(-1), states, 0.0)
        address, content = torch.split(states, [self.address_dim, self.content_dim], -1)
        query = split_heads(self.read_query(tokens), self.read_heads)
        address = split_heads(address, self.read_heads)
        scores = query @ address.transpose(-1, -2) * query.shape[-1] ** -0.5
        scores = scores + nn.functional.logsigmoid(importance)
        scores = torch.where(mask[:, None, None, :], scores, MASKED_SCORE)
        return join_heads(scores.softmax(-1) @ split_heads(content, self.read_heads))

    def combine(self, local: Tensor, read: Tensor) -> Tensor:
        """The learned fusion: one linear map of what the window and what the bank gave."""
        fused: Tensor = self.fuse(torch.cat([local, read], -1))
        return fused

    def _table(self, length: int) -> tuple[Tensor, Tensor]:
        if length <= self.cos.shape[0]:
            return self.cos[:length], self.sin[:length]
        cos, sin = rotary_table(length, 2 * self.cos.shape[1])
        return cos.to(self.cos), sin.to(self.sin)


def rotary_table(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary position embedding (Su et al. 2021), each [length, head_dim // 2]."""
    half = head_dim // 2
    angles = torch.arange(length)[:, None] * _ROTARY_BASE ** (-torch.arange(half) / max(half, 1))
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x[..., N, e] by the angles of its N places; an odd last number stays as it is."""
    half = cos.shape[-1]
    a, b, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], -1)
    turned = [a * cos - b * sin, a * sin + b * cos]
    return torch.cat([*turned, rest] if rest.shape[-1] else turned, -1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H * e] -> [B, H, N, e]."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[B, H, N, e] -> [B, N, H * e]."""
    joined: Tensor = x.transpose(1, 2).flatten(2)
    return joined
