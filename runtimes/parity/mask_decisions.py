"""Branches: decisions of an adaptive bank that rounding may turn the other way, and when that is excused.

A slot is pruned or allocated where an importance crosses a threshold. Where the reference itself stood next to the
threshold, rounding alone can make the target decide otherwise, and from there on the two streams are different ones.
So the first mask of a stream that differs is excused where the reference's margin, the distance to the nearest
threshold, was at most

    2 * (budget of the free-run p99) * rms over the trace of the importance:

a bound from the budget, never from the measured error. The metrics of that stream then end before the step. Masks and
importances are known at every step of the trace, so the step is the one at which the decision was made. In a call of
several chunks there are several decisions, judged by the importances before and after the call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nsm.spec import StepSpec
from nsm.trace import Array, Trace

_THRESHOLDS = ("prune_threshold", "allocate_threshold")


def thresholds_of(config: Mapping[str, Any]) -> tuple[float, ...]:
    """The thresholds on the importance in a model's config (`manifest.model["config"]`); none where it has none."""
    return tuple(float(config[name]) for name in _THRESHOLDS if name in config)


def decided_masks(spec: StepSpec) -> tuple[str, ...]:
    """Names of the masks that a model decides about while it runs, in the order of the layers."""
    names = [name for name in spec.state_names if name.endswith(".mask")]
    return tuple(name for name in names if _importance_of(name) in spec.state_names)


def decided_states(spec: StepSpec) -> tuple[str, ...]:
    """Names of these masks and of the importances they are decided by: the states that a trace holds at every step."""
    return tuple(state for name in decided_masks(spec) for state in (name, _importance_of(name)))


class Decisions:
    """The reference's decisions, and how close they were.

    Args:
        trace: of the reference.
        masks: as found by `decided_masks`.
        thresholds: of the importances; without any, nothing is excused.
        free_run_p99: of the budget.
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
        """The slots that differ after a step, by mask; masks that agree are left out."""
        found = {name: self._trace[name][stream, step + 1] != given[name] for name in self.masks}
        return {name: slots for name, slots in found.items() if slots.any()}

    def excused(self, stream: int, step: int, differing: Mapping[str, Array]) -> bool:
        """Whether the decision was close enough: that of the lowest layer, on which the others depend."""
        name = next(iter(differing))
        return self.margin(name, stream, step, differing[name]) <= self._bounds[name]

    def margin(self, name: str, stream: int, step: int, slots: Array) -> float:
        """The smallest distance to a threshold of the importances that decided about these slots.

        About an active slot its own importance decides. A free one is allocated where that of the least important
        active slot is above the threshold.

        Args:
            name: of the mask.
            stream, step: where the masks differ.
            slots: [S] bool, those that differ.
        """
        nearest = float("inf")
        if not self._thresholds.size:
            return nearest
        importance, mask = self._trace[_importance_of(name)][stream], self._trace[name][stream]
        for scores, active in ((importance[at], mask[at]) for at in (step, step + 1)):  # before and after it
            deciding = list(scores[slots])
            if (slots & ~mask[step]).any() and active.any():
                deciding.append(scores[active].min())
            distances = np.abs(np.array(deciding, np.float64)[:, None] - self._thresholds)
            nearest = min(nearest, float(distances.min()))
        return nearest


def _importance_of(mask: str) -> str:
    return mask.removesuffix(".mask") + ".importance"
