"""Consolidation: the update of a bank at the end of a chunk; equations (10) - (13) of the reference."""

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
    """Gated transition of the slots, communication between slots, and writes to slower time scales.

    Letters: B lanes, S slots in all, S1 of one time scale, D = `state_dim`, R bank heads of f = D / (2 R), G = 2 R.

    Args:
        state_dim: D.
        num_states: S, split evenly into one group of S1 per time scale.
        heads: R.
        every: chunks between two runs of the gates; 0 disables them.
        hierarchy: periods, in chunks, of the slower time scales, ascending. The slots of a time scale are consolidated,
            and written from the next faster one, at the end of each period (Koutnik et al. 2014 run parts of a
            recurrent network at such periods).
        gate_type: see `StatePropagator`.
        communication: whether active slots attend to each other after the gates.

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
        """The periods, in chunks, that are longer than one chunk."""
        return tuple(period for period in (self.every, *self.hierarchy) if period > 1)

    def forward(
        self, bank: Tensor, cell: Tensor | None, mask: Tensor, turn: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Update the bank, and the cell of an LSTM, at the end of a chunk.

        Args:
            bank: [B, G, S, f], after the writes of the chunk; inactive slots are zero and stay zero.
            cell: like the bank; None unless `has_cell`.
            mask: [B, S] bool, the active slots.
            turn: [B], the index of the chunk, from 1, within the cycle of the periods; None without periods.
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
        # backend: ONNX Runtime fuses an RMS norm (Zhang and Sennrich 2019) that ends in a Mul with a vector, so `unit`
        # stands there; the scale per head, `bank_norm`, is folded into the matrices of the gates.
        new = bank / torch.sqrt(torch.square(bank).mean(-1, keepdim=True) + 1e-6) * self.unit
        kept = None if cell is None else torch.where(slots_of(mask), cell, 0.0)
        next_bank, next_cell = self.propagator.transition(bank, new, kept, self.bank_norm)
        if self.propagator.enable_communication:
            next_bank = to_bank(self.propagator.communicate(to_states(next_bank), mask), self.heads)
        # The gates have biases, so inactive slots are set to zero again.
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
        """Write the slots of one time scale, like tokens, to those of the next slower one."""
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
    """The lanes [B] at the end of this period; None for all."""
    if period == 1 or turn is None:
        return None
    return turn % period == 0
