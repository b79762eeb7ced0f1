"""Layouts of heads, slots and chunks, and selection of lanes.

The D numbers of a slot are an address and a content, each split among R bank heads of f = D / (2 R) numbers. A bank
is stored as G = 2 R parts, first R of the addresses, then R of the contents: [B, G, S, f]. Reads, writes and
consolidation use this layout without a transpose. The public layout of a bank is states [B, S, D].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H * e] -> [B, H, N, e]."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[B, H, N, e] -> [B, N, H * e]."""
    joined: Tensor = x.transpose(1, 2).flatten(2)
    return joined


def to_bank(states: Tensor, heads: int) -> Tensor:
    """States [B, S, D] -> bank [B, G, S, f], for G / 2 = `heads`."""
    return split_heads(states, 2 * heads)


def to_states(bank: Tensor) -> Tensor:
    """Bank [B, G, S, f] -> states [B, S, D]."""
    return join_heads(bank)


def slots_of(mask: Tensor) -> Tensor:
    """A mask of slots [B, S], to select in a bank [B, G, S, f]."""
    return mask[:, None, :, None]


def chunks(part: Tensor, count: int) -> Sequence[Tensor]:
    """[B * n, ...] -> n tensors [B, ...]."""
    return [part] if count == 1 else part.reshape(-1, count, *part.shape[1:]).unbind(1)


def merge_chunks(parts: Sequence[Tensor]) -> Tensor:
    """Tensors [B, ...], n of them -> [B * n, ...]."""
    return parts[0] if len(parts) == 1 else torch.stack(list(parts), 1).flatten(0, 1)


def select_lanes(lanes: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` on the lanes [B] that are set, `old` on the others."""
    lanes = lanes.reshape(-1, *([1] * (new.dim() - 1)))
    if new.dtype == torch.bool:  # backend: `Where` of ONNX Runtime has no bool kernel
        return (lanes & new) | (~lanes & old)
    return torch.where(lanes, new, old)


def clear_lanes(lanes: Tensor, part: Tensor) -> Tensor:
    """Zero on the lanes [B] that are set, `part` on the others."""
    return torch.where(lanes.reshape(-1, *([1] * (part.dim() - 1))), 0.0, part)


class Counted(NamedTuple):
    """The valid tokens of n chunks, [B, n, C] bool, and the full chunks, [B, n] bool."""

    tokens: Tensor
    full: Tensor

    @property
    def opened(self) -> Tensor:
        """The tokens of chunks that stay open, [B, n, C] bool."""
        return self.tokens & ~self.full.unsqueeze(-1)


def count_tokens(valid: Tensor, count: int, size: int) -> Counted:
    """Expand `valid` [B], the number of valid tokens of each lane, to `count` chunks of `size` tokens."""
    counts = (valid[:, None] - size * torch.arange(count, device=valid.device)).clamp(0, size)
    return Counted(torch.arange(size, device=valid.device) < counts.unsqueeze(-1), counts == size)


def keep_open(rows: Tensor, part: Tensor, old: Tensor) -> Tensor:
    """The rows of the open chunk after n chunks.

    Args:
        rows: [B, n, C] bool, the tokens of chunks that stay open.
        part: [B * n, ..., C, x], by chunk.
        old: [B, ..., C, x].
    """
    for index, chunk in enumerate(chunks(part, rows.shape[1])):
        here = rows[:, index].reshape(rows.shape[0], *([1] * (chunk.dim() - 3)), rows.shape[2], 1)
        old = torch.where(here, chunk, old)
    return old
