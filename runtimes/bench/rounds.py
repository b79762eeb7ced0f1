"""Latency, measured side by side: sessions take turns in rounds; percentiles of a call, and ratios within a round.

Disturbances of the machine (other jobs, a falling clock rate) affect all sessions of a round alike. So each ratio is
taken within a round, and its variation between rounds gives its confidence interval.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from nsm.errors import InputError
from nsm.results import Ratio
from nsm.runtimes.base import Progress
from nsm.runtimes.bench.timing import median_interval, times_us
from nsm.spec import StepSpec
from nsm.trace import Array

BLOCK = 25
"""Maximum number of timed calls of a session per turn."""

ROUNDS = 5
"""Minimum number of rounds, for any number of calls."""

SETTLE = 2
"""Untimed calls at the start of a turn, when the caches still contain another session's data."""


class Steppable(Protocol):
    """A `Session`, or any other object that takes a stream call by call and can be measured.

    `spec` says which tokens a call takes, and how many a stream; `decode` is called only where the spec has an entry of
    that name.
    """

    @property
    def spec(self) -> StepSpec: ...
    def reset(self) -> object: ...
    def step(self, tokens: Array) -> object: ...
    def decode(self, tokens: Array) -> object: ...


@dataclass(frozen=True)
class Latency:
    """Latency of one session, in microseconds.

    Args:
        p50_us, p90_us, p99_us: percentiles over all timed calls.
        call_us: time per call in the long run: the median for `step`; for `decode`, the median over chunks of the mean
            per token, commits included.
        tokens_per_second: over all lanes, at `call_us`.
        rounds_us: the same as `call_us` of each round, for `paired_ratio`.
        decode: the same of single tokens; None where the model has no `decode`.
    """

    p50_us: float
    p90_us: float
    p99_us: float
    call_us: float
    tokens_per_second: float
    rounds_us: tuple[float, ...]
    decode: Latency | None = None


