"""LocalAttention over a short window, and HybridAttention, which adds attention to the bank and fuses the two.

Equations (2), (3) and (5) of the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nsm.errors import ConfigError
from nsm.modules.bank import MASKED_SCORE
from nsm.modules.ops import (
    Counted,
    chunks,
    clear_lanes,
    join_heads,
    keep_open,
    merge_chunks,
    select_lanes,
    split_heads,
    to_bank,
)
from nsm.spec import StateSpec


class Heads(NamedTuple):
    """Queries, keys and values of a run of tokens, [..., H, T, e] each."""

    query: Tensor
    key: Tensor
    value: Tensor


class LocalAttention(nn.Module):
    """Causal attention over the last W tokens, the current one included, in a stream cut into chunks.

    Letters: B lanes, T tokens, C = `chunk_size`, W = `window`, H heads, d = `token_dim`, e = d / H, and
    P = `rows`, those of the earlier chunks that a window can reach, a multiple of C.

    The state holds the keys and values of the last P tokens before the open chunk, and separately those of the open
    chunk, so that rows are shifted once per chunk only. Positions are relative: each head learns one bias per distance
    (Shaw et al. 2018; Raffel et al. 2020), so the result does not depend on the age of the stream. `filled` counts the
    valid rows among the P; rows before the start of the stream are masked.

    Rotary positions (Su et al. 2021) would cost more: the carried keys would be rotated again in each call. The biases
    are one constant table in an exported step, and one addition; a decode reads one row of the table.

    With `causal=False`, tokens also see the later tokens of their own chunk.

    State by role: key, value [B, H, P, e]; open_key, open_value [B, H, C, e], zero from the offset on.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    distance: Tensor

    def __init__(
        self, token_dim: int, num_heads: int = 8, window: int = 16, chunk_size: int = 16, causal: bool = True
    ) -> None:
        super().__init__()
        if num_heads < 1 or token_dim < 1 or token_dim % num_heads:
            raise ConfigError(f"num_heads must divide token_dim={token_dim}; given {num_heads}.")
        if chunk_size < 1 or window < max(2, chunk_size):
            raise ConfigError(
                "window counts the current token and at least one before it, and reaches back at least chunk_size "
                f"tokens, so that what is not yet committed is still in it; given window={window}, "
                f"chunk_size={chunk_size}."
            )
        self.num_heads = num_heads
        self.window = window
        self.chunk_size = chunk_size
        self.rows = -(-(window - 1) // chunk_size) * chunk_size
        self.qkv = nn.Linear(token_dim, 3 * token_dim, bias=False)
        ahead = 0 if causal else chunk_size - 1
        self.ahead = ahead
        # By distance, from `ahead` tokens later to window - 1 tokens earlier. The initial slopes differ by head (Press
        # et al. 2022).
        slopes = 2.0 ** (-8.0 * torch.arange(1, num_heads + 1) / num_heads)
        self.bias = nn.Parameter(-slopes[:, None] * torch.arange(-ahead, window).abs())
        place = torch.arange(self.rows + chunk_size)
        turn = self.rows + torch.arange(chunk_size)[:, None]
        self.register_buffer("distance", turn - place, persistent=False)

    def heads(self, projected: Tensor) -> Heads:
        """Split the output of `qkv`, [N, T, 3 d], into heads [N, H, T, e] each."""
        return Heads(*split_heads(projected, 3 * self.num_heads).split(self.num_heads, 1))

    def tables(self) -> tuple[Tensor, Tensor]:
        """The bias by distance, [H, C, P + C], and the index of each row, -1 outside the window, [C, P + C]."""
        inside = (self.distance >= -self.ahead) & (self.distance < self.window)
        index = (self.distance + self.ahead).clamp(0, self.bias.shape[1] - 1)
        place = torch.arange(self.rows + self.chunk_size, device=self.distance.device)
        return self.bias[:, index], torch.where(inside, place, -1)

    def attend(self, heads: Heads, keys: Tensor, values: Tensor, bias: Tensor, visible: Tensor) -> Tensor:
        """Attention of queries [N, H, T, e] over rows keys, values [N, H, P + C, e] -> heads [N, H, T, e].

        Args:
            bias: [.., H, T, P + C], from `tables`.
            visible: [N, 1, T, P + C] bool, the valid rows inside the window.
        """
        scores = heads.query @ keys.transpose(-1, -2) * heads.query.shape[-1] ** -0.5
        scores = torch.where(visible, scores + bias, MASKED_SCORE)
        return scores.softmax(-1) @ values

    def state_specs(self, prefix: str, batch: int) -> list[StateSpec]:
        """The states, named `{prefix}.{role}`."""
        width = self.qkv.in_features // self.num_heads
        window, opened = ((batch, self.num_heads, rows, width) for rows in (self.rows, self.chunk_size))
        shapes = {"key": window, "value": window, "open_key": opened, "open_value": opened}
        return [StateSpec(f"{prefix}.{role}", shape, "float32") for role, shape in shapes.items()]

    def scan(
        self, heads: Heads, state: dict[str, Tensor], filled: Tensor, counted: Counted | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Attention of n whole chunks.

        Args:
            heads: [B * n, H, C, e] each.
            state: by role.
            filled: [B], the number of valid carried rows.
            counted: the valid tokens (default: all).

        Returns:
            Heads [B * n, H, C, e], and the new state by role, without the open chunk if `counted` is None.
        """
        count = heads.key.shape[0] // filled.shape[0]
        seen, left = {}, {}
        for role, rows in (("key", heads.key), ("value", heads.value)):
            seen[role], windows = self._windows(state[role], chunks(rows, count))
            left[role] = windows[-1] if counted is None else state[role]
            if counted is not None:
                for index, window in enumerate(windows):
                    left[role] = select_lanes(counted.full[:, index], window, left[role])
                left[f"open_{role}"] = keep_open(counted.opened, rows, state[f"open_{role}"])
        if count > 1:
            filled = (filled[:, None] + self.chunk_size * torch.arange(count, device=filled.device)).flatten()
        bias, place = self.tables()
        visible = place >= self._first(filled)
        if counted is not None:
            own = counted.tokens.reshape(-1, self.chunk_size)
            visible = visible & torch.cat([own.new_ones(own.shape[0], self.rows), own], 1)[:, None, None]
        return self.attend(heads, seen["key"], seen["value"], bias, visible), left

    def decode(
        self, heads: Heads, state: dict[str, Tensor], filled: Tensor, offset: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Attention of one token a lane, [B, H, 1, e] each, at `offset` [B] of the open chunk.

        Returns:
            Heads [B, H, 1, e] and the open chunk with the token in it, by role.
        """
        place = torch.arange(self.chunk_size, device=offset.device)
        here = place == offset[:, None]
        if valid is not None:
            here = here & (valid > 0)[:, None]
        here = here[:, None, :, None]
        opened = {
            "open_key": torch.where(here, heads.key, state["open_key"]),
            "open_value": torch.where(here, heads.value, state["open_value"]),
        }
        keys = torch.cat([state["key"], opened["open_key"]], 2)
        values = torch.cat([state["value"], opened["open_value"]], 2)
        # The offset of a full chunk has no row in the table; its lane is idle, so any row serves.
        bias, table = self.tables()
        row = offset.clamp(max=self.chunk_size - 1)
        visible = table[row][:, None, None] >= self._first(filled)
        return self.attend(heads, keys, values, bias[:, row].transpose(0, 1).unsqueeze(2), visible), opened

    def commit(self, state: dict[str, Tensor], full: Tensor) -> dict[str, Tensor]:
        """End the chunk on the lanes [B] bool where it is full."""
        result = {}
        for role in ("key", "value"):
            opened = state[f"open_{role}"]
            _, (window,) = self._windows(state[role], [opened])
            result[role] = select_lanes(full, window, state[role])
            result[f"open_{role}"] = clear_lanes(full, opened)
        return result

    def _windows(self, carried: Tensor, rows: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The rows that each of n chunks [B, H, C, e] sees, [B * n, H, P + C, e], and the window after each chunk."""
        joined = torch.cat([carried, *rows], 2)
        size = self.chunk_size
        starts = range(0, len(rows) * size, size)
        seen = [joined[:, :, start : start + self.rows + size] for start in starts] if len(rows) > 1 else [joined]
        if self.rows == size:
            return merge_chunks(seen), list(rows)
        return merge_chunks(seen), [joined[:, :, start + size : start + size + self.rows] for start in starts]

    def _first(self, filled: Tensor) -> Tensor:
        """The index of the first valid row, [B, 1, 1, 1], from the number of valid carried rows, [B]."""
        return (self.rows - filled).clamp(min=0)[:, None, None, None]

    def forward(self, tokens: Tensor) -> Tensor:
        """Attend over a whole sequence, [B, T, d] -> [B, T, d], slow and simple: the reference for `scan`, `decode`."""
        length = tokens.shape[1]
        heads = self.heads(self.qkv(tokens))
        place = torch.arange(length, device=tokens.device)
        distance = place[:, None] - place
        same_chunk = place[:, None] // self.chunk_size == place // self.chunk_size
        inside = (distance < self.window) & ((distance >= 0) | (same_chunk & (distance >= -self.ahead)))
        index = (distance + self.ahead).clamp(0, self.bias.shape[1] - 1)
        return join_heads(self.attend(heads, heads.key, heads.value, self.bias[:, index], inside[None, None]))


class HybridAttention(nn.Module):
    """Local attention over the last W tokens and attention over the bank, fused by one learned map of both.

    Letters: B lanes, T tokens, W window, S slots, H heads, d = `token_dim`, D = `state_dim`, R bank heads of
    f = D / (2 R) numbers.

    *Local*: see `LocalAttention`.

    *Read*: the first half of a slot is its address, the second its content, so the bank needs no projection. Each
    bank head compares its query with its part of the address and returns its part of the content. The log-sigmoid of
    `importance` is added to the scores. The score of an inactive slot is replaced, so its weight is exactly 0 and its
    values have no effect. R is the largest divisor of `bank_heads` (default: of `num_heads`) that splits the halves.

    Block-recurrent transformers (Hutchins et al. 2022) pair the same two kinds of attention.

    Args:
        token_dim: d; `num_heads` must divide it.
        state_dim: D, even.
        num_heads: H.
        window: W >= 2.
        chunk_size: C <= W.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    def __init__(
        self,
        token_dim: int,
        state_dim: int,
        num_heads: int = 8,
        window: int = 16,
        chunk_size: int = 16,
        *,
        bank_heads: int | None = None,
        causal: bool = True,
    ) -> None:
        super().__init__()
        if token_dim < 1 or state_dim < 2 or state_dim % 2:
            raise ConfigError(
                "Attention needs token_dim >= 1 and an even state_dim >= 2 (halves for address and content); "
                f"given token_dim={token_dim}, state_dim={state_dim}."
            )
        self.local = LocalAttention(token_dim, num_heads, window, chunk_size, causal)
        self.half_dim = state_dim // 2
        self.bank_heads = gcd(num_heads if bank_heads is None else bank_heads, self.half_dim)
        self.one_width = token_dim // num_heads == self.half_dim // self.bank_heads
        self.read_query = nn.Linear(token_dim, self.half_dim, bias=False)
        self.fuse = nn.Linear(token_dim + self.half_dim, token_dim, bias=False)

    def forward(self, tokens: Tensor, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from the beginning of a stream: tokens [B, T, d], states [B, S, D], mask [B, S] -> [B, T, d]."""
        if mask is None:
            mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        query = split_heads(self.read_query(tokens), self.bank_heads)
        importance = states.new_zeros(states.shape[1])
        read = self.read(query, to_bank(states, self.bank_heads), mask, importance)
        fused: Tensor = self.fuse(torch.cat([self.local(tokens), join_heads(read)], -1))
        return fused

    @staticmethod
    def read(query: Tensor, bank: Tensor, mask: Tensor, importance: Tensor) -> Tensor:
        """Attention of queries [N, R, T, f] over a bank [N, 2 R, S, f] -> heads [N, R, T, f].

        Args:
            mask: [N, S] bool, the active slots.
            importance: [S], logits; their log-sigmoid is added to the scores.
        """
        address, content = bank.chunk(2, 1)
        scores = query @ address.transpose(-1, -2) * query.shape[-1] ** -0.5
        scores = torch.where(mask[:, None, None, :], scores, MASKED_SCORE)
        # backend: the prior is added after the selection; OpenVINO's fused attention in bf16 is wrong otherwise.
        scores = nn.functional.logsigmoid(importance) + scores
        found: Tensor = scores.softmax(-1) @ content
        return found

    def heads(self, made: Tensor) -> tuple[Heads, Tensor, Tensor]:
        """Split the joined projection [N, T, 3 d + 3 D / 2] into heads.

        Returns:
            queries, keys and values of the window [N, H, T, e] each; queries of the bank [N, R, T, f]; values to
            write [N, 2 R, T, f].
        """
        local, bank = self.local.num_heads, self.bank_heads
        if self.one_width:  # backend: one transpose for all heads
            *parts, query, values = split_heads(made, 3 * (local + bank)).split([*[local] * 3, bank, 2 * bank], 1)
            return Heads(*parts), query, values
        window, rest = made.split([3 * self.local.qkv.in_features, 3 * self.half_dim], -1)
        query, values = split_heads(rest, 3 * bank).split([bank, 2 * bank], 1)
        return self.local.heads(window), query, values

    def combine(self, local: Tensor, read: Tensor) -> Tensor:
        """Fuse the results of the window and of the bank with one linear map.

        Args:
            local: heads [N, H, T, e].
            read: heads [N, R, T, f].

        Returns:
            [N, T, d].
        """
        parts = [torch.cat([local, read], 1)] if self.one_width else [local, read]
        joined = [join_heads(part) for part in parts]
        fused: Tensor = self.fuse(joined[0] if self.one_width else torch.cat(joined, -1))
        return fused
