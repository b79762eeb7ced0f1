"""Adaptation: a bank that prunes and allocates its own slots while it runs, inside the exported graph.

All decisions are made when a chunk is committed, with comparisons and selections of static shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsm.errors import ConfigError

# The importance trace moves this share of the way at a commit in which every token wrote with full strength.
TRACE_RATE = 0.1
# A free slot's importance returns to that of a fresh one this much a commit: until it is above `RESTED`, the slot
# is not allocated again, so none flickers between pruned and allocated.
REST_RATE = 0.02
FRESH, RESTED = 0.5, 0.4
# A chunk whose tokens write less than this in all says nothing about the slots.
SILENCE = 1e-3


@dataclass(frozen=True)
class Adaptation:
    """When slots come and go.

    Importance is a running trace in (0, 1) of the share of written mass: 0.5 is the usual share among the active
    slots, 0.3 is 43 % and 0.1 is 11 % of it.

    Args:
        prune_threshold: an active slot whose importance falls below is pruned; one at least always stays.
        allocate_threshold: where even the least important active slot is above, all are busy, and the first free
            slot is allocated, one a commit. It must be above the prune threshold: the gap is the hysteresis.
        novelty_threshold: a slot is also allocated for tokens that fit no slot: where the highest routing weight of
            the tokens written, averaged by how strongly they are written, is below 1 - novelty_threshold. A chunk
            that writes next to nothing is not novel.

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
        """The mask after a chunk.

        Args:
            mask: [B, S] bool, the slots active in the chunk.
            importance: [B, S], the trace before it.
            weights: [B, R, C, S], what the chunk wrote, w = gate * routing weight.

        Returns:
            mask [B, S], importance [B, S], and allocated [B, S] bool, the slot that is new.
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
    """The first slot of each lane that is `among` and meets the condition: [B, S] bool, at most one a lane."""
    found = condition & among
    before = torch.cumsum(found.to(torch.int32), -1) - found.to(torch.int32)
    return found & (before == 0)
