"""Text as streams of bytes, shared by the language examples: Python's standard library, or a file."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import compare
import numpy as np
from numpy.typing import NDArray

from nsm.baselines import RWKVLM, MambaLM, RecurrentLM, TransformerLM
from nsm.models import SimpleNSM, StepModel

BYTES = 256
CONTEXT = 256
_CORPUS_BYTES = 4_000_000

Ids = NDArray[np.int64]

# Models over bytes with 1.0 to 1.2 million parameters, for comparisons in training.
SMALL: Mapping[str, tuple[type[StepModel], Mapping[str, Any]]] = MappingProxyType(
    {
        "nsm": (
            SimpleNSM,
            {
                "d_model": 144,
                "state_dim": 144,
                "num_states": 32,
                "num_layers": 3,
                "num_heads": 8,
                "gate_type": "mingru",
                "max_seq_length": 1 << 20,
            },
        ),
        "nsm-2": (
            SimpleNSM,
            {
                "d_model": 144,
                "state_dim": 144,
                "num_states": 32,
                "num_layers": 2,
                "num_heads": 8,
                "feed_forward": 8.0,
                "gate_type": "mingru",
                "max_seq_length": 1 << 20,
            },
        ),
        "transformer": (TransformerLM, {"d_model": 144, "num_layers": 4, "num_heads": 8, "context": CONTEXT}),
        "lstm": (RecurrentLM, {"d_model": 204, "num_layers": 3, "kind": "lstm"}),
        "gru": (RecurrentLM, {"d_model": 236, "num_layers": 3, "kind": "gru"}),
        "rwkv": (RWKVLM, {"d_model": 144, "num_layers": 4, "num_heads": 4}),
        "mamba": (MambaLM, {"d_model": 128, "num_layers": 8}),
    }
)
# The NSM and the transformer of the same width in compare.py, 7.3 million parameters each; the NSM twice as wide, 28
# million.
COMPARED: Mapping[str, tuple[type[StepModel], Mapping[str, Any]]] = MappingProxyType(
    {
        "nsm-compared": (SimpleNSM, compare.NSM),
        "nsm-wide": (SimpleNSM, {**compare.NSM, "d_model": 768, "state_dim": 768}),
        "transformer-compared": (TransformerLM, {"d_model": 384, "num_layers": 4, "num_heads": 8, "context": CONTEXT}),
    }
)
MODELS = MappingProxyType({**SMALL, **COMPARED})


def build(name: str) -> StepModel:
    """Return a new model by name."""
    kind, arguments = MODELS[name]
    return kind(**{"vocab_size": BYTES, **arguments})


def corpus(path: Path | None = None) -> tuple[Ids, Ids]:
    """Return the bytes of a text: nine tenths for training, the rest held out. Default: Python's standard library."""
    if path is not None:
        data = path.read_bytes()
    else:
        folder = Path(sysconfig.get_paths()["stdlib"])
        data = b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))[:_CORPUS_BYTES]
    ids = np.frombuffer(data, np.uint8).astype(np.int64)
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:]


def batch(ids: Ids, count: int, length: int, generator: np.random.Generator) -> tuple[Ids, Ids]:
    """Return random windows of a text, [count, length], and the same windows one byte later."""
    starts = generator.integers(0, len(ids) - length - 1, count)[:, None] + np.arange(length)
    return ids[starts], ids[starts + 1]
