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
    """Mamba (Gu & Dao 2023), in the pure form of mamba-minimal: exact, one multiplication and addition a token.

    Letters: d model width, E = 2 d inner width, N numbers per channel, R = ceil(d / 16) rank of the time steps.

    State: `{i}.tail` [B, 3, E], the convolution's last inputs; `{i}.memory` [B, N, E].

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
    """x + out(S6(SiLU(conv(in(norm(x))))) * SiLU(gate)); [B, T, d] -> [B, T, d]."""

    def __init__(self, dim: int, state_size: int) -> None:
        super().__init__()
        inner, rank = 2 * dim, math.ceil(dim / 16)
        self.sizes = (rank, state_size, state_size)
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, 2 * inner, bias=False)
        self.mixing = LocalMixing(inner, 4)
        self.select = nn.Linear(inner, rank + 2 * state_size, bias=False)
        self.time_step = nn.Linear(rank, inner)
        self.log_rate = nn.Parameter(torch.arange(1.0, state_size + 1).log()[:, None].repeat(1, inner))
        self.through = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, dim, bias=False)
        # Time steps between 0.001 and 0.1 at first (section 3.6 of the paper).
        steps = torch.exp(torch.empty(inner).uniform_(math.log(1e-3), math.log(0.1)))
        with torch.no_grad():
            self.time_step.bias.copy_(steps + torch.log(-torch.expm1(-steps)))

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        size, inner = self.log_rate.shape
        return {"tail": (batch, self.mixing.width - 1, inner), "memory": (batch, size, inner)}

    def forward(self, tokens: Tensor, state: State, valid: Tensor | None) -> tuple[Tensor, State]:
        x, gate = self.project(self.norm(tokens)).chunk(2, -1)
        x, tail = self.mixing(x, state["tail"], valid)
        low, enter, leave = self.select(x).split(self.sizes, -1)
        step = functional.softplus(self.time_step(low))
        if valid is not None:
            # No time passes: the memory is multiplied by exp(0) and 0 is added.
            step = torch.where(counts(tokens.shape[1], valid).unsqueeze(-1), step, 0.0)
        y, memory = self.recur(x, step, enter, leave, state["memory"])
        return tokens + self.out((y + x * self.through) * functional.silu(gate)), {"tail": tail, "memory": memory}

    def recur(self, x: Tensor, step: Tensor, enter: Tensor, leave: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """h_t = exp(-step_t rate) h_t-1 + step_t x_t enter_t, y_t = leave_t h_t; h_-1 = memory.

        Args:
            x, step: [B, T, E].
            enter, leave: [B, T, N].
            memory: [B, N, E].

        Returns:
            y [B, T, E] and the memory after the last token.
        """
        keep = torch.exp(step.unsqueeze(2) * -self.log_rate.exp())
        add = enter.unsqueeze(-1) * (step * x).unsqueeze(2)
        memory, passed = memory.unsqueeze(1), []
        for kept, added in zip(keep.split(1, 1), add.split(1, 1), strict=True):
            memory = kept * memory + added
            passed.append(memory)
        return (leave.unsqueeze(2) @ torch.cat(passed, 1)).squeeze(2), memory.squeeze(1)
