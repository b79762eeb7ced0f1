"""Steps over a table or cache that ends: examined up to there, and not refused for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nsm
from nsm.errors import ConfigError, UnsupportedError

COUNTER = torch.zeros(1, dtype=torch.int64)


class Table(nn.Module):
    """A row of a table for each position."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.e = nn.Embedding(rows, 3)

    def forward(self, x: Tensor, position: Tensor) -> Any:
        return x + self.e(position), position + 1


class FirstForAll(Table):
    """Takes the position of the first stream for all of them."""

    def forward(self, x: Tensor, position: Tensor) -> Any:
        return x + self.e(position[:1]), position + 1


class Cache(nn.Module):
    """Adds up what it was given so far, from a table that is written at a position; any number of tokens."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.l = rows, nn.Linear(3, 3)

    def forward(self, x: Tensor, table: Tensor, position: Tensor) -> Any:
        places = position[:, None] + torch.arange(x.shape[1])
        table = table.scatter(1, places[:, :, None].expand(-1, -1, 3), self.l(x))
        seen = (torch.arange(self.rows)[None, None] <= places[:, :, None]).float()
        return seen @ table, table, position + x.shape[1]


class LengthInside(Cache):
    """The same, and a call of several tokens adds their mean."""

    def forward(self, x: Tensor, table: Tensor, position: Tensor) -> Any:
        y, table, position = super().forward(x, table, position)
        return y + x.mean(1, keepdim=True), table, position


class Breaks(nn.Module):
    """Fails for no reason that a counter shows."""

    def forward(self, x: Tensor, h: Tensor) -> Any:
        h = 0.5 * h + 1
        if bool((h > 1.99).any()):
            raise ValueError("too large")
        return x + h, h


def table(kind: type[Table], rows: int) -> nsm.AdaptedModel:
    return nsm.as_step(kind(rows), [COUNTER], token_shape=(3,))


def cache(kind: type[Cache], rows: int, chunk: int = 4) -> nsm.AdaptedModel:
    states = [torch.zeros(1, rows, 3), COUNTER]
    return nsm.as_step(kind(rows), states, token_shape=(3,), timed=True, chunk_size=chunk)


@pytest.mark.parametrize("rows", [3, 5, 20, 63, 64, 66, 75])
def test_a_table_is_examined_up_to_its_end(rows: int) -> None:
    model = table(Table, rows)
    assert model.lanes is None
    assert f"fails after {rows} tokens of a stream, where a table or cache ends" in " ".join(
        map(str, model.examination.messages)
    )
    assert "still filling" not in " ".join(map(str, model.examination.messages))


@pytest.mark.parametrize("rows", [8, 9, 30, 64, 76, 80, 96])
def test_a_cache_is_examined_up_to_its_end(rows: int) -> None:
    model = cache(Cache, rows)
    assert model.lanes is None
    assert "where a table or cache ends" in " ".join(map(str, model.examination.messages))
    status = {item.name: item.status for item in model.examination.experiments}
    assert status["split"] == "passed"  # with fewer tokens a call where the table is short


@pytest.mark.parametrize("rows", [*range(77, 100), 5000])
def test_a_long_table_is_examined_as_any_other_step(rows: int) -> None:
    assert table(Table, rows).lanes is None


def test_faults_are_found_before_the_end() -> None:
    with pytest.raises(UnsupportedError, match="mixes its lanes"):
        table(FirstForAll, 20)
    with pytest.raises(UnsupportedError, match="a length is built into it"):
        cache(LengthInside, 40)


def test_a_step_that_fails_where_nothing_counts_is_refused() -> None:
    with pytest.raises(ConfigError, match="too large"):
        nsm.as_step(Breaks(), [torch.zeros(1, 3)], token_shape=(3,))


def test_a_call_longer_than_the_table_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"fails on tokens of shape \[1, 8, 3\]"):
        cache(Cache, 7)
