"""Branches: decisions of an adaptive bank that rounding may turn the other way, and when that is excused.

A slot is pruned or allocated where an importance crosses a threshold. Where the reference itself stood next to the
threshold, rounding alone can make the target decide otherwise, and from there on the two streams are different ones.
So the first mask of a stream that differs is excused where the reference's margin, the distance to the nearest
threshold, was at most

    2 * (budget of the free-run p99) * rms over the trace of the importance:

a bound from the budget, never from the measured error. The metrics of that stream then end where its decisions last
agreed. Importances are known around the sampled steps alone: a branch between two of them is judged by what the
importance is at the later one, and mostly not excused.
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


class Decisions:
    """The reference's decisions, and how close they were.

    Args:
        trace: of the reference.
        masks: as found by `decided_masks`.
        thresholds: what importances are compared with; without any, nothing is excused.
        free_run_p99: of the budget.
    """

    def __init__(self, trace: Trace, masks: Sequence[str], thresholds: Sequence[float], free_run_p99: float) -> None:
        self.masks = tuple(masks)
        self._trace = trace
        self._thresholds = np.array(thresholds, np.float64)
        self._bounds = {}
        for name in masks:
            importance = trace.after[_importance_of(name)].astype(np.float64)
            self._bounds[name] = 2 * free_run_p99 * float(np.sqrt(np.mean(importance**2)))

    def differing(self, stream: int, index: int, given: Mapping[str, Array]) -> dict[str, Array]:
        """The slots that differ, by mask, at a sampled step; masks that agree are left out."""
        found = {name: self._trace.after[name][stream, index] != given[name] for name in self.masks}
        return {name: slots for name, slots in found.items() if slots.any()}

    def excused(self, stream: int, index: int, differing: Mapping[str, Array]) -> bool:
        """Whether the decision was close enough: that of the lowest layer, on which the others depend."""
        name = next(iter(differing))
        return self.margin(name, stream, index, differing[name]) <= self._bounds[name]

    def margin(self, name: str, stream: int, index: int, slots: Array) -> float:
        """The smallest distance to a threshold of the importances that decided about these slots.

        About an active slot its own importance decides. A free one is allocated where that of the least important
        active slot is above the threshold.

        Args:
            name: of the mask.
            stream, index: stream and sampled step.
            slots: [S] bool, those that differ.
        """
        importance = _importance_of(name)
        nearest = float("inf")
        if not self._thresholds.size:
            return nearest
        for part in (self._trace.before, self._trace.after):
            scores, active = part[importance][stream, index], part[name][stream, index]
            deciding = list(scores[slots])
            if (slots & ~self._trace.before[name][stream, index]).any() and active.any():
                deciding.append(scores[active].min())
            distances = np.abs(np.array(deciding, np.float64)[:, None] - self._thresholds)
            nearest = min(nearest, float(distances.min()))
        return nearest


def _importance_of(mask: str) -> str:
    return mask.removesuffix(".mask") + ".importance"
