"""Limits: the first position of a stream at which a target no longer agrees with the reference.

Backends differ in integer arithmetic: OpenVINO's `%`, comparisons and clamps on the CPU go through float32, which is
exact up to 2^24, and its integers end at 2^31. No recorded stream is that long. So the search compares single steps
from states with their counters set to such positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nsm.errors import RunError
from nsm.runtimes.limits.counters import WEEK_CALLS, Counters
from nsm.runtimes.parity import Budget, relative_error
from nsm.runtimes.session import Session
from nsm.trace import Array, Arrays

THRESHOLDS = tuple(2**bits for bits in range(24, 32))
"""Values at which backend integers may fail, from the limit of exact float32 integers to that of int32."""

_TRIES = 4
"""Number of consecutive positions to try: a rounded counter is correct at every second or fourth position."""
_WORSE = 3.0
"""Tolerance, as a multiple of the target's error at the start of a stream."""


@dataclass(frozen=True)
class Limit:
    """The limit up to which a target agrees with the reference.

    Args:
        tokens: maximum number of tokens of a lane between two resets.
        cause: cause of the limit, for messages.
    """

    tokens: int
    cause: str


def find_limit(
    reference: Session, target: Session, counters: Counters, tokens: Array, budget: Budget, capacity: int | None
) -> Limit | None:
    """Step both from states with counters from 2^24 to 2^31, a week on, and at the capacity; None where they agree.

    Args:
        reference, target: with the same lanes.
        counters: as `nsm.runtimes.limits.counters.reach` leaves them.
        tokens: [B, K, ...], of one call.
        budget: budget of the artifact's precision.
        capacity: capacity of the model; the search tries no later positions.
    """
    last = counters.furthest if capacity is None else capacity - counters.length
    if last < counters.position:  # parity has compared every call within the capacity
        return None
    pair = _Pair(reference, target, counters, tokens, budget)
    last = counters.position + max(0, last - counters.position) // counters.grain * counters.grain
    good = counters.position
    grain, span = counters.grain, (_TRIES - 1) * counters.grain
    for position in points(counters, last):
        # Just below, then from there on: a fault at a threshold is found without a search.
        for start in (position - 2 * counters.length - span - grain, position):
            if start <= good:
                continue
            cause = pair.departs(start, last)
            if not cause:
                good = min(start + span, last)
                continue
            while start - good > grain:
                middle = good + (start - good) // (2 * grain) * grain
                found = pair.departs(middle, start)
                good, start = (good, middle) if found else (middle, start)
                cause = found or cause
            return Limit(good + counters.length, cause)
    kept_small = {state.name for state in target.spec.states if state.wrap}
    ending = [name for name in counters.ending if name not in kept_small]
    if capacity is None and ending:
        return Limit(
            last + counters.length, f"the state {ending[0]} is at the end of {counters.growth[ending[0]].dtype}"
        )
    return None


def assumed_limit(counters: Counters) -> Limit:
    """Return the limit of a target that cannot run here: the range in which all backends' integers are exact."""
    tokens = max(counters.length, counters.reaching(THRESHOLDS[0]) - counters.length)
    return Limit(tokens, "it was not compared with the reference behind that")


def points(counters: Counters, last: int) -> list[int]:
    """Positions to try, ascending: where a counter reaches a threshold, a week on, and the last one."""
    wanted = [counters.position + WEEK_CALLS * counters.length, last]
    for name in counters.growth:
        alone = counters.without(set(counters.growth) - {name})
        assert alone is not None
        wanted += [alone.reaching(value) for value in THRESHOLDS]
    aligned = {position // counters.grain * counters.grain for position in wanted}
    return sorted(position for position in aligned if counters.position < position <= last)


class _Pair:
    """Steps a reference and a target from the same states."""

    def __init__(self, reference: Session, target: Session, counters: Counters, tokens: Array, budget: Budget) -> None:
        self._reference, self._target = reference, target
        # The target may keep a counter small; the reference counts on.
        self._wraps = {f"state {state.name}": state.wrapped for state in target.spec.states if state.wrap}
        self._counters, self._tokens = counters, tokens
        first = _stepped(reference, counters.at(counters.position), counters.position, tokens)
        self._usual = {name: float(np.linalg.norm(value)) for name, value in first.items() if value.dtype.kind == "f"}
        self._allowed = dict.fromkeys(first, budget.free_run_p99)
        usual = self._errors(counters.position)
        self._allowed |= {name: max(budget.free_run_p99, _WORSE * error) for name, error in usual.items()}

    def departs(self, start: int, last: int) -> str:
        """Describe the tensors over budget in steps from `start` and the next positions up to `last`, or return ""."""
        for position in range(start, start + _TRIES * self._counters.grain, self._counters.grain):
            if position > last:
                break
            try:
                errors = self._errors(position)
            except RunError as error:
                return f"the target fails: {str(error).splitlines()[0]}"
            worst = max(errors, key=lambda name: errors[name] / self._allowed[name])
            if errors[worst] > self._allowed[worst]:
                return f"{worst} is off by {errors[worst]:.2g}"
        return ""

    def _errors(self, position: int) -> dict[str, float]:
        """Relative errors by output and state; the share of numbers that differ for integers."""
        states = self._counters.at(position)
        wanted = _stepped(self._reference, states, position, self._tokens)
        given = _stepped(self._target, states, position, self._tokens)
        return {
            name: relative_error(given[name], value, self._usual[name])
            if value.dtype.kind == "f"
            else float(np.mean(given[name] != self._wraps.get(name, np.asarray)(value)))
            for name, value in wanted.items()
        }


def _stepped(session: Session, states: Arrays, position: int, tokens: Array) -> Arrays:
    """Outputs and states of one step from these states."""
    session.load_state(states, np.full(session.batch, position))
    outputs = session.step(tokens)
    return {f"output {name}": value for name, value in outputs.items()} | {
        f"state {name}": value for name, value in session.read_state().items()
    }
