"""StateManager: the initial bank of a layer, its active slots, and their importance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nsm.errors import ConfigError


class StateManager(nn.Module):
    """The initial bank of S slots with its mask; S = `max_states`, D = `state_dim`.

    The shape of the bank is fixed. The methods below change the mask; `forward` changes nothing. Importance is learned:
    its logarithm is added to the scores with which tokens read the slots, so a slot that does not help is read less
    and can be pruned.

    Args:
        state_dim: D, numbers per slot. The first D // 2 are the address, which reads compare; the others are the
            content, which reads return.
        max_states: S, slots in the bank.
        initial_states: active slots at the start (default: all).
        prune_threshold: importance in (0, 1) below which `prune_low_importance_states` masks a slot.

    Raises:
        ConfigError: sizes that make no bank.
    """

    mask: Tensor

    def __init__(
        self,
        state_dim: int = 128,
        max_states: int = 64,
        initial_states: int | None = None,
        prune_threshold: float = 0.1,
    ) -> None:
        super().__init__()
        initial_states = max_states if initial_states is None else initial_states
        if state_dim < 2 or max_states < 1:
            raise ConfigError(
                f"A bank needs state_dim >= 2 (address and content) and max_states >= 1; "
                f"given state_dim={state_dim}, max_states={max_states}."
            )
        if not 1 <= initial_states <= max_states:
            raise ConfigError(f"initial_states must be between 1 and max_states={max_states}; given {initial_states}.")
        if not 0.0 <= prune_threshold < 1.0:
            raise ConfigError(
                f"prune_threshold is an importance in [0, 1); given {prune_threshold}. "
                "A fresh slot has importance 0.5, a slot that is never written tends to 0."
            )
        self.state_dim = state_dim
        self.max_states = max_states
        self.prune_threshold = prune_threshold
        bank = torch.randn(max_states, state_dim) * 0.5
        bank[:, state_dim // 2 :] *= 0.2
        self.bank = nn.Parameter(bank)
        self.importance = nn.Parameter(torch.zeros(max_states))
        self.register_buffer("mask", torch.arange(max_states) < initial_states)

    def forward(self) -> Tensor:
        """The initial values of the active slots, [num_active, D]."""
        return self.bank[self.mask]

    @property
    def num_active_states(self) -> int:
        return int(self.mask.sum())

    @property
    def memory_usage(self) -> float:
        """Size of the active part of one lane's bank in MB (10^6 bytes)."""
        return self.num_active_states * self.state_dim * self.bank.element_size() / 1e6

    def get_active_count(self) -> int:
        return self.num_active_states

    def get_importance_scores(self) -> Tensor:
        """Learned importance of every slot, active or not: [max_states], strictly between 0 and 1."""
        return self.initial_importance().detach()

    def initial_importance(self) -> Tensor:
        """The importance scores with gradient, [max_states]: the initial importance trace of an adaptive bank."""
        scores = torch.sigmoid(self.importance)
        # Sigmoid rounds to 0 or 1 for large inputs.
        limits = torch.finfo(scores.dtype)
        return scores.clamp(limits.tiny, 1.0 - limits.eps / 2)

    def get_state_info(self) -> dict[str, Any]:
        """A summary: counts, sizes and the range of the importance."""
        scores = self.get_importance_scores()[self.mask]
        return {
            "num_active_states": self.num_active_states,
            "max_states": self.max_states,
            "state_dim": self.state_dim,
            "memory_usage_mb": self.memory_usage,
            "prune_threshold": self.prune_threshold,
            "importance_min": float(scores.min()),
            "importance_mean": float(scores.mean()),
            "importance_max": float(scores.max()),
        }

    @torch.no_grad()
    def prune_low_importance_states(self) -> int:
        """Mask the active slots whose importance is below the threshold; the most important one always stays.

        Returns:
            The number of masked slots.
        """
        scores = self.get_importance_scores()
        low = self.mask & (scores < self.prune_threshold)
        if bool((low == self.mask).all()):
            low[scores.masked_fill(~self.mask, -1.0).argmax()] = False
        self.mask = self.mask & ~low
        return int(low.sum())

    @torch.no_grad()
    def allocate_states(self, count: int = 1) -> int:
        """Activate the first `count` free slots, each with its own initial value and a fresh importance of 0.5.

        Returns:
            The number of activated slots, fewer than `count` if the bank is full.
        """
        if count < 0:
            raise ConfigError(f"count must be >= 0; given {count}.")
        free = torch.nonzero(~self.mask).flatten()[:count]
        self.mask = self.mask.index_fill(0, free, True)
        self.importance[free] = 0.0
        return int(free.numel())
