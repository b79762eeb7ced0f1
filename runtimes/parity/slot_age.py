"""How old the slots of a bank are, so that one sees whether the error grows while a slot lives.

The age of an active slot is the number of steps since the stream began or since the slot was allocated, whichever
came later. It is read off the masks that the trace holds: a slot that was masked at one of them is as old as the steps
since the last of them. The masks that a model decides about are known at every step. Others are known around sampled
steps: an allocation between two of them, of a slot that was active at both, is not seen, so ages are upper
bounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nsm.runtimes.parity.metrics import quantile
from nsm.runtimes.parity.report import AgeError
from nsm.trace import Array, Trace


def recorded_ages(trace: Trace, mask: str) -> Array:
    """Age in steps of every slot after each sampled step, [M, n, S] as `slot_ages`; `mask` is the name of a state."""
    decided = trace.decisions.get(mask)
    if decided is None:
        return slot_ages(trace.before[mask], trace.after[mask], trace.sampled)
    ages = slot_ages(decided[:, :-1], decided[:, 1:], np.arange(trace.steps))
    return ages[: trace.state_streams, trace.sampled]


def slot_ages(before: Array, after: Array, sampled: Array) -> Array:
    """Age in steps of every slot after each sampled step.

    Args:
        before, after: [M, n, S] bool, the masks around the sampled steps.
        sampled: [n], the steps, ascending.

    Returns:
        [M, n, S] int64, at least 1 where the slot is active, 0 where it is masked.
    """
    ages = np.zeros(after.shape, np.int64)
    masked_at = np.zeros(after[:, 0].shape, np.int64)  # steps since the beginning, when last seen masked
    for index, step in enumerate(sampled.tolist()):
        masked_at = np.where(before[:, index], masked_at, step)
        masked_at = np.where(after[:, index], masked_at, step + 1)
        ages[:, index] = step + 1 - masked_at
    return ages


def errors_by_age(ages: Sequence[Array], errors: Sequence[Array]) -> tuple[AgeError, ...]:
    """Errors of slots in groups of ages that double: 1, 2 .. 3, 4 .. 7, ...; groups without a slot are left out.

    Args:
        ages: whole numbers from 1 on; arrays that fit `errors` one by one.
        errors: of the slots.
    """
    if not ages:
        return ()
    age, error = np.concatenate(ages), np.concatenate(errors)
    groups = np.floor(np.log2(age)).astype(np.int64)
    found = []
    for group in np.unique(groups).tolist():
        values = error[groups == group]
        found.append(AgeError(2**group, 2 ** (group + 1) - 1, quantile(values, 0.5), quantile(values, 0.99)))
    return tuple(found)
