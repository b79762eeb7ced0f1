"""Small models with random weights, and sequences for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from nsm.models.simple import SimpleNSM

VOCABULARY = 20


CHUNK = 8


def make_model(seed: int = 0, **changes: Any) -> SimpleNSM:
    """A small model over ids with random weights, in eval mode; `changes` are arguments of SimpleNSM."""
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "num_states": 6,
        "num_layers": 2,
        "num_heads": 2,
        "chunk_size": CHUNK,
        "routing_heads": 2,
        "output_dim": 5,
    }
    return SimpleNSM(**{**arguments, **changes}).eval()


def make_sequences(count: int, length: int, seed: int = 0) -> np.ndarray:
    """Random ids [count, length]."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, (count, length))
