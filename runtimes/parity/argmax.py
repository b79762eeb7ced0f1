"""Argmax changes: tokens whose largest output differs between target and reference.

The argmax is over the last axis of the first output: one per token, or several if a token has several rows. A change is
excused if the reference's margin, the lead of its largest output over the second, is at most

    2 * (budget of the free-run p99) * rms of the reference's output:

a bound from the budget, never from the measured error, which would excuse every argmax change.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nsm.runtimes.parity.metrics import kl_divergence
from nsm.runtimes.parity.report import ArgmaxChange
from nsm.trace import Array

MAX_LISTED_CHANGES = 100
"""Number of argmax changes that a report lists; unexcused ones come first."""


class _Answer(NamedTuple):
    """Argmaxes of one step of one stream, [decisions] each; `places` [changes, 6] lists the changes.

    A row of `places`: stream, step, token, decision, choice of the reference, choice of the target; see `ArgmaxChange`.
    """

    stream: int
    step: int
    kl: Array
    argmax_changes: Array
    margins: Array
    places: Array


class Agreement(NamedTuple):
    """All compared argmaxes, [decisions] each; at least one.

    `margins` and `bound` are in units of the rms of the reference's output. A change with a margin up to `bound` is
    excused.
    """

    kl: Array
    argmax_changes: Array
    margins: Array
    bound: float
    listed: tuple[ArgmaxChange, ...]

    @property
    def excused(self) -> Array:
        """[decisions] bool, True at excused argmax changes."""
        found: Array = self.argmax_changes & (self.margins <= self.bound)
        return found


class Answers:
    """Collects the argmaxes of one output, step by step.

    Args:
        recorded: output of the reference, [N, T, P, ...].
        free_run_p99: limit in the budget.
    """

    def __init__(self, recorded: Array, free_run_p99: float) -> None:
        self._scale = float(np.sqrt(np.mean(np.square(recorded, dtype=np.float64)))) or 1.0
        self._bound = 2 * free_run_p99
        self._answers: list[_Answer] = []

    def add(self, stream: int, step: int, tokens: Array, wanted: Array, given: Array) -> None:
        """Compare the outputs of one step of a stream.

        Args:
            stream, step: position in the trace.
            tokens: [n], indices of the tokens in the call.
            wanted, given: [n, ...], outputs of the reference and of the target.
        """
        wanted, given = _by_decision(wanted), _by_decision(given)
        ordered = np.sort(wanted, -1)
        margins = ordered[:, -1] - ordered[:, -2:-1].max(-1, initial=-np.inf)
        right, chosen = wanted.argmax(-1), given.argmax(-1)
        argmax_changes = right != chosen
        at, each = np.flatnonzero(argmax_changes), len(wanted) // len(tokens)
        where = (np.full(len(at), stream), np.full(len(at), step), tokens[at // each], at % each)
        places = np.stack([*where, right[at], chosen[at]], 1)
        kl = kl_divergence(wanted, given)
        self._answers.append(_Answer(stream, step, kl, argmax_changes, margins / self._scale, places))

    def agreement(self, dropped: Array) -> Agreement:
        """Return the argmaxes of all steps except those that `dropped` [N, T] marks."""
        kept = [item for item in self._answers if not dropped[item.stream, item.step]]
        if not kept:
            return Agreement(np.full(1, np.nan), np.ones(1, bool), np.zeros(1), self._bound, ())
        kl, argmax_changes, margins = (
            np.concatenate(part) for part in zip(*((i.kl, i.argmax_changes, i.margins) for i in kept), strict=True)
        )
        return Agreement(kl, argmax_changes, margins, self._bound, self._listed(kept))

    def _listed(self, kept: list[_Answer]) -> tuple[ArgmaxChange, ...]:
        places = np.concatenate([item.places for item in kept])
        margins = np.concatenate([item.margins[item.argmax_changes] for item in kept])
        excused = margins <= self._bound
        stream, step, token, decision = places.T[:4]
        listed = np.lexsort((decision, token, stream, step, excused))[:MAX_LISTED_CHANGES]
        return tuple(_flip(places[row], float(margins[row]), bool(excused[row])) for row in listed)


def _flip(place: Array, margin: float, excused: bool) -> ArgmaxChange:
    stream, step, token, decision, reference, target = place.tolist()
    return ArgmaxChange(stream, step, token, decision, reference, target, margin, excused)


def _by_decision(values: Array) -> Array:
    """Reshape an output [tokens, ..., V] to [decisions, V]; [tokens] becomes [tokens, 1]."""
    return values.reshape(-1, values.shape[-1] if values.ndim > 1 else 1)
