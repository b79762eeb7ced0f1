"""Overhead of a session: a step against the bare call of the backend, in turn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nsm.errors import UnsupportedError
from nsm.runtimes.backends import BufferedRuntime
from nsm.runtimes.base import Progress, Runtime
from nsm.runtimes.bench.timing import median_interval, times_us
from nsm.runtimes.session import Session
from nsm.trace import Array

OVERHEAD_ROUNDS = 25
CALLS = 100
_SETTLE = 5


@dataclass(frozen=True)
class Overhead:
    """Microseconds of a call of `step`.

    Args:
        step_us: call through the session: check and copy inputs, run the graph, check that all values are finite.
        bare_us: call of the graph alone, bound to its memory once.
        median, low, high: difference within a round, and its 95 % interval (bootstrap over rounds).
    """

    step_us: float
    bare_us: float
    median: float
    low: float
    high: float


def overhead(
    session: Session, runtime: Runtime, tokens: Array, rounds: int = OVERHEAD_ROUNDS, progress: Progress | None = None
) -> Overhead:
    """Let a session's `step` and the bare graph take turns.

    Args:
        session: over `runtime`.
        runtime: runtime of a backend in host memory.
        tokens: [T, B, K, ...], real inputs, taken round and round.
        rounds: number of rounds, with 100 calls of each.
        progress: called after every round.

    Raises:
        UnsupportedError: the runtime keeps its memory on a device, or the model's capacity is less than a few calls.
    """
    if not isinstance(runtime, BufferedRuntime):
        raise UnsupportedError(
            f"The overhead is measured on backends that work on the host's memory; {session.target} does not."
        )
    times = np.zeros((2, rounds))
    turn = 0
    # The bare graph does not check the capacity, so consecutive calls must fit into it.
    capacity = session.spec.capacity
    room = _SETTLE + 1 + CALLS if capacity is None else capacity // session.spec.entry("step").tokens
    calls = min(CALLS, room - _SETTLE - 1)
    if calls < 1:
        raise UnsupportedError(
            f"The overhead is measured over more than {_SETTLE + 1} calls in a row; the model takes {capacity} tokens "
            "from one reset to the next. Export it with fewer tokens a call."
        )

    def step() -> object:
        nonlocal turn
        turn += 1
        return session.step(tokens[turn % len(tokens)])

    for number in range(rounds):
        order = (0, 1) if number % 2 else (1, 0)
        for which in order:
            session.reset()
            step()
            times[which, number] = np.median(times_us((step, runtime.bare("step"))[which], calls, _SETTLE))
        if progress is not None:
            progress(number + 1, rounds)
    step_us, bare_us = (float(np.median(row)) for row in times)
    return Overhead(step_us, bare_us, *median_interval(times[0] - times[1]))
