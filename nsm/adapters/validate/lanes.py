"""The experiment on streams side by side: of different ages and states, fed unevenly, each against itself alone."""

from __future__ import annotations

import numpy as np

from nsm.adapters.validate.step import Results
from nsm.adapters.validate.subject import Skipped, Subject, difference, joined, lane_of
from nsm.errors import NsmError, UnsupportedError
from nsm.trace import Arrays

SIDE_BY_SIDE = 3
"""Streams that are run together, where any number can be."""
ROUNDS = ("111", "101", "011", "110", "001", "r11", "111", "01r", "101", "111")
"""Which lane has a token in a round: 1 has one, 0 has none and keeps its state, r starts afresh first."""
ROUNDS_OF_LARGE = 6


def lanes(subject: Subject) -> Skipped | None:
    """Several streams, of different age and state and fed unevenly, give the same results as each alone."""
    step = subject.step
    subject.lanes, subject.why = step.lanes, step.why
    if step.lanes == 1:
        return Skipped(step.why or "the step takes one stream at a time")
    count = step.lanes or SIDE_BY_SIDE
    fresh = [subject.start() for _ in range(count)]
    try:
        together = step(joined([subject.tokens(lane, 0, 1) for lane in range(count)]), joined(fresh))
    except NsmError as error:
        if step.lanes is not None:
            raise
        subject.lanes, subject.why = 1, f"with {count} it fails ({_reason(error)})"
    else:
        odd = _odd_shape(subject, together, count)
        if odd and step.lanes is None:
            subject.lanes, subject.why = 1, f"with {count} it gives {odd} (lanes first)"
    if subject.lanes == 1:
        return Skipped(f"one stream at a time: {subject.why}")
    _check(subject, fresh, [0] * count, "111", 1, "normalise over the batch, decide by it, or mix its tokens")
    _check_ages(subject, count)
    return None


def _reason(error: NsmError) -> str:
    """The error of a framework in one line."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"


def _odd_shape(subject: Subject, together: Results, count: int) -> str:
    """The first result that does not have so many lanes."""
    wanted = {name: (count, 1, *shape) for name, shape in subject.shapes.items()}
    wanted |= {name: value.shape for name, value in subject.step.initial(count).items()}
    values = {**together[0], **together[1]}
    return next((f"{name} {list(value.shape)}" for name, value in values.items() if value.shape != wanted[name]), "")


def _check_ages(subject: Subject, count: int) -> None:
    """Lanes that started at other times; some have no token in a round, some start afresh."""
    assert subject.trace is not None
    started = [(subject.start(), 0), subject.trace.early, subject.trace.late]
    states = [started[lane % 3][0] for lane in range(count)]
    tokens = [started[lane % 3][1] for lane in range(count)]
    for number, pattern in enumerate(ROUNDS[:ROUNDS_OF_LARGE] if subject.large else ROUNDS):
        for lane in range(count):
            if pattern[lane % 3] == "r":
                states[lane], tokens[lane] = subject.start(), 0
        size = subject.chunk if number % 4 == 3 else 1
        if not all(subject.fits(token, size) for token in tokens):
            return
        why = "take the counter or state of one stream for all (position[0], state[:1]), or mix states (a mean, an "
        states = _check(subject, states, tokens, pattern, size, why + "attention over the axis of the streams)")
        tokens = [token + size * (pattern[lane % 3] != "0") for lane, token in enumerate(tokens)]


def _check(
    subject: Subject, states: list[Arrays], tokens: list[int], pattern: str, size: int, cause: str
) -> list[Arrays]:
    """One call over all lanes: the states after it; a lane that has no token keeps its own.

    Raises:
        UnsupportedError: a lane differs from the same stream alone.
    """
    step = subject.step
    inputs = [subject.tokens(lane, tokens[lane], size) for lane in range(len(states))]
    outputs, after = step(joined(inputs), joined(states))
    kept = list(states)
    for lane in np.flatnonzero([pattern[lane % 3] != "0" for lane in range(len(states))]).tolist():
        beside = lane_of(outputs, lane), lane_of(after, lane)
        if found := difference(beside, subject.alone(inputs[lane], states[lane])):
            suspects = "; ".join(step.suspects())
            raise UnsupportedError(
                f"{step.kind} answers a stream differently when another one is beside it ({found} of lane {lane}): it "
                f"mixes its lanes. {f'{suspects}. ' if suspects else ''}Does it {cause}, or are lanes not where the "
                f"states say? {step.advice.lanes}"
            )
        kept[lane] = beside[1]
    return kept
