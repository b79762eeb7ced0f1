"""Consolidation: what becomes of a bank after a chunk was written into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from nsm.errors import ConfigError
from nsm.modules.bank.propagator import GATE_TYPES, GateType, StatePropagator
from nsm.modules.bank.router import TokenToStateRouter
from nsm.modules.ops import slots_of, to_bank, to_states


class Consolidation(nn.Module):
    """Gates between a bank and what it was, communication between slots, and writes into slower banks.

    Letters: B lanes, S slots in all, S1 of one time scale, D = `state_dim`, R bank heads of f = D / (2 R), G = 2 R.

    Args:
        state_dim: D.
        num_states: S, split evenly into one group of S1 per time scale.
        heads: R.
        every: the gates run every so many chunks; 0 means never.
        hierarchy: periods in chunks of slower banks, ascending. The bank of a time scale is consolidated, and written
            from the next faster one, when its own period is over (Koutnik et al. 2014 run parts of a recurrent
            network at such periods).
        gate_type: see `StatePropagator`.
        communication: whether active slots attend to each other when they are consolidated.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    unit: Tensor

    def __init__(
        self,
        state_dim: int,
        num_states: int,
        heads: int,
        *,
        every: int = 1,
        hierarchy: Sequence[int] = (),
        gate_type: GateType = "gru",
        communication: bool = False,
    ) -> None:
        super().__init__()
        if every < 0:
            raise ConfigError(f"consolidate_every must be >= 0; given {every}.")
        if communication and not every:
            raise ConfigError(
                "Slots communicate when they are consolidated: communication needs consolidate_every >= 1."
            )
        if gate_type not in GATE_TYPES:
            raise ConfigError(f"gate_type must be one of {', '.join(GATE_TYPES)}; given {gate_type!r}.")
        levels = 1 + len(hierarchy)
        if any(period < 2 for period in hierarchy) or list(hierarchy) != sorted(set(hierarchy)) or num_states % levels:
            raise ConfigError(
                "hierarchy gives the periods of the slower banks, ascending, each >= 2, and num_states is shared out "
                f"evenly among 1 + len(hierarchy) banks; given hierarchy={tuple(hierarchy)}, num_states={num_states}."
            )
        self.every = every
        self.hierarchy = tuple(hierarchy)
        self.heads = heads
        self.level_size = num_states // levels
        self.has_cell = bool(every) and gate_type == "lstm"
        if every:
            width = state_dim // (2 * heads)
            self.bank_norm = nn.Parameter(torch.ones(2 * heads, 1, width))
            self.register_buffer("unit", torch.ones(width), persistent=False)
            self.propagator = StatePropagator(state_dim, gate_type, communication, heads, 2 * heads)
        self.lift = nn.ModuleList(TokenToStateRouter(state_dim, state_dim, self.level_size, heads) for _ in hierarchy)

    @property
    def periods(self) -> tuple[int, ...]:
        """The periods, in chunks, of everything that does not happen after every one."""
        return tuple(period for period in (self.every, *self.hierarchy) if period > 1)

    def forward(
        self, bank: Tensor, cell: Tensor | None, mask: Tensor, turn: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The bank, and the cell of an LSTM, after a chunk.

        Args:
            bank: [B, G, S, f], with what the chunk wrote; empty slots are zero and stay so.
            cell: like the bank; None unless `has_cell`.
            mask: [B, S] bool, the active slots.
            turn: [B], the number of the chunk, from 1, within the cycle of the periods; None without periods.
        """
        if self.every:
            bank, cell = self._gated(bank, cell, mask, turn)
        for level, period in enumerate(self.hierarchy):
            router = cast("TokenToStateRouter", self.lift[level])
            bank = self._lifted(bank, mask, level, router, _due(turn, period))
        return bank, cell

    def _gated(
        self, bank: Tensor, cell: Tensor | None, mask: Tensor, turn: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        # By heads, `bank_norm` is done to the gates' matrices. ONNX Runtime has one kernel for this norm (Zhang and
        # Sennrich 2019), where it ends in a product with a vector.
        new = bank / torch.sqrt(torch.square(bank).mean(-1, keepdim=True) + 1e-6) * self.unit
        kept = None if cell is None else torch.where(slots_of(mask), cell, 0.0)
        next_bank, next_cell = self.propagator.transition(bank, new, kept, self.bank_norm)
        if self.propagator.enable_communication:
            next_bank = to_bank(self.propagator.communicate(to_states(next_bank), mask), self.heads)
        # Gates have biases: an empty slot stays empty.
        changes = mask
        due = _due(turn, self.every)
        if next_cell is None and due is None and not self.hierarchy:
            return next_bank * slots_of(mask).to(bank.dtype), None
        if due is not None:
            changes = changes & due[:, None]
        if self.hierarchy and turn is not None:
            slower = [(turn % period == 0)[:, None].expand(-1, self.level_size) for period in self.hierarchy]
            changes = changes & torch.cat([torch.ones_like(slower[0]), *slower], 1)
        changed = slots_of(changes)
        if next_cell is not None and cell is not None:
            cell = torch.where(changed, next_cell, cell)
        return torch.where(changed, next_bank, bank), cell

    def _lifted(self, bank: Tensor, mask: Tensor, level: int, router: TokenToStateRouter, due: Tensor | None) -> Tensor:
        """The bank after the slots of one time scale were written, like tokens, into those of the next slower one."""
        size = self.level_size
        low, high = level * size, (level + 1) * size
        faster, slower = bank[..., low:high, :], bank[..., high : high + size, :]
        states, receiving = to_states(faster), mask[:, high : high + size]
        scores, gate = router.scores(states)
        weights = router.weights(scores, receiving) * gate
        weights = torch.where(mask[:, None, low:high, None], weights, 0.0)
        if due is not None:
            weights = torch.where(due[:, None, None, None], weights, 0.0)
        keep, update = router.transition(weights, to_bank(router.value(states), self.heads))
        keep = torch.where(slots_of(receiving), keep, 0.0)
        return torch.cat([bank[..., :high, :], keep * slower + update, bank[..., high + size :, :]], -2)


def _due(turn: Tensor | None, period: int) -> Tensor | None:
    """The lanes [B] on which something of this period happens in this turn; None for all."""
    if period == 1 or turn is None:
        return None
    return turn % period == 0
