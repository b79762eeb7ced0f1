"""Small layers of every kind, and how their tests run them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsm.modules.bank.adaptation import Adaptation
from nsm.modules.layer import NSMLayer
from nsm.modules.protocol import Clock, LayerState
from tests.nsm.variants import stir

CHUNK, DIM, SLOTS = 4, 6, 6


LENGTH = 5 * CHUNK + 3


VARIANTS: dict[str, dict[str, Any]] = {
    "gru": {},
    "lstm": {"gate_type": "lstm"},
    "mingru": {"gate_type": "mingru"},
    "never consolidated": {"consolidate_every": 0},
    "every second chunk, lstm, communication": {"consolidate_every": 2, "gate_type": "lstm", "communication": True},
    "communication, some slots masked": {"communication": True, "initial_states": 3},
    "one bank head": {"routing_heads": 1},
    "small state": {"state_dim": 2},
    "top two": {"routing": "topk", "top_k": 2},
    "wide window, narrow convolution": {"window": 7, "conv_width": 2, "feed_forward": 1},
    "hierarchy": {"hierarchy": (2, 3), "consolidate_every": 0},
    "hierarchy, mingru": {"hierarchy": (2,), "gate_type": "mingru"},
    "memory": {"memory_rows": 3},
    "adaptation": {"adaptation": Adaptation(0.3, 0.35, 0.5), "initial_states": 4},
    "adaptation, lstm": {"adaptation": Adaptation(0.3, 0.35, 0.5), "initial_states": 4, "gate_type": "lstm"},
    "both ways": {"causal": False, "window": 6},
    "both ways, memory": {"causal": False, "memory_rows": 2, "initial_states": 4},
}


causal_only = [name for name, changes in VARIANTS.items() if changes.get("causal", True)]


def make_layer(**changes: Any) -> NSMLayer:
    """In float64, so that a difference from the loop is an error and not rounding; with all weights random."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"state_dim": 8, "num_heads": 2, "num_states": SLOTS, "chunk_size": CHUNK, **changes}
    layer = NSMLayer(token_dim=DIM, **arguments)
    stir(layer)
    return layer.double()


def random_tokens(lanes: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(lanes, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clock(layer: NSMLayer, tokens: int, lanes: int) -> Clock:
    """After so many tokens, with the chunks that are full committed."""
    whole, offset = divmod(tokens, CHUNK)
    values = (min(layer.carried_rows, whole * CHUNK), offset, whole)
    return Clock(*(torch.full((lanes,), value) for value in values))


def scan(layer: NSMLayer, tokens: Tensor, chunks: int) -> tuple[Tensor, LayerState]:
    """Whole chunks, so many a call; the last one may be open."""
    lanes, length = tokens.shape[:2]
    tokens = torch.cat([tokens, random_tokens(lanes, -length % CHUNK, seed=7)], 1)
    state, outputs = layer.initial_state(lanes), []
    for start in range(0, tokens.shape[1], chunks * CHUNK):
        piece = tokens[:, start : start + chunks * CHUNK]
        valid = torch.full((lanes,), min(length - start, piece.shape[1]))
        before = state["mask"]
        output, state, routed_by = layer.scan(piece, state, clock(layer, start, lanes), valid)
        count = piece.shape[1] // CHUNK
        assert routed_by.weights.shape == (lanes, count, layer.heads, CHUNK, layer.written_slots)
        assert routed_by.mask.shape == (lanes, count, SLOTS)
        assert torch.equal(routed_by.mask[:, 0], before)
        outputs.append(output)
    return torch.cat(outputs, 1)[:, :length], state
