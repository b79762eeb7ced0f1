"""Small baselines with random weights."""

from __future__ import annotations

from typing import Any

from nsm.baselines import RWKVLM, MambaLM, RecurrentLM, TransformerLM
from nsm.baselines.base import CausalLM

MAKERS: dict[str, tuple[type[CausalLM], dict[str, Any]]] = {
    "transformer": (TransformerLM, {"num_heads": 2, "context": 6}),
    "transformer, wide": (TransformerLM, {"num_heads": 1, "context": 64}),
    "lstm": (RecurrentLM, {"kind": "lstm"}),
    "gru": (RecurrentLM, {"kind": "gru"}),
    "rwkv": (RWKVLM, {"num_heads": 2}),
    "mamba": (MambaLM, {"state_size": 3}),
}
