"""RecurrentLM: LSTM or GRU layers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from nsm.baselines.base import CausalLM, RecurrentLayer
from nsm.errors import ConfigError
from nsm.models import State, checked_sizes

Kind = Literal["lstm", "gru"]
_CELLS: dict[str, type[nn.LSTM | nn.GRU]] = {"lstm": nn.LSTM, "gru": nn.GRU}
_ROLES: dict[str, tuple[str, ...]] = {"lstm": ("hidden", "cell"), "gru": ("hidden",)}


class RecurrentLM(CausalLM):
    """Layers of x + LSTM(norm(x)) (Hochreiter & Schmidhuber 1997), or of x + GRU(norm(x)) (Cho et al. 2014).

    The residual connections are those of Wu et al. 2016 (GNMT), without which stacks of more than a few recurrent
    layers train badly.

    State: `{i}.hidden` [B, d], and for the LSTM `{i}.cell` [B, d].

    Args:
        vocab_size: V.
        d_model: d.
        num_layers: depth.
        kind: "lstm" or "gru".
        chunk_size: K of the entry `step`.

    Raises:
        ConfigError: a size below 1, or an unknown kind.
    """

    def __init__(
        self, vocab_size: int, d_model: int, num_layers: int, kind: Kind = "lstm", chunk_size: int = 16
    ) -> None:
        size = checked_sizes(
            "RecurrentLM",
            {"vocab_size": vocab_size, "d_model": d_model, "num_layers": num_layers, "chunk_size": chunk_size},
        )
        if kind not in _CELLS:
            raise ConfigError(f"kind must be one of {', '.join(_CELLS)}; given {kind!r}.")
        layers = [GatedLayer(size["d_model"], kind) for _ in range(size["num_layers"])]
        super().__init__(size["vocab_size"], size["d_model"], size["chunk_size"], layers, embedding_std=0.1)
        self.config = {**size, "kind": kind}


class GatedLayer(RecurrentLayer):
    """x + RNN(norm(x)), [B, T, d] -> [B, T, d]."""

    def __init__(self, dim: int, kind: Kind) -> None:
        super().__init__()
        self.roles = _ROLES[kind]
        self.norm = nn.LayerNorm(dim)
        self.rnn = _CELLS[kind](dim, dim, batch_first=True)

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(self.roles, (batch, self.rnn.hidden_size))

    def forward(self, tokens: Tensor, state: State, valid: Tensor | None) -> tuple[Tensor, State]:
        inputs, start = self.norm(tokens), tuple(state[role] for role in self.roles)
        outputs, after = self._whole(inputs, start) if valid is None else self._partial(inputs, start, valid)
        return tokens + outputs, dict(zip(self.roles, after, strict=True))

    def _whole(self, inputs: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All tokens are valid: torch's operator, which becomes ONNX's LSTM or GRU."""
        start = tuple(value.unsqueeze(0) for value in state)
        outputs, after = self.rnn(inputs, start if len(start) > 1 else start[0])
        return outputs, tuple(value.squeeze(0) for value in (after if len(start) > 1 else (after,)))

    def _partial(self, inputs: Tensor, state: tuple[Tensor, ...], valid: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Lanes stop at different tokens: a loop, because the operator returns the last cell only."""
        input_weight, weight, input_bias, bias = self.rnn.all_weights[0]
        given = functional.linear(inputs, input_weight, input_bias)
        outputs = []
        for index, part in enumerate(given.unbind(1)):
            new = _CELL_STEPS[self.roles](part, functional.linear(state[0], weight, bias), state)
            counted = (index < valid)[:, None]
            state = tuple(torch.where(counted, one, old) for one, old in zip(new, state, strict=True))
            outputs.append(new[0])
        return torch.stack(outputs, 1), state


def _lstm_step(given: Tensor, carried: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """(hidden, cell) after one token, from the token's and the hidden state's part of the gates, [B, 4 d] each."""
    i, f, g, o = (given + carried).chunk(4, -1)
    cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def _gru_step(given: Tensor, carried: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """(hidden,) after one token, from the token's and the hidden state's part of the gates, [B, 3 d] each."""
    (r_x, z_x, n_x), (r_h, z_h, n_h) = given.chunk(3, -1), carried.chunk(3, -1)
    n = torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h)
    return (n + torch.sigmoid(z_x + z_h) * (state[0] - n),)


_CELL_STEPS = {_ROLES["lstm"]: _lstm_step, _ROLES["gru"]: _gru_step}
