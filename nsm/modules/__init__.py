"""The parts of a Neural State Machine, each a `torch.nn.Module`.

A layer (`NSMLayer`) mixes its tokens, attends to a short window, reads its bank, and writes to it. The parts of a bank
are in `bank`; functions on tensors that several parts share are in `ops`.
"""

from nsm.modules.attention import HybridAttention
from nsm.modules.attention_layer import AttentionLayer
from nsm.modules.bank import StateManager, StatePropagator, TokenToStateRouter
from nsm.modules.layer import NSMLayer
from nsm.modules.mixing import LocalMixing
from nsm.modules.protocol import Clock, StreamLayer

__all__ = [
    "AttentionLayer",
    "Clock",
    "HybridAttention",
    "LocalMixing",
    "NSMLayer",
    "StateManager",
    "StatePropagator",
    "StreamLayer",
    "TokenToStateRouter",
]
