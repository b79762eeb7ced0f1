"""Parity: replay a golden trace on an artifact and compare it with the reference.

`compare` returns a `ParityReport`; `BUDGETS` decides whether it passes. `bisection` finds the operation or the state
at fault.
"""

from nsm.runtimes.parity.argmax import MAX_LISTED_CHANGES
from nsm.runtimes.parity.budgets import BUDGETS, Budget, check_budgets, find_budget, parse_budgets
from nsm.runtimes.parity.comparison import compare
from nsm.runtimes.parity.conditioning import Perturbation, conditioning_calls, conditioning_floor
from nsm.runtimes.parity.mask_decisions import decided_states, thresholds_of
from nsm.runtimes.parity.metrics import relative_error, rms_norm
from nsm.runtimes.parity.replay import groups
from nsm.runtimes.parity.report import FLOORS, MASK_DECISIONS_PER_1000, Bisection, ParityReport

__all__ = [
    "BUDGETS",
    "FLOORS",
    "MASK_DECISIONS_PER_1000",
    "MAX_LISTED_CHANGES",
    "Bisection",
    "Budget",
    "ParityReport",
    "Perturbation",
    "check_budgets",
    "compare",
    "conditioning_calls",
    "conditioning_floor",
    "decided_states",
    "find_budget",
    "groups",
    "parse_budgets",
    "relative_error",
    "rms_norm",
    "thresholds_of",
]
