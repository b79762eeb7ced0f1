"""Mask decisions: which differences in the masks of an adaptive bank are excused as rounding.

The model prunes or allocates a slot when an importance crosses a threshold. If the importance of the reference is close
to the threshold, rounding alone can change the decision of the target, and the two streams differ from then on. So the
first differing mask of a stream is excused if the margin of the reference, its distance to the nearest threshold, is at
most

    2 * (budget of the free-run p99) * rms over the trace of the importance:

a bound from the budget, never from the measured error. The metrics of that stream then end before the step. The trace
has masks and importances at every step, so the comparison finds the exact step of the decision. A call of several
chunks makes several decisions; the importances before and after the call give their margin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nsm.spec import StepSpec
from nsm.trace import Array, Trace

_THRESHOLDS = ("prune_threshold", "allocate_threshold")


def thresholds_of(config: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the importance thresholds in a model's config (`manifest.model["config"]`); may be empty."""
    return tuple(float(config[name]) for name in _THRESHOLDS if name in config)


def decided_masks(spec: StepSpec) -> tuple[str, ...]:
    """Return the names of the masks that a model changes while it runs, in layer order."""
    names = [name for name in spec.state_names if name.endswith(".mask")]
    return tuple(name for name in names if _importance_of(name) in spec.state_names)


def decided_states(spec: StepSpec) -> tuple[str, ...]:
    """Return the names of these masks and their importances: the states in a trace at every step."""
    return tuple(state for name in decided_masks(spec) for state in (name, _importance_of(name)))


class Decisions:
    """The mask decisions of the reference and their margins.

    Args:
        trace: golden trace of the reference.
        masks: result of `decided_masks`.
        thresholds: thresholds of the importances; without any, nothing is excused.
        free_run_p99: limit in the budget.
    """

    def __init__(self, trace: Trace, masks: Sequence[str], thresholds: Sequence[float], free_run_p99: float) -> None:
        self.masks = tuple(masks)
        self._trace = trace.decisions
        self._thresholds = np.array(thresholds, np.float64)
        self._bounds = {}
        for name in masks:
            importance = self._trace[_importance_of(name)].astype(np.float64)
            self._bounds[name] = 2 * free_run_p99 * float(np.sqrt(np.mean(importance**2)))

    def differing(self, stream: int, step: int, given: Mapping[str, Array]) -> dict[str, Array]:
        """Return the slots that differ after a step, by mask, without masks that agree."""
        found = {name: self._trace[name][stream, step + 1] != given[name] for name in self.masks}
        return {name: slots for name, slots in found.items() if slots.any()}

    def excused(self, stream: int, step: int, differing: Mapping[str, Array]) -> bool:
        """Return whether the decision in the lowest layer, on which the others depend, is excused."""
        name = next(iter(differing))
        return self.margin(name, stream, step, differing[name]) <= self._bounds[name]

    def margin(self, name: str, stream: int, step: int, slots: Array) -> float:
        """Return the smallest distance to a threshold of the importances that decide these slots.

        The importance of an active slot decides whether it is pruned. A free slot is allocated when the importance of
        the least important active slot is above the threshold.

        Args:
            name: name of the mask.
            stream, step: where the masks differ.
            slots: [S] bool, the slots that differ.
        """
        nearest = float("inf")
        if not self._thresholds.size:
            return nearest
        importance, mask = self._trace[_importance_of(name)][stream], self._trace[name][stream]
        for scores, active in ((importance[at], mask[at]) for at in (step, step + 1)):  # before and after the step
            deciding = list(scores[slots])
            if (slots & ~mask[step]).any() and active.any():
                deciding.append(scores[active].min())
            distances = np.abs(np.array(deciding, np.float64)[:, None] - self._thresholds)
            nearest = min(nearest, float(distances.min()))
        return nearest


def _importance_of(mask: str) -> str:
    return mask.removesuffix(".mask") + ".importance"
