"""Adaptation: a bank prunes and allocates its slots while it runs, inside the exported graph.

It decides when a chunk is committed, with comparisons and selections of static shape. Equation (14) of the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsm.errors import ConfigError

# Step of the importance trace per commit if every token is written with full strength.
TRACE_RATE = 0.1
# Step per commit with which the importance of a free slot returns to `FRESH`. The slot is not allocated again before
# it exceeds `RESTED`, so that no slot alternates between pruned and allocated.
REST_RATE = 0.02
FRESH, RESTED = 0.5, 0.4
# Written mass of a chunk below which the chunk is not novel.
SILENCE = 1e-3


@dataclass(frozen=True)
class Adaptation:
    """Thresholds at which slots are pruned and allocated.

    The importance of a slot is a moving average in (0, 1) of its share of the written mass. 0.5 is the mean share of
    the active slots; 0.3 is 43 % and 0.1 is 11 % of the mean.

    Args:
        prune_threshold: an active slot with a lower importance is pruned; at least one slot stays active.
        allocate_threshold: if the least important active slot is above this, all slots are busy, and one commit
            allocates the first free slot. It must be above `prune_threshold`; the gap is the hysteresis.
        novelty_threshold: a slot is also allocated if the tokens fit no slot: if their highest routing weight,
            averaged by write strength, is below 1 - novelty_threshold. A chunk that writes almost nothing is not
            novel.

    Raises:
        ConfigError: thresholds out of order.
    """

    prune_threshold: float = 0.1
    allocate_threshold: float = 0.45
    novelty_threshold: float = 0.9

    def __post_init__(self) -> None:
        if (
            not 0.0 <= self.prune_threshold < min(self.allocate_threshold, RESTED)
            or self.allocate_threshold >= 1.0
            or not 0.0 <= self.novelty_threshold <= 1.0
        ):
            raise ConfigError(
                f"Thresholds are in [0, 1], prune_threshold below allocate_threshold and below {RESTED}: the gap keeps "
                f"slots from flickering; given prune_threshold={self.prune_threshold}, "
                f"allocate_threshold={self.allocate_threshold}, novelty_threshold={self.novelty_threshold}."
            )

    def decide(self, mask: Tensor, importance: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Update the mask and the importance at the end of a chunk.

        Args:
            mask: [B, S] bool, the active slots during the chunk.
            importance: [B, S], before the chunk.
            weights: [B, R, C, S], the write weights of the chunk, w = gate * routing weight.

        Returns:
            mask [B, S], importance [B, S], and allocated [B, S] bool, the new slot.
        """
        written = weights.mean(1).sum(1)
        active = mask.to(written.dtype)
        total = written.sum(-1, keepdim=True)
        mass = written * active.sum(-1, keepdim=True)
        share = mass / (mass + total + 1e-6)
        rate = TRACE_RATE * total / weights.shape[2]
        traced = importance + rate * (share - importance)
        resting = importance + REST_RATE * (FRESH - importance)
        importance = torch.where(mask, traced, resting)

        strongest = _first(importance == torch.where(mask, importance, -1.0).amax(-1, keepdim=True), mask)
        kept = mask & ((importance >= self.prune_threshold) | strongest)
        least = torch.where(kept, importance, 2.0).amin(-1, keepdim=True)
        best = weights.amax(-1).mean(1).sum(1, keepdim=True)
        novel = (best < (1.0 - self.novelty_threshold) * total) & (total > SILENCE)
        needed = (least > self.allocate_threshold) | novel
        allocated = _first(importance > RESTED, ~mask) & needed
        return kept | allocated, torch.where(allocated, FRESH, importance), allocated


def _first(condition: Tensor, among: Tensor) -> Tensor:
    """The first slot of each lane that is in `among` and meets the condition: [B, S] bool, at most one per lane."""
    found = condition & among
    before = torch.cumsum(found.to(torch.int32), -1) - found.to(torch.int32)
    return found & (before == 0)
