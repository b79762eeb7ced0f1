"""Latency of a step, measured side by side: blocks of several sessions in turn, medians and percentiles."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nsm.errors import InputError
from nsm.runtimes.parity import Progress
from nsm.runtimes.session import Session
from nsm.trace import Array

BLOCK = 50
"""Steps of one session before the next one's turn."""


@dataclass(frozen=True)
class Latency:
    """Of one session. Times in microseconds a call; tokens per second over all lanes."""

    p50_us: float
    p99_us: float
    tokens_per_second: float


def bench(sessions: Sequence[Session], steps: int, tokens: Array, progress: Progress | None = None) -> list[Latency]:
    """Time `steps` calls of every session, in alternating blocks, after a warm-up block each.

    Args:
        sessions: all of models with the same inputs.
        steps: calls per session that are timed, at least 10.
        tokens: [T, B, K, ...], real inputs for T calls, taken round and round.
        progress: called after every block.

    Raises:
        InputError: too few steps for a percentile.
    """
    if steps < 10:
        raise InputError(f"A benchmark needs at least 10 steps; given {steps}.")
    if not len(tokens):
        raise InputError("A benchmark needs inputs for at least one step; given none.")
    times: list[list[float]] = [[] for _ in sessions]
    blocks = -(-steps // BLOCK)
    for session in sessions:
        session.reset()
        _block(session, tokens, min(BLOCK, steps))
    for block in range(blocks):
        count = min(BLOCK, steps - block * BLOCK)
        for session, measured in zip(sessions, times, strict=True):
            measured += _block(session, tokens, count)
        if progress is not None:
            progress(block + 1, blocks)
    return [_latency(session, measured) for session, measured in zip(sessions, times, strict=True)]


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MB (10^6 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _block(session: Session, tokens: Array, count: int) -> list[float]:
    times = []
    for index in range(count):
        run = tokens[index % len(tokens)]
        start = time.perf_counter()
        session.step(run)
        times.append(time.perf_counter() - start)
    return times


def _latency(session: Session, times: Sequence[float]) -> Latency:
    micro = np.array(times) * 1e6
    per_call = session.batch * session.spec.entry("step").inputs[0].shape[1]
    p50, p99 = (float(value) for value in np.quantile(micro, [0.5, 0.99]))
    return Latency(p50, p99, per_call / p50 * 1e6)
