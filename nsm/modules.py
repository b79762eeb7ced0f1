"""The parts of a Neural State Machine under one name."""

from nsm.attention import HybridAttention
from nsm.layer import NSMLayer
from nsm.manager import StateManager
from nsm.mixing import LocalMixing
from nsm.propagator import StatePropagator
from nsm.router import TokenToStateRouter

__all__ = [
    "HybridAttention",
    "LocalMixing",
    "NSMLayer",
    "StateManager",
    "StatePropagator",
    "TokenToStateRouter",
]
