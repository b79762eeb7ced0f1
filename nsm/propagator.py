"""StatePropagator: the gated transition of a bank when a chunk is committed."""

from __future__ import annotations

from typing import Literal, get_args, overload

import torch
from torch import Tensor, nn

from nsm.errors import ConfigError
from nsm.router import MASKED_SCORE

GateType = Literal["gru", "lstm"]
GATE_TYPES: tuple[str, ...] = get_args(GateType)

# sigmoid(-3) = 0.047: an untrained gate keeps 95 % of what was there.
_KEEP_BIAS = -3.0


class BlockLinear(nn.Module):
    """A linear map with a block-diagonal matrix: G blocks of (in / G) x (out / G), so a G-th of the work."""

    def __init__(self, in_features: int, out_features: int, num_blocks: int) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        width = in_features // num_blocks
        self.weight = nn.Parameter(torch.empty(num_blocks, width, out_features // num_blocks))
        self.bias = nn.Parameter(torch.zeros(num_blocks, 1, out_features // num_blocks))
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x[N, in] -> [G, N, out / G], one row of results per block."""
        if self.num_blocks == 1:
            blocks = x.unsqueeze(0)
        else:
            blocks = x.view(x.shape[0], self.num_blocks, -1).transpose(0, 1)
        return torch.matmul(blocks, self.weight) + self.bias


class StatePropagator(nn.Module):
    """(prev, new) -> next state, for single states [B, D] or whole banks [B, S, D].

    gru:  r, z = sigmoid(..);  next = (1 - z) * prev + z * tanh(W new + r * (U prev))            (Cho et al. 2014)
    lstm: i, f, o = sigmoid(..);  cell' = f * cell + i * tanh(..);  next = (1 - o) * prev + o * tanh(cell')
          (Hochreiter and Schmidhuber 1997, with an output gate that interpolates, so that it can start at "keep")

    Both start near "keep": an untrained propagator hands on 95 % of `prev`.

    Communication lets the active slots of a bank attend to each other (multi-head, pre-norm, residual) and then
    gives every slot the norm it had before, so that communication turns states and never grows them. A single
    state [B, D] has nobody to talk to, and is left as it is.

    Args:
        state_dim: D.
        gate_type: "gru" or "lstm".
        enable_communication: whether slots attend to each other.
        num_heads: heads of the communication; must divide D.
        num_blocks: G, diagonal blocks of the gates' matrices; must divide D. 1 is a dense gate.

    Raises:
        ConfigError: an unknown gate type, or sizes that do not divide.
    """

    def __init__(
        self,
        state_dim: int = 128,
        gate_type: GateType = "gru",
        enable_communication: bool = True,
        num_heads: int = 4,
        num_blocks: int = 1,
    ) -> None:
        super().__init__()
        if gate_type not in GATE_TYPES:
            raise ConfigError(f"gate_type must be one of {', '.join(GATE_TYPES)}; given {gate_type!r}.")
        if state_dim < 1:
            raise ConfigError(f"state_dim must be >= 1; given {state_dim}.")
        for name, value in (("num_heads", num_heads), ("num_blocks", num_blocks)):
            if (name == "num_blocks" or enable_communication) and (value < 1 or state_dim % value):
                raise ConfigError(f"{name} must divide state_dim={state_dim}; given {value}.")
        self.state_dim = state_dim
        self.gate_type = gate_type
        self.enable_communication = enable_communication
        gates = 3 if gate_type == "gru" else 4
        self.from_new = BlockLinear(state_dim, gates * state_dim, num_blocks)
        self.from_prev = BlockLinear(state_dim, gates * state_dim, num_blocks)
        with torch.no_grad():
            # The last quarter or third of the outputs is the gate that lets anything change.
            self.from_new.bias.chunk(gates, -1)[-1].fill_(_KEEP_BIAS)
        if enable_communication:
            self.num_heads = num_heads
            self.norm = nn.LayerNorm(state_dim)
            self.qkv = nn.Linear(state_dim, 3 * state_dim, bias=False)
            self.out = nn.Linear(state_dim, state_dim, bias=False)
            nn.init.zeros_(self.out.weight)

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
            ConfigError: shapes that differ, or a cell given to a GRU.
        """
        if prev.shape != new.shape or prev.shape[-1] != self.state_dim or prev.dim() not in (2, 3):
            raise ConfigError(
                f"prev and new must both be [B, {self.state_dim}] or [B, S, {self.state_dim}]; "
                f"given {list(prev.shape)} and {list(new.shape)}."
            )
        if cell is not None and self.gate_type != "lstm":
            raise ConfigError("A GRU has no cell: leave `cell` out, or use gate_type='lstm'.")
        if cell is not None and cell.shape != prev.shape:
            raise ConfigError(f"The cell must be shaped like prev, {list(prev.shape)}; given {list(cell.shape)}.")
        flat = prev.reshape(-1, self.state_dim)
        a, b = self.from_new(new.reshape(-1, self.state_dim)), self.from_prev(flat)
        if self.gate_type == "gru":
            candidate, reset, update = (self._unblock(x) for x in self._gru(a, b))
            state, new_cell = flat + update * (torch.tanh(candidate + reset) - flat), None
        else:
            g, i, f, o = (self._unblock(x) for x in (a + b).chunk(4, -1))
            old_cell = flat if cell is None else cell.reshape(-1, self.state_dim)
            # The forget gate mirrors the input gate's start: keep the cell.
            new_cell = torch.sigmoid(f + 3.0) * old_cell + torch.sigmoid(i) * torch.tanh(g)
            state = flat + torch.sigmoid(o) * (torch.tanh(new_cell) - flat)
        state = state.view(prev.shape)
        if self.enable_communication and prev.dim() == 3:
            state = self._communicate(state, mask)
        if cell is None or new_cell is None:
            return state
        return state, new_cell.view(prev.shape)

    @staticmethod
    def _gru(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the two projections: the new part of the candidate, the reset part of it, the update gate."""
        candidate_new, reset_new, update_new = a.chunk(3, -1)
        candidate_prev, reset_prev, update_prev = b.chunk(3, -1)
        reset = torch.sigmoid(reset_new + reset_prev) * candidate_prev
        return candidate_new, reset, torch.sigmoid(update_new + update_prev)

    def _unblock(self, x: Tensor) -> Tensor:
        """[G, N, D / G] -> [N, D]."""
        return x.squeeze(0) if x.shape[0] == 1 else x.transpose(0, 1).reshape(-1, self.state_dim)

    def _communicate(self, state: Tensor, mask: Tensor | None) -> Tensor:
        batch, slots, dim = state.shape
        heads = self.qkv(self.norm(state)).view(batch, slots, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = torch.where(mask[:, None, None, :], scores, MASKED_SCORE)
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, slots, dim)
        turned: Tensor = state + self.out(mixed)
        norm = torch.linalg.vector_norm(state, dim=-1, keepdim=True)
        kept: Tensor = turned * (norm / (torch.linalg.vector_norm(turned, dim=-1, keepdim=True) + 1e-6))
        return kept
