"""A layer's bank of slots: routing, writing, transition and adaptation.

`router` computes which slots a token writes to and the write itself; `propagator` and `consolidation` update the bank
when a chunk ends; `manager` and `adaptation` decide which slots are active.
"""

from nsm.modules.bank.adaptation import Adaptation
from nsm.modules.bank.consolidation import Consolidation
from nsm.modules.bank.manager import StateManager
from nsm.modules.bank.propagator import GateType, StatePropagator
from nsm.modules.bank.router import MASKED_SCORE, Routing, TokenToStateRouter

__all__ = [
    "MASKED_SCORE",
    "Adaptation",
    "Consolidation",
    "GateType",
    "Routing",
    "StateManager",
    "StatePropagator",
    "TokenToStateRouter",
]
