"""MambaLM: the selective state-space model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from nsm.baselines.base import CausalLM, RecurrentLayer, counts
from nsm.models import State, checked_sizes
from nsm.modules import LocalMixing


class MambaLM(CausalLM):
    """Mamba (Gu & Dao 2023) as a plain recurrence over tokens, with the parameter names of the authors' code.

    Letters: d model width, E = 2 d inner width, N state size, R = ceil(d / 16) rank of the time steps.

    State: `{i}.conv` [B, 3, E], the last inputs of the convolution; `{i}.ssm` [B, N, E]. A_log is [N, E], the
    transpose of the authors' layout.

    Args:
        vocab_size: V.
        d_model: d.
        num_layers: depth.
        state_size: N.
        chunk_size: K of the entry `step`.

    Raises:
        ConfigError: a size below 1.
    """

    def __init__(
        self, vocab_size: int, d_model: int, num_layers: int, state_size: int = 16, chunk_size: int = 16
    ) -> None:
        size = checked_sizes(
            "MambaLM",
            {
                "vocab_size": vocab_size,
                "d_model": d_model,
                "num_layers": num_layers,
                "state_size": state_size,
                "chunk_size": chunk_size,
            },
        )
        layers = [MambaLayer(size["d_model"], size["state_size"]) for _ in range(size["num_layers"])]
        super().__init__(size["vocab_size"], size["d_model"], size["chunk_size"], layers)
        self.config = dict(size)


class MambaLayer(RecurrentLayer):
    """x + out_proj(SSM(SiLU(conv1d(x_in))) * SiLU(z)) with x_in, z = in_proj(norm(x)); [B, T, d] -> [B, T, d]."""

    def __init__(self, dim: int, state_size: int) -> None:
        super().__init__()
        inner, rank = 2 * dim, math.ceil(dim / 16)
        self.sizes = (rank, state_size, state_size)
        self.norm = nn.LayerNorm(dim)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = LocalMixing(inner, 4)
        self.x_proj = nn.Linear(inner, rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, state_size + 1).log()[:, None].repeat(1, inner))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        # Initial time steps between 0.001 and 0.1 (section 3.6 of the paper).
        steps = torch.exp(torch.empty(inner).uniform_(math.log(1e-3), math.log(0.1)))
        with torch.no_grad():
            self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        size, inner = self.A_log.shape
        return {"conv": (batch, self.conv1d.width - 1, inner), "ssm": (batch, size, inner)}

    def forward(self, tokens: Tensor, state: State, valid: Tensor | None) -> tuple[Tensor, State]:
        x, z = self.in_proj(self.norm(tokens)).chunk(2, -1)
        x, tail = self.conv1d(x, state["conv"], valid)
        dt, B, C = self.x_proj(x).split(self.sizes, -1)
        dt = functional.softplus(self.dt_proj(dt))
        if valid is not None:
            # With a time step of 0, the state is multiplied by exp(0) and 0 is added.
            dt = torch.where(counts(tokens.shape[1], valid).unsqueeze(-1), dt, 0.0)
        y, h = self.selective_scan(x, dt, B, C, state["ssm"])
        return tokens + self.out_proj((y + x * self.D) * functional.silu(z)), {"conv": tail, "ssm": h}

    def selective_scan(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t and y_t = C_t h_t, with A = -exp(A_log).

        Args:
            x, dt: [B, T, E].
            B, C: [B, T, N].
            h: [B, N, E], the state before the first token.

        Returns:
            y [B, T, E] and the state after the last token.
        """
        dA = torch.exp(dt.unsqueeze(2) * -self.A_log.exp())  # [B, T, N, E]
        dBx = B.unsqueeze(-1) * (dt * x).unsqueeze(2)  # [B, T, N, E]
        h, states = h.unsqueeze(1), []
        for a, b in zip(dA.split(1, 1), dBx.split(1, 1), strict=True):
            h = a * h + b
            states.append(h)
        return (C.unsqueeze(2) @ torch.cat(states, 1)).squeeze(2), h.squeeze(1)
