"""Bisection of a parity failure: the first wrong operation, or the state that drifts."""

from nsm.runtimes.parity.bisection.search import bisect, check_bisectable

__all__ = [
    "bisect",
    "check_bisectable",
]
