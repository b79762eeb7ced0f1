"""StatePropagator: the gated transition of a bank at the end of a chunk; equations (11) and (12) of the reference."""

from __future__ import annotations

from math import gcd
from typing import Literal, get_args, overload

import torch
from torch import Tensor, nn

from nsm.errors import ConfigError
from nsm.modules.bank.router import MASKED_SCORE

GateType = Literal["gru", "lstm", "mingru"]
GATE_TYPES: tuple[str, ...] = get_args(GateType)
# Projections of the gates that see both prev and new; the last of them is the update gate.
_PROJECTIONS = {"gru": 3, "lstm": 4}

# sigmoid(-3) = 0.047: an untrained gate keeps 95 % of the state.
_KEEP_BIAS = -3.0


class BlockLinear(nn.Module):
    """A linear map with a block-diagonal matrix of G blocks, (in / G) x (out / G) each: 1 / G of the work."""

    def __init__(self, in_features: int, out_features: int, num_blocks: int, bias: float = 0.0) -> None:
        super().__init__()
        width = in_features // num_blocks
        self.weight = nn.Parameter(torch.empty(num_blocks, width, out_features // num_blocks))
        self.bias = nn.Parameter(torch.full((num_blocks, 1, out_features // num_blocks), bias))
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """x[B, G, N, in / G] -> [B, G, N, out / G]; `scale` [G, 1, in / G] multiplies x."""
        # backend: the scale is folded into the constant matrix, which removes a Mul.
        weight = self.weight if scale is None else scale.transpose(1, 2) * self.weight
        return torch.matmul(x, weight) + self.bias


class StatePropagator(nn.Module):
    """(prev, new) -> next state, for single states [B, D] or whole banks [B, S, D].

    gru:    r, z = sigmoid(..);  next = (1 - z) * prev + z * tanh(W new + r * (U prev))          (Cho et al. 2014)
    lstm:   i, f, o = sigmoid(..);  cell' = f * cell + i * tanh(..);  next = (1 - o) * prev + o * tanh(cell')
            (Hochreiter and Schmidhuber 1997, with an output gate that interpolates, so that it can start at "keep")
    mingru: z = sigmoid(V new);  next = (1 - z) * prev + z * W new, a quarter of a GRU's work     (Feng et al. 2024)

    All start near "keep": an untrained propagator keeps 95 % of `prev`.

    With communication, the active slots of a bank attend to each other (multi-head, pre-norm, residual). The result is
    scaled by the norm of the slot and by a gate that starts almost closed; then each slot is rescaled to its previous
    norm, so that communication changes directions only. A single state [B, D] is returned unchanged.

    Args:
        state_dim: D.
        gate_type: "gru", "lstm" or "mingru".
        enable_communication: whether slots attend to each other.
        num_heads: heads of the communication; must divide D (default: 4, or the
            largest divisor of it that does).
        num_blocks: G, diagonal blocks of the gates' matrices; must divide D. 1 is a dense gate.

    Raises:
        ConfigError: an unknown gate type, or sizes that do not divide.
    """

    def __init__(
        self,
        state_dim: int = 128,
        gate_type: GateType = "gru",
        enable_communication: bool = True,
        num_heads: int | None = None,
        num_blocks: int = 1,
    ) -> None:
        super().__init__()
        if gate_type not in GATE_TYPES:
            raise ConfigError(f"gate_type must be one of {', '.join(GATE_TYPES)}; given {gate_type!r}.")
        if state_dim < 1:
            raise ConfigError(f"state_dim must be >= 1; given {state_dim}.")
        num_heads = gcd(4, state_dim) if num_heads is None else num_heads
        for name, value in (("num_heads", num_heads), ("num_blocks", num_blocks)):
            if (name == "num_blocks" or enable_communication) and (value < 1 or state_dim % value):
                raise ConfigError(f"{name} must divide state_dim={state_dim}; given {value}.")
        self.state_dim = state_dim
        self.gate_type = gate_type
        self.num_blocks = num_blocks
        self.enable_communication = enable_communication
        if gate_type == "mingru":
            self.candidate = BlockLinear(state_dim, state_dim, num_blocks)
            self.update = BlockLinear(state_dim, state_dim, num_blocks, _KEEP_BIAS)
        else:
            gates = _PROJECTIONS[gate_type]
            self.from_new = BlockLinear(state_dim, gates * state_dim, num_blocks)
            self.from_prev = BlockLinear(state_dim, gates * state_dim, num_blocks)
            with torch.no_grad():
                self.from_new.bias.chunk(gates, -1)[-1].fill_(_KEEP_BIAS)
        if enable_communication:
            self.num_heads = num_heads
            self.norm = nn.LayerNorm(state_dim)
            self.qkv = nn.Linear(state_dim, 3 * state_dim, bias=False)
            self.out = nn.Linear(state_dim, state_dim, bias=False)
            nn.init.zeros_(self.out.weight)
            self.listen = nn.Linear(state_dim, 1)
            nn.init.constant_(self.listen.bias, _KEEP_BIAS)

    @overload
    def forward(self, prev: Tensor, new: Tensor, cell: None = None, mask: Tensor | None = None) -> Tensor: ...

    @overload
    def forward(self, prev: Tensor, new: Tensor, cell: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, prev: Tensor, new: Tensor, cell: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One transition.

        Args:
            prev, new: [B, D] or [B, S, D].
            cell: the LSTM's cell, shaped like `prev`. Without one the cell starts from `prev`.
            mask: [B, S] bool, which slots are active (for the communication; default: all).

        Returns:
            The next state, shaped like `prev`; with a `cell` given, (next state, next cell).

        Raises:
            ConfigError: shapes that differ, or a cell given to a gate that has none.
        """
        if prev.shape != new.shape or prev.shape[-1] != self.state_dim or prev.dim() not in (2, 3):
            raise ConfigError(
                f"prev and new must both be [B, {self.state_dim}] or [B, S, {self.state_dim}]; "
                f"given {list(prev.shape)} and {list(new.shape)}."
            )
        if cell is not None and self.gate_type != "lstm":
            raise ConfigError(f"A {self.gate_type} has no cell: leave `cell` out, or use gate_type='lstm'.")
        if cell is not None and cell.shape != prev.shape:
            raise ConfigError(f"The cell must be shaped like prev, {list(prev.shape)}; given {list(cell.shape)}.")
        blocks = [None if x is None else self._block(x) for x in (prev, new, cell)]
        assert blocks[0] is not None
        assert blocks[1] is not None
        next_state, next_cell = self.transition(blocks[0], blocks[1], blocks[2])
        state = self._unblock(next_state, prev)
        if self.enable_communication and prev.dim() == 3:
            state = self.communicate(state, mask)
        if cell is None or next_cell is None:
            return state
        return state, self._unblock(next_cell, prev)

    def transition(
        self, prev: Tensor, new: Tensor, cell: Tensor | None = None, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The gates on blocks: prev, new and cell [B, G, S, D / G] -> next state, and next cell for an LSTM.

        Args:
            scale: of `new`, [G, 1, D / G] (default: 1).
        """
        if self.gate_type == "mingru":
            return prev + torch.sigmoid(self.update(new, scale)) * (self.candidate(new, scale) - prev), None
        a, b = self.from_new(new, scale), self.from_prev(prev)
        if self.gate_type == "gru":
            (c1, r1, z1), (c2, r2, z2) = a.chunk(3, -1), b.chunk(3, -1)
            candidate = torch.tanh(c1 + torch.sigmoid(r1 + r2) * c2)
            return prev + torch.sigmoid(z1 + z2) * (candidate - prev), None
        g, i, f, o = (a + b).chunk(4, -1)
        # The forget gate starts like the output gate: the cell is kept.
        cell = torch.sigmoid(f - _KEEP_BIAS) * (prev if cell is None else cell) + torch.sigmoid(i) * torch.tanh(g)
        return prev + torch.sigmoid(o) * (torch.tanh(cell) - prev), cell

    def communicate(self, state: Tensor, mask: Tensor | None) -> Tensor:
        """Let the active slots of a bank [B, S, D] attend to each other."""
        batch, slots, dim = state.shape
        normed = self.norm(state)
        heads = self.qkv(normed).view(batch, slots, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = torch.where(mask[:, None, None, :], scores, MASKED_SCORE)
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, slots, dim)
        norm = torch.linalg.vector_norm(state, dim=-1, keepdim=True)
        turned: Tensor = state + torch.sigmoid(self.listen(normed)) * dim**-0.5 * norm * self.out(mixed)
        kept: Tensor = turned * (norm / (torch.linalg.vector_norm(turned, dim=-1, keepdim=True) + 1e-6))
        return kept

    def _block(self, x: Tensor) -> Tensor:
        """[B, D] or [B, S, D] -> [B, G, S or 1, D / G]."""
        rows = x.unsqueeze(1) if x.dim() == 2 else x
        return rows.view(*rows.shape[:2], self.num_blocks, -1).transpose(1, 2)

    def _unblock(self, x: Tensor, like: Tensor) -> Tensor:
        """Inverse of `_block`, to the shape of `like`."""
        return x.transpose(1, 2).reshape(like.shape)
