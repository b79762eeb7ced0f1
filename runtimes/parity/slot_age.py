"""Slot ages, to show whether the error grows with the age of a slot.

The age of an active slot is the number of steps since the start of the stream or since the slot was allocated, the
later of the two. It follows from the masks in the trace: the age counts from the last step at which the slot was
masked. The trace has decided masks at every step, and other masks only around sampled steps. It misses an allocation
between two samples at which the slot is active, so those ages are upper bounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nsm.runtimes.parity.metrics import quantile
from nsm.runtimes.parity.report import AgeError
from nsm.trace import Array, Trace


def recorded_ages(trace: Trace, mask: str) -> Array:
    """Return the slot ages of the mask state `mask` after each sampled step, [M, n, S]; see `slot_ages`."""
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
    """Group slot errors by doubling ages: 1, 2 .. 3, 4 .. 7, ...; empty groups are omitted.

    Args:
        ages: integer arrays, at least 1, with the same shapes as `errors`.
        errors: errors of the slots.
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
