"""The drift exponent: whether the free-run error stays bounded or grows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nsm.trace import Array

# Fewer streams or steps give an interval too wide to be useful.
MIN_STREAMS, MIN_STEPS = 8, 64
_RESAMPLES = 1000


@dataclass(frozen=True)
class Drift:
    """Exponent p with its 95 % bootstrap interval: 0 is bounded, 1/2 a random walk, 1 linear growth."""

    exponent: float
    low: float
    high: float


def drift_exponent(errors: Array) -> Drift | None:
    """P = log2(median error of the last half / median error of the quarter before it).

    Args:
        errors: [streams, steps], free-run errors.

    Returns:
        The exponent; None for fewer than 8 streams or 64 steps, or if the errors are zero or not finite.
    """
    streams, steps = errors.shape
    late, early = errors[:, steps // 2 :], errors[:, steps // 4 : steps // 2]
    if streams < MIN_STREAMS or steps < MIN_STEPS or not np.isfinite(errors[:, steps // 4 :]).all():
        return None
    if not np.median(early) or not np.median(late):
        return None
    generator = np.random.default_rng(0)
    picks = generator.integers(0, streams, (_RESAMPLES, streams))
    with np.errstate(divide="ignore", invalid="ignore"):
        samples = np.log2(np.median(late[picks], axis=(1, 2)) / np.median(early[picks], axis=(1, 2)))
    samples = samples[np.isfinite(samples)]
    low, high = np.quantile(samples, [0.025, 0.975]) if samples.size else (np.nan, np.nan)
    return Drift(float(np.log2(np.median(late) / np.median(early))), float(low), float(high))
