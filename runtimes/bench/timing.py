"""The timing loop of the benchmarks, and the confidence interval of what it measures."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from nsm.trace import Array

_RESAMPLES = 2000


def times_us(
    call: Callable[..., object], calls: int, settle: int = 0, arguments: Callable[[], tuple[object, ...]] = tuple
) -> Array:
    """Time a call many times.

    Args:
        call: the call.
        calls: timed calls.
        settle: untimed calls at the start, while the caches still contain other data.
        arguments: returns the arguments of the next call, untimed (default: none).

    Returns:
        Microseconds of each timed call, [calls] float64.
    """
    times = np.empty(calls)
    for index in range(-settle, calls):
        given = arguments()
        start = time.perf_counter()
        call(*given)
        if index >= 0:
            times[index] = time.perf_counter() - start
    return times * 1e6


def median_interval(values: ArrayLike) -> tuple[float, float, float]:
    """Return the median of [rounds] values, and the bounds of its 95 % interval.

    The interval is a percentile bootstrap over the rounds (Efron 1979) with a fixed seed. With fewer than ten rounds it
    is hardly more than their range.
    """
    found = np.asarray(values, float)
    drawn = np.random.default_rng(0).integers(0, len(found), (_RESAMPLES, len(found)))
    low, high = np.quantile(np.median(found[drawn], 1), (0.025, 0.975))
    return float(np.median(found)), float(low), float(high)
