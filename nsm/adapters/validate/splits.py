"""Experiments on whole sequences: split in other ways, and against the model's own forward over all of it."""

from __future__ import annotations

import numpy as np

from nsm.adapters.validate.subject import Skipped, Subject, close, difference
from nsm.errors import UnsupportedError
from nsm.trace import Array, Arrays

OFFLINE_TOLERANCE = 1e-3
"""Largest difference to a whole-sequence run, relative to its largest number: other kernels add up in another order."""
OFFLINE_TOKENS = 96
"""Tokens of a whole-sequence run, where states are full before that."""


def split(subject: Subject) -> Skipped | None:
    """Any split of a sequence gives the same outputs and states: from the beginning, and from full states."""
    if not subject.step.timed:
        return Skipped("the step takes one token a call")
    assert subject.trace is not None
    starts = [(subject.start(), 0), subject.trace.late]
    size = subject.chunk if subject.reach is None else min(subject.chunk, (subject.reach - 1) // 2)
    if size < 1:
        return Skipped(f"a stream has {subject.reach} tokens")
    for state, token in starts[1:] if subject.large else starts:
        if subject.fits(token, 2 * size + 1):
            _check_split(subject, state, token, size)
    return None


def _check_split(subject: Subject, state: Arrays, token: int, size: int) -> None:
    step = subject.step
    whole, end = subject.over(0, token, [2 * size], state)
    for parts in ([size, size], [1] * (2 * size), [1, 2 * size - 1], [2 * size, 1]):
        outputs, after = subject.over(0, token, parts, state)
        cut = {name: value[:, : 2 * size] for name, value in outputs.items()}
        # The last split goes one token further, and ends in another state.
        found = difference((cut, after if sum(parts) == 2 * size else end), (whole, end))
        if found:
            raise UnsupportedError(
                f"{step.kind} answers {2 * size} tokens in one call differently than in calls of "
                f"{parts if len(parts) < 5 else 'one'} ({found}{_where(token)}): a length is built into it, or "
                f"something is not carried as state. {step.advice.length}"
            )


def _where(token: int) -> str:
    return f", from token {token} on" if token else ""


def offline(subject: Subject) -> Skipped | None:
    """The step gives the outputs of the model's own forward over the whole sequence, past every window."""
    step, trace = subject.step, subject.trace
    assert trace is not None
    length = min(max(OFFLINE_TOKENS, trace.filled + OFFLINE_TOKENS // 2), trace.further)
    sequence = subject.tokens(0, 0, length)
    wanted = step.offline(sequence)
    if wanted is None:
        return Skipped(f"not compared with an offline run. {step.advice.offline}")
    main = step.outputs[0]
    size = step.chunk
    sizes = [size] * (length // size) + [1] * (length % size)
    given, _ = subject.over(0, 0, sizes, subject.start())
    check_offline(step.kind, main, given[main], wanted[main], step.advice.departs)
    return None


def check_offline(kind: str, name: str, given: Array, wanted: Array, advice: str = "") -> None:
    """Raise `UnsupportedError` unless outputs [1, T, ...] of steps are those of a run over the whole sequence."""
    if wanted.shape != given.shape:
        raise UnsupportedError(
            f"{kind} gives {name} {list(given.shape)} step by step, and the offline run over the same sequence "
            f"{list(wanted.shape)}. The offline run takes [1, T, *token] and gives the main output, [1, T, ...]."
        )
    if close(given, wanted.astype(given.dtype), OFFLINE_TOLERANCE):
        return
    scale = float(np.abs(wanted).max(initial=0))
    errors = np.abs(given.astype(np.float64) - wanted).reshape(given.shape[1], -1).max(1)
    first = int(np.argmax(~(errors <= OFFLINE_TOLERANCE * max(scale, 1e-3))))
    raise UnsupportedError(
        f"{kind}, run step by step, is not the model: from token {first} on, {name} departs from the offline run over "
        f"the whole sequence, by up to {np.nanmax(errors):.3g} where the largest number is {scale:.3g}. Is a window or "
        "a position kept in a Python number, are masks or positions not carried, or does the offline run start from "
        f"other states?{advice and f' {advice}'}"
    )
