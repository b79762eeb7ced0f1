"""Right models pass every experiment: made of gated cells, rings, caches, counters and masks, drawn by hypothesis."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nsm
from nsm import Carried

WIDTH = 3


class Gated(nn.Module):
    """A gated cell, h [B, size]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(WIDTH, size), nn.Linear(size, WIDTH)
        self.start = nn.Parameter(torch.randn(1, size))

    def states(self) -> list[Tensor]:
        return [self.start]

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, list[Tensor]]:
        h = self.cell(x, h)
        return self.out(h), [h]


class Ring(nn.Module):
    """The last `size` inputs, written at the count modulo size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size + 1

    def states(self) -> list[Tensor]:
        return [torch.zeros(1, self.size, WIDTH), torch.zeros(1, dtype=torch.int64)]

    def forward(self, x: Tensor, ring: Tensor, count: Tensor) -> tuple[Tensor, list[Tensor]]:
        here = (torch.arange(self.size) == (count % self.size)[:, None])[..., None]
        ring = torch.where(here, x[:, None], ring)
        return ring.mean(1), [ring, count + 1]


class Cached(nn.Module):
    """Attention over the last `size` tokens, with a mask of those that there are: cat, then cut."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.project = size + 1, nn.Linear(WIDTH, 3 * WIDTH)

    def states(self) -> list[Tensor]:
        cache = torch.zeros(1, self.size, WIDTH)
        return [cache, cache.clone(), torch.zeros(1, self.size, dtype=torch.bool)]

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        q, k, v = self.project(x).chunk(3, -1)
        keys, values = (torch.cat([old[:, 1:], new[:, None]], 1) for old, new in ((keys, k), (values, v)))
        mask = torch.cat([mask[:, 1:], torch.ones_like(mask[:, :1])], 1)
        scores = (keys @ q[:, :, None]).squeeze(-1).masked_fill(~mask, -1e4)
        return (scores.softmax(-1)[:, None] @ values).squeeze(1), [keys, values, mask]


class Position(nn.Module):
    """A table that is looked up by the position modulo its length."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(size, WIDTH))

    def states(self) -> list[Tensor]:
        return [torch.zeros(1, dtype=torch.int64)]

    def forward(self, x: Tensor, at: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.table[at % len(self.table)] * x, [at + 1]


class Delay(nn.Module):
    """The input of the step before; states handed on."""

    def __init__(self, size: int) -> None:
        super().__init__()

    def states(self) -> list[Tensor]:
        return [torch.zeros(1, WIDTH), torch.zeros(1, WIDTH)]

    def forward(self, x: Tensor, late: Tensor, later: Tensor) -> tuple[Tensor, list[Tensor]]:
        return later, [x, late]


def states_of(part: Any) -> list[Tensor]:
    found: list[Tensor] = part.states()
    return found


class Parts(nn.Module):
    """The sum of what the parts answer, over x [B, 3] or [B, T, 3], or ids."""

    def __init__(self, parts: list[nn.Module], timed: bool, ids: bool) -> None:
        super().__init__()
        self.parts, self.timed = nn.ModuleList(parts), timed
        self.embed = nn.Embedding(11, WIDTH) if ids else nn.Identity()

    def one(self, x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        total, start = torch.zeros_like(x), 0
        after: list[Tensor] = []
        for part in self.parts:
            count = len(states_of(part))
            y, new = part(x, *states[start : start + count])
            total, after, start = total + y, after + new, start + count
        return total, after

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        x, held, rows = self.embed(x), list(states), []
        for row in x.unbind(1) if self.timed else [x]:
            y, held = self.one(row, held)
            rows.append(y)
        return (torch.stack(rows, 1) if self.timed else rows[0], *held)


KINDS: list[Any] = [Gated, Ring, Cached, Position, Delay]


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 9)), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
    st.integers(0, 9),
)
def test_right_models_pass(parts: list[tuple[Any, int]], timed: bool, ids: bool, seed: int) -> None:
    torch.manual_seed(seed)
    module = Parts([kind(size) for kind, size in parts], timed, ids)
    starts = [start for part in module.parts for start in states_of(part)]
    states = [Carried(f"s{index}", start) for index, start in enumerate(starts)]
    options: dict[str, Any] = {"vocab_size": 11} if ids else {"token_shape": (WIDTH,)}
    step = nsm.as_step(module, states, timed=timed, chunk_size=3, **options)
    assert step.lanes is None
    skipped = {item.name for item in step.examination.experiments if item.status == "skipped"}
    assert skipped == {"offline"} | (set() if timed else {"split"})
    assert not any(item.severity == "warning" for item in step.examination.messages)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_layers_are_held_against_their_own_forward(kind: Any, batch_first: bool) -> None:
    step = nsm.as_step(kind(5, 7, num_layers=2, batch_first=batch_first), chunk_size=4)
    assert all(item.status == "passed" for item in step.examination.experiments)
