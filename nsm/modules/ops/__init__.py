"""Tensor functions that several modules share: layouts, sparse maps, fused linear ops."""

from nsm.modules.ops.fused_linear import FusedLinear
from nsm.modules.ops.layout import (
    Counted,
    chunks,
    clear_lanes,
    count_tokens,
    join_heads,
    keep_open,
    merge_chunks,
    select_lanes,
    slots_of,
    split_heads,
    to_bank,
    to_states,
)
from nsm.modules.ops.sparse import entmax15, sparsemax, top_k

__all__ = [
    "Counted",
    "FusedLinear",
    "chunks",
    "clear_lanes",
    "count_tokens",
    "entmax15",
    "join_heads",
    "keep_open",
    "merge_chunks",
    "select_lanes",
    "slots_of",
    "sparsemax",
    "split_heads",
    "to_bank",
    "to_states",
    "top_k",
]
