"""One session over every backend. Nothing here imports torch, and a backend is imported only when it is used."""

from nsm.runtimes.budgets import BUDGETS, Budget, find_budget
from nsm.runtimes.opening import open_bundle
from nsm.runtimes.parity import compare
from nsm.runtimes.report import ParityReport
from nsm.runtimes.session import Session
from nsm.runtimes.targets import TARGETS, Target, find_target

__all__ = [
    "BUDGETS",
    "TARGETS",
    "Budget",
    "ParityReport",
    "Session",
    "Target",
    "compare",
    "find_budget",
    "find_target",
    "open_bundle",
]
