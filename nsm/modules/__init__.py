"""The parts of a Neural State Machine, each a `torch.nn.Module`.

Start with `reference`: the whole model as equations and as a plain loop. `layer` (`NSMLayer`) computes the same fast,
with `mixing`, `attention`, `memory`, and the parts of a bank in `bank`. `ops` has the functions on tensors that they
share. Comments that begin with "backend:" explain code whose form a runtime demands.
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
