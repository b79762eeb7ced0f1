"""Foreign modules: good ones, and ones with a fault each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class VoiceActivity(nn.Module):
    """Convolutions over a frame of samples [B, 64], then a GRU over frames."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.features = nn.Conv1d(1, 4, 16, 8)
        self.memory = nn.GRUCell(4 * 7, width)
        self.head = nn.Linear(width, 1)

    def forward(self, frame: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.memory(torch.relu(self.features(frame[:, None])).flatten(1), hidden)
        return torch.sigmoid(self.head(hidden)), hidden


class Language(nn.Module):
    """Ids [B, T], and an LSTM whose state is a pair [layers, B, H]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.memory = nn.LSTM(8, 10, 2, batch_first=True)
        self.head = nn.Linear(10, 11)

    def forward(self, ids: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x, state = self.memory(self.embed(ids), state)
        return self.head(x), state


class Decay(nn.Module):
    """The step protocol: a dictionary of states, one of them learned, one a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.linspace(-1, 1, 3))
        self.mix = nn.Linear(3, 3)

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        return {"mean": self.start.expand(batch, 3), "seen": torch.zeros(batch, dtype=torch.int64)}

    def step(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        mean = 0.9 * state["mean"] + 0.1 * torch.tanh(self.mix(x))
        return mean * 2, {"mean": mean, "seen": (state["seen"] + 1) % 7}


class Window(nn.Module):
    """Attention over the last 4 tokens, whose keys and values are carried: cat, then cut."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(6, 18)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, filled: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v = self.project(x).chunk(3, -1)
        keys, values = (torch.cat([old, new[:, None]], 1)[:, 1:] for old, new in ((keys, k), (values, v)))
        filled = torch.cat([filled, torch.ones_like(filled[:, :1])], 1)[:, 1:]
        scores = (keys @ q[:, :, None]).squeeze(-1) + (filled - 1) * 1e4
        return (scores.softmax(-1)[:, None] @ values).squeeze(1), keys, values, filled


class Fault(nn.Module):
    """x [B, T, 3] and h [B, 3]; what it does wrong is its kind."""

    total: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("total", torch.zeros(3))
        self.last = torch.zeros(1, 3)
        self.scale: float | None = None
        self.norm = nn.BatchNorm1d(3, affine=False, track_running_stats=False)

    def forward(self, x: Tensor, h: Tensor) -> Any:
        rows = []
        kind = self.kind
        if kind == "frozen":
            x = x.reshape(x.shape[0], -1, 3)[:, :1].expand(-1, x.shape[1], -1)
        for index in range(x.shape[1]):
            h = 0.5 * h + x[:, index]
            rows.append(h)
        y = torch.stack(rows, 1)
        if kind == "buffer":
            self.total += h[0]
        if kind == "late buffer" and x.shape[1] > 1:
            self.total += h[0]
        if kind == "attribute":
            y, self.last = y + self.last, h
        if kind == "number":
            self.scale = float(x.abs().mean()) if self.scale is None else self.scale
            y = y * self.scale
        if kind == "random":
            y = y + torch.randn_like(y)
        if kind == "grows":
            return y, torch.cat([h, h], 1)
        if kind == "casts":
            return y, h.double()
        if kind == "half":
            return y.half(), h
        if kind == "pooled":
            return y.mean(), h
        if kind == "forgets":
            return y
        if kind == "raises":
            raise ValueError("no such luck")
        if kind == "mixes":
            return y - y.mean(0, keepdim=True) * (y.shape[0] > 1), h
        if kind == "drops":
            return y, h * 0 + 1
        return y, h


class Logarithm(nn.Module):
    """Powers x [B, 3], or [B, T, 3] of any length, above a number: the mean h [B, 3] of their logarithms."""

    def __init__(self, above: float = 0.0) -> None:
        super().__init__()
        self.above = above

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        rows = []
        for row in torch.log(x - self.above).reshape(x.shape[0], -1, 3).unbind(1):
            h = 0.9 * h + 0.1 * row
            rows.append(h)
        return torch.stack(rows, 1).reshape(x.shape), h


class OneStream(nn.Module):
    """A GRU that takes its one stream out of x [1, 3] and h [1, 4] and puts it back."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.GRUCell(3, 4)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.memory(x.squeeze(0), h.squeeze(0)).unsqueeze(0)
        return h * 2, h


class Learned(nn.Module):
    """h0 [layers, H] is learned: a state that begins with a row of it is a result of it."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = 0.5 * h + self.drop(x)
        return h * 2, h


class InPlace(nn.Module):
    """Writes into the state that it is given."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h.mul_(0.5).add_(x)
        return h.clone(), h.clone()


class Handed(nn.Module):
    """States that are handed on as they are: a delay line of two calls, a scale that stays, and a count of calls."""

    def forward(
        self, x: Tensor, late: Tensor, later: Tensor, scale: Tensor, calls: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return later * scale + x.square(), x, late, scale, calls + 1


class Twice(nn.Module):
    """One tensor is the answer and both of the states."""

    def forward(self, x: Tensor, h: Tensor, copy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = 0.5 * h + 0.25 * copy + x
        return h, h, h


class Counting(nn.Module):
    """The only state that ever changes is an integer."""

    def forward(self, x: Tensor, calls: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x * scale * calls[:, None].to(x.dtype), calls + 1, scale
