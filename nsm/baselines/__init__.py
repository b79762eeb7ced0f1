"""Baselines: common sequence models as step models, for comparison with the NSM."""

from nsm.baselines.mamba import MambaLM
from nsm.baselines.recurrent import RecurrentLM
from nsm.baselines.rwkv import RWKVLM
from nsm.baselines.transformer import TransformerLM
from nsm.baselines.transformer_layer import TransformerLayer

__all__ = [
    "RWKVLM",
    "MambaLM",
    "RecurrentLM",
    "TransformerLM",
    "TransformerLayer",
]
