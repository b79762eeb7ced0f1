"""RWKVLM: linear attention with a learned decay per channel and a matrix state, as in RWKV-5."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from nsm.arguments import real
from nsm.baselines.base import CausalLM, RecurrentLayer, counts, shift_tokens
from nsm.errors import ConfigError
from nsm.models import State, checked_sizes
from nsm.modules.ops import join_heads, split_heads

BLOCK = 16
"""Tokens per block that the closed form processes at once."""

FASTEST = 4.0
"""The fastest decay is exp(-FASTEST) per token; exp(BLOCK * FASTEST) is the largest factor in the closed form."""


class RWKVLM(CausalLM):
    """RWKV-5 (Peng et al. 2024, "Eagle and Finch"): time mix and channel mix, H heads of e = d / H channels.

    Version 5 has the largest state for its time per step: the recurrence over a block of tokens is a few MatMuls
    (Yang et al. 2024, "Gated linear attention", chunk-wise form). Version 4 needs exponents for each token.

    State: `{i}.time` and `{i}.channel` [B, d], the last input of the two mixes; `{i}.memory` [B, H, e, e].

    Args:
        vocab_size: V.
        d_model: d.
        num_layers: depth.
        num_heads: H.
        feed_forward: width of the channel mix as a multiple of d.
        chunk_size: K of the entry `step`.

    Raises:
        ConfigError: a size below 1, or heads that do not divide d.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        num_layers: int,
        num_heads: int = 8,
        feed_forward: float = 3.5,
        chunk_size: int = 16,
    ) -> None:
        size = checked_sizes(
            "RWKVLM",
            {
                "vocab_size": vocab_size,
                "d_model": d_model,
                "num_layers": num_layers,
                "num_heads": num_heads,
                "chunk_size": chunk_size,
            },
        )
        width, heads, factor = size["d_model"], size["num_heads"], real("feed_forward of RWKVLM", feed_forward)
        if width % heads or not math.isfinite(factor * width) or factor <= 0:
            raise ConfigError(
                f"num_heads must divide d_model={width}, and feed_forward be finite and > 0; given {heads}, {factor}."
            )
        layers = [RWKVLayer(width, heads, round(factor * width)) for _ in range(size["num_layers"])]
        super().__init__(size["vocab_size"], width, size["chunk_size"], layers)
        self.config = {**size, "feed_forward": factor}


class RWKVLayer(RecurrentLayer):
    """x + time_mix(norm(x)), then x + channel_mix(norm(x)); [B, T, d] -> [B, T, d]."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        ramp = torch.arange(dim) / max(1, dim - 1)
        self.time_norm = nn.LayerNorm(dim)
        self.time_mix = nn.Parameter(1.0 - ramp.repeat(4, 1)[:, None, None])  # of r, k, v, g
        self.receptance, self.key, self.value, self.gate, self.output = (
            nn.Linear(dim, dim, bias=False) for _ in range(5)
        )
        self.time_decay = nn.Parameter((-6.0 + 5.0 * ramp**0.85).reshape(heads, 1, -1))
        self.time_first = nn.Parameter(0.5 * (1.0 - ramp).reshape(heads, 1, -1))
        self.scale, self.shift = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.channel_norm = nn.LayerNorm(dim)
        self.channel_mix = nn.Parameter(1.0 - ramp.repeat(2, 1)[:, None, None])  # of r, k
        self.channel_receptance = nn.Linear(dim, dim, bias=False)
        self.channel_key = nn.Linear(dim, hidden, bias=False)
        self.channel_value = nn.Linear(hidden, dim, bias=False)

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        dim = self.scale.shape[0]
        width = dim // self.heads
        return {"time": (batch, dim), "channel": (batch, dim), "memory": (batch, self.heads, width, width)}

    def forward(self, tokens: Tensor, state: State, valid: Tensor | None) -> tuple[Tensor, State]:
        normed = self.time_norm(tokens)
        before, time = shift_tokens(normed, state["time"], valid)
        r, k, v, g = (normed + (before - normed) * self.time_mix).unbind(0)
        r, k, v = (split_heads(part, self.heads) for part in (self.receptance(r), self.key(k), self.value(v)))
        recalled, memory = self.recur(r, k, v, state["memory"], valid)
        recalled = join_heads(functional.layer_norm(recalled, recalled.shape[-1:])) * self.scale + self.shift
        tokens = tokens + self.output(recalled * functional.silu(self.gate(g)))

        normed = self.channel_norm(tokens)
        before, channel = shift_tokens(normed, state["channel"], valid)
        r, k = (normed + (before - normed) * self.channel_mix).unbind(0)
        made = self.channel_value(functional.relu(self.channel_key(k)).square())
        tokens = tokens + torch.sigmoid(self.channel_receptance(r)) * made
        return tokens, {"time": time, "channel": channel, "memory": memory}

    def recur(self, r: Tensor, k: Tensor, v: Tensor, memory: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """out_t = r_t (S_t + diag(u) k_t v_t), S_t+1 = diag(w) S_t + k_t v_t, for r, k, v [B, H, T, e]; S_0 = memory.

        Within a block, the decay is split into two factors, w^(t-1-i) = w^t w^(-1-i), so that all pairs of tokens are
        one MatMul. Returns out [B, H, T, e] and S_T (S_valid) [B, H, e, e].
        """
        rate = self.time_decay.exp().clamp(max=FASTEST)  # -log w
        outputs = []
        for start in range(0, r.shape[2], BLOCK):
            query, key, value = (part[:, :, start : start + BLOCK] for part in (r, k, v))
            length = query.shape[2]
            time = torch.arange(length, dtype=rate.dtype, device=rate.device)[:, None]
            earlier = torch.ones(length, length, dtype=torch.bool, device=rate.device).tril(-1)
            faded, raised = query * torch.exp(-rate * time), key * torch.exp(rate * (time + 1.0))
            pairs = torch.where(earlier, faded @ raised.transpose(-1, -2), 0.0)
            own = (query * key * self.time_first).sum(-1, keepdim=True)
            outputs.append(pairs @ value + faded @ memory + own * value)
            if valid is None:
                passed: Tensor | int = length
            else:
                inside = (valid - start).clamp(0, length)
                passed = inside[:, None, None, None]
                raised = torch.where(counts(length, inside)[:, None, :, None], raised, 0.0)
            memory = (memory + raised.transpose(-1, -2) @ value) * torch.exp(-rate * passed).transpose(-1, -2)
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)), memory