def bench(sessions: Sequence[Steppable], steps: int, tokens: Array, progress: Progress | None = None) -> list[Latency]:
    """Time `steps` calls of every session. The sessions take turns in rounds; the first round is an untimed warm-up.

    Every turn starts a new stream, and the order of the sessions rotates. If the model has `decode`, the turn also
    times single tokens: whole chunks, about as many tokens as calls of `step`.

    Args:
        sessions: sessions of models with the same inputs.
        steps: timed calls of `step` per session, at least 10.
        tokens: [T, B, K, ...], real inputs for T calls, used in a cycle.
        progress: called after every round with (rounds done, total rounds).

    Raises:
        InputError: fewer than 10 steps, no session, or no inputs.
    """
    check_steps(steps)
    if not sessions or not len(tokens):
        raise InputError(
            "A benchmark needs something to measure and inputs for at least one step; given "
            f"{len(sessions)} sessions and inputs for {len(tokens)} steps."
        )
    rounds = max(ROUNDS, -(-steps // BLOCK))
    turns = [_Turn(session, tokens, steps // rounds) for session in sessions]
    for turn in turns:
        turn.take(steps // rounds)
        turn.forget()
    for number in range(rounds):
        first = number % len(turns)
        for turn in (*turns[first:], *turns[:first]):
            turn.take(steps // rounds + (number < steps % rounds))
        if progress is not None:
            progress(number + 1, rounds)
    return [turn.latency() for turn in turns]


def check_steps(steps: int) -> None:
    """Raise `InputError` where `bench` would."""
    if steps < 10:
        raise InputError(f"A benchmark needs at least 10 steps; given {steps}.")


def paired_ratio(times_a: ArrayLike, times_b: ArrayLike) -> Ratio:
    """Return A's time over B's: the median over rounds of the ratio within a round, and its interval.

    An interval that contains 1 shows no difference. For the speed of A relative to B, exchange the arguments.

    Args:
        times_a, times_b: [rounds], a time of each round, as in `Latency.rounds_us`.

    Raises:
        InputError: different numbers of rounds, fewer than two, or a time that is not positive.
    """
    a, b = np.asarray(times_a, float), np.asarray(times_b, float)
    if a.ndim != 1 or a.shape != b.shape or len(a) < 2:
        raise InputError(
            f"A paired ratio needs times of the same rounds of both, at least 2; given shapes {list(a.shape)} and "
            f"{list(b.shape)}. Measure both in one call of bench."
        )
    if not (np.isfinite(a) & np.isfinite(b) & (a > 0) & (b > 0)).all():
        raise InputError(f"A paired ratio needs times above 0; given {a.tolist()} and {b.tolist()}.")
    return Ratio(*median_interval(a / b))


def not_faster(step: Ratio, decode: Ratio | None) -> dict[str, Ratio]:
    """Return the entries in which low precision is too slow relative to the same target's fp32.

    `step` must be faster: the median of its speed must be above 1. `decode` must not be slower: it is refused if its
    whole interval is below 1, because a round times fewer calls of `decode` than of `step`.

    Args:
        step, decode: speed relative to fp32, by `paired_ratio`; None for a model without `decode`.
    """
    found = {} if step.median > 1.0 else {"step": step}
    return found if decode is None or decode.high >= 1.0 else {**found, "decode": decode}


class _Turn:
    """The turns of one session, and their times.

    Args:
        session: the session to measure.
        tokens: [T, B, K, ...].
        count: approximate calls of `step` per turn.
    """

    def __init__(self, session: Steppable, tokens: Array, count: int) -> None:
        self._session = session
        self._tokens = tokens
        self._lanes, self._length = tokens.shape[1:3]
        self._chunk = session.spec.chunk_size
        self._singles: list[Array] = []
        if session.spec.has("decode"):
            stream = np.moveaxis(tokens, 0, 1).reshape(self._lanes, -1, *tokens.shape[3:])
            needed = max(1, count // self._chunk) * self._chunk
            self._singles = [np.ascontiguousarray(stream[:, [i % stream.shape[1]]]) for i in range(needed)]
        self.forget()

    def forget(self) -> None:
        """Discard all times."""
        self._steps: list[Array] = []
        self._decodes: list[Array] = []

    def take(self, count: int) -> None:
        """Time `count` calls of `step` of a new stream, then single tokens of another one."""
        self._session.reset()
        steps = Calls(self._session, self._session.step, self._length)
        steps.times(self._tokens, SETTLE)
        self._steps.append(steps.times(self._tokens, count))
        if self._singles:
            self._session.reset()
            Calls(self._session, self._session.decode, 1).times(self._singles, SETTLE)
            self._session.reset()
            singles = Calls(self._session, self._session.decode, 1)
            self._decodes.append(singles.times(self._singles, len(self._singles)))

    def latency(self) -> Latency:
        decode = _latency(self._decodes, self._chunk, self._lanes, None) if self._singles else None
        return _latency(self._steps, 1, self._lanes * self._length, decode)


class Calls:
    """Time calls of one entry, and restart the stream before it exceeds its capacity.

    Args:
        session: a session at the beginning of a stream.
        call: its `step` or `decode`.
        length: tokens per call.
    """

    def __init__(self, session: Steppable, call: Callable[[Array], object], length: int) -> None:
        self._session, self._call = session, call
        capacity = session.spec.capacity
        self._most = None if capacity is None else capacity // length
        self._made = 0

    def __call__(self, tokens: Array) -> object:
        self.make_room()
        return self._call(tokens)

    def make_room(self) -> None:
        """Restart the stream if its capacity does not allow another call."""
        if self._most is not None and self._made >= self._most:
            self._session.reset()
            self._made = 0
        self._made += 1

    def times(self, tokens: Sequence[Array] | Array, count: int) -> Array:
        """Return the microseconds of `count` calls, [count], without those of the restarts."""
        given = itertools.cycle(tokens)

        def arguments() -> tuple[Array]:
            self.make_room()
            return (next(given),)

        return times_us(self._call, count, arguments=arguments)


def _latency(rounds: list[Array], together: int, tokens: int, decode: Latency | None) -> Latency:
    """Return the latency from the times of each round; `together` calls in a row, of `tokens` tokens, are averaged."""
    p50, p90, p99 = (float(value) for value in np.quantile(np.concatenate(rounds), (0.5, 0.9, 0.99)))
    means = [times.reshape(-1, together).mean(1) for times in rounds]
    call = float(np.median(np.concatenate(means)))
    return Latency(p50, p90, p99, call, tokens / call * 1e6, tuple(float(np.median(mean)) for mean in means), decode)
