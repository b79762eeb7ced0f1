"""Limits: the position of a stream up to which a target agrees with the reference."""

from nsm.runtimes.limits.counters import Counters, observe, reach
from nsm.runtimes.limits.search import Limit, assumed_limit, find_limit

__all__ = [
    "Counters",
    "Limit",
    "assumed_limit",
    "find_limit",
    "observe",
    "reach",
]
