"""Experiments on single calls: finite numbers, shapes, arguments that stay as they are, random numbers."""

from __future__ import annotations

import numpy as np

from nsm.adapters.validate.step import Keeps
from nsm.adapters.validate.subject import Skipped, Subject
from nsm.errors import ConfigError, UnsupportedError
from nsm.results import Message
from nsm.trace import Arrays


def finite(subject: Subject) -> None:
    """Outputs and states are finite on made-up tokens, on positive ones, or on samples."""
    step = subject.step
    odd = _not_finite(subject)
    made_up = not subject.samples
    numbers = step.inputs[0].numpy_dtype.kind == "f"
    if odd and made_up and numbers:
        subject.positive = True  # powers and amplitudes, of which there may be a logarithm
        odd = _not_finite(subject)
    if odd:
        given, fix = "the samples", "Check its weights, its initial states, and these samples."
        if made_up:
            kinds = ", standard normal numbers and positive ones" if numbers else ""
            given, fix = f"made-up tokens{kinds}", step.advice.samples
        raise ConfigError(
            f"{step.kind} gives NaN or infinity in {odd} for {given}; only finite numbers can be compared. {fix}"
        )


def _not_finite(subject: Subject) -> list[str]:
    """Outputs and states that are not finite after one of the first calls, each from the beginning of a stream."""
    chunk = subject.within(2 * subject.step.chunk)
    for start, count in ((0, 1), (1, 1), *([(0, chunk)] if subject.step.timed else [])):
        outputs, after = subject.alone(subject.tokens(0, start, count), subject.start())
        values = (*outputs.items(), *after.items())
        if odd := [name for name, value in values if not np.isfinite(value).all()]:
            return odd
    return []


def shapes(subject: Subject) -> None:
    """States keep shape and dtype; outputs are [lanes, tokens, ...] in float32."""
    step, start = subject.step, subject.start()
    outputs, after = subject.alone(subject.tokens(0, 0, 1), start)
    for name, value in start.items():
        given = after[name]
        if given.shape != value.shape or given.dtype != value.dtype:
            raise ConfigError(
                f"The state {name} is {value.dtype}{list(value.shape)} before a step and {given.dtype}"
                f"{list(given.shape)} after it (lanes first). A step has static shapes: keep a window of fixed length "
                "instead of a cache that grows, and cast to the dtype it had. Are outputs and states in order?"
            )
    _check_outputs(subject, outputs, 1)
    subject.shapes = {name: value.shape[2:] for name, value in outputs.items()}
    if step.timed:
        count = subject.within(2 * step.chunk)
        longer, _ = subject.alone(subject.tokens(0, 0, count), start)
        for name, value in longer.items():
            if value.shape != (1, count, *subject.shapes[name]):
                raise UnsupportedError(
                    f"{step.kind} answers {count} tokens in one call with {name} {list(value.shape)}; expected "
                    f"{[1, count, *subject.shapes[name]]}: a length is built into it. {step.advice.length}"
                )


def _check_outputs(subject: Subject, outputs: Arrays, count: int) -> None:
    for name, value in outputs.items():
        if value.dtype != np.float32 or value.shape[:2] != (1, count):
            wanted = "[B, T, ...]" if subject.step.timed else "[B, ...]"
            found = value.shape if subject.step.timed else (*value.shape[:1], *value.shape[2:])
            raise ConfigError(
                f"The output {name} is {value.dtype}{list(found)} for one token of one stream; expected float32 of "
                f"shape {wanted}. timed={subject.step.timed} says whether there is a time axis."
            )


def arguments(subject: Subject) -> None:
    """A call leaves its arguments as they were."""
    inputs, state = subject.tokens(0, 0, 1), subject.start()
    before = [{name: value.copy() for name, value in part.items()} for part in (inputs, state)]
    subject.alone(inputs, state)
    changed = [
        name
        for part, old in zip((inputs, state), before, strict=True)
        for name, value in part.items()
        if not np.array_equal(value, old[name])
    ]
    if changed:
        raise UnsupportedError(f"{subject.step.kind} writes into {changed}, which it was given. Return new arrays.")
    if isinstance(subject.step, Keeps) and (written := subject.step.written()):
        subject.messages.append(
            Message(f"{subject.step.kind} writes into its arguments {written}; it is given copies of them.")
        )


def random(subject: Subject) -> Skipped | None:
    """No random numbers are drawn that the results depend on."""
    step = subject.step
    if not isinstance(step, Keeps):
        return Skipped("a file has no generator to look at; `repeat` shows what is drawn")
    drawn = step.drawn(subject.tokens(0, 0, 1), subject.start())
    if drawn is not None:
        where = f" in {', '.join(drawn)}" if drawn else ""
        raise UnsupportedError(
            f"{step.kind} draws random numbers{where} (dropout or rand in forward): the same call gives another "
            f"result. {step.advice.random}"
        )
    return None
