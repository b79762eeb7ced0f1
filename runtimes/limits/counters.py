"""Counters: the integer states that grow with the tokens, and the range in which the reference counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from nsm.errors import NonFiniteError, RunError
from nsm.runtimes.session import Session
from nsm.trace import Array, Arrays

WEEK_CALLS = 7 * 24 * 3600 * 100
"""Number of calls in a week, at one every 10 ms."""

_OBSERVED = 8
"""Number of calls at the start of a stream that detect a growing state."""
_FEWEST = 3
"""Minimum number of calls to tell a counter from a value that happens to rise."""


@dataclass(frozen=True)
class Counters:
    """Integer states that grow, and all states of a stream from which they are moved on.

    Args:
        position: tokens that the lanes have had in `states`.
        states: by name, with all lanes.
        growth: by name, how much each number of a counter grows with a call.
        steady: counters that grew by the same in every call.
        length: tokens of a call.
    """

    position: int
    states: Mapping[str, Array]
    growth: Mapping[str, Array]
    steady: frozenset[str]
    length: int

    @property
    def grain(self) -> int:
        """Positions are multiples of it: one token, or a call where a token's growth is no whole number."""
        return self.length if any((value % self.length).any() for value in self.growth.values()) else 1

    @property
    def furthest(self) -> int:
        """The last examined position: a week later, or the end of a counter's dtype."""
        week = max(self.position + WEEK_CALLS * self.length, self.reaching(2**31) + 4 * self.length)
        return min(week, *map(self._end, self.growth)) // self.grain * self.grain

    @property
    def ending(self) -> list[str]:
        """Counters whose dtype ends within the examined range."""
        return [name for name in self.growth if self._end(name) // self.grain * self.grain == self.furthest]

    def _end(self, name: str) -> int:
        """Return the last position at which a counter fits its dtype."""
        growth = self.growth[name].astype(np.int64)
        room = np.iinfo(self.growth[name].dtype).max - self.states[name].astype(np.int64) - 2 * growth
        return self.position + int((room[growth > 0] // growth[growth > 0]).min()) * self.length

    def reaching(self, value: int) -> int:
        """Return the first position at which a counter is at least `value`."""
        calls = [
            -(-(value - self.states[name][growth > 0].astype(object)) // growth[growth > 0].astype(object))
            for name, growth in self.growth.items()
        ]
        return self.position + max(0, min(int(min(item)) for item in calls)) * self.length

    def at(self, position: int) -> Arrays:
        """Return the states with their counters moved to a position; other states are unchanged."""
        moved = {
            name: (self.states[name] + growth.astype(np.int64) * (position - self.position) // self.length).astype(
                growth.dtype
            )
            for name, growth in self.growth.items()
        }
        return {name: np.array(moved.get(name, value)) for name, value in self.states.items()}

    def without(self, names: set[str]) -> Counters | None:
        """Return the remaining counters; None if none remain."""
        left = {name: value for name, value in self.growth.items() if name not in names}
        return replace(self, growth=left, steady=self.steady - names) if left else None

    def per_token(self) -> dict[str, int]:
        """Return, by name, the integer growth per token of steady counters with uniform growth."""
        found = {}
        for name in self.steady:
            least, most = int(self.growth[name].min()), int(self.growth[name].max())
            if least == most and least % self.length == 0:
                found[name] = least // self.length
        return found


def observe(session: Session, tokens: Array, capacity: int | None = None) -> tuple[Counters | None, RunError | None]:
    """Run the first calls of a stream, and find the integer states that grow.

    A state is a counter if none of its numbers ever falls, and it grows by the same in every call, or in several of
    them.

    Args:
        session: over the reference.
        tokens: [T, B, K, ...], in an order in which no id is like a counter.
        capacity: declared capacity; the calls stay within it.

    Returns:
        The counters, None without any; the error of the reference after them.
    """
    whole = [state.name for state in session.spec.states if state.numpy_dtype.kind in "iu"]
    if not whole:
        return None, None
    length = session.spec.entry("step").tokens
    calls = _OBSERVED if capacity is None else min(_OBSERVED, capacity // length)
    session.reset()
    seen = [session.read_state()]
    failed = None
    for call in tokens[np.arange(calls) % len(tokens)]:
        try:
            session.step(call)
        except NonFiniteError:
            break
        except RunError as error:
            failed = error
            break
        seen.append(session.read_state())
    growth, steady = {}, set()
    for name in whole:
        values = np.stack([state[name] for state in seen])
        steps = np.diff(values.astype(np.int64), axis=0)
        # Too few calls prove nothing, unless they end because the reference failed.
        if (len(steps) >= _FEWEST or (failed and len(steps))) and (steps >= 0).all() and steps.any():
            even = len(steps) >= _FEWEST and bool((steps == steps[0]).all())
            if even or failed or (steps.any(tuple(range(1, steps.ndim))).sum() > 1 and len(steps) == _OBSERVED):
                growth[name] = steps.max(0).astype(values.dtype)
                steady |= {name} if even else set()
    made = (len(seen) - 1) * length
    return (Counters(made, seen[-1], growth, frozenset(steady), length) if growth else None), failed


def reach(session: Session, counters: Counters, tokens: Array) -> tuple[Counters | None, int | None]:
    """Find the range in which the reference counts, by single steps from ever later states, then bisection.

    A state that stops growing at some position, such as a ring-buffer index, is not a counter.

    Args:
        session: over the reference.
        counters: counters of the model.
        tokens: [B, K, ...], of one call.

    Returns:
        The counters that grow without end, or up to the capacity; the capacity in tokens, None where there is no end.
    """
    left: Counters | None = counters
    while left is not None:
        bad = _first_bad(session, left, tokens)
        if bad is None:
            return left, None
        turned = _turned(session, left, tokens, bad)
        if turned is None:
            return left, bad - left.grain + left.length
        left = left.without(turned)
    return None, None


def _first_bad(session: Session, counters: Counters, tokens: Array) -> int | None:
    """Return the first position from which a reference step fails or a counter stops growing."""

    def bad(position: int) -> bool:
        turned = _turned(session, counters, tokens, position)
        return turned is None or bool(turned)

    good, stride = counters.position, counters.grain
    if bad(good):
        return good
    furthest = counters.furthest
    while good < furthest:
        tried = min(good + stride, furthest)
        if bad(tried):
            break
        good, stride = tried, stride * 2
    else:
        return None
    while tried - good > counters.grain:
        middle = good + (tried - good) // (2 * counters.grain) * counters.grain
        good, tried = (good, middle) if bad(middle) else (middle, tried)
    return tried


def _turned(session: Session, counters: Counters, tokens: Array, position: int) -> set[str] | None:
    """Return the steady counters that a step from a position does not advance; None if the step fails."""
    states = counters.at(position)
    session.load_state(states, np.full(session.batch, position))
    try:
        session.step(tokens)
    except RunError:
        return None
    after = session.read_state()
    return {name for name in counters.steady if (after[name] != states[name] + counters.growth[name]).any()}
