"""What a module keeps from call to call: named where it is state, allowed where it is written before it is read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nsm
from nsm.errors import UnsupportedError

H = torch.zeros(1, 3)


class Cache:
    """No module: as the caches of decoders are."""

    def __init__(self) -> None:
        self.seen = 0
        self.keys: list[Any] = []


class Keeps(nn.Module):
    """h [B, 3]; what it keeps where is said by `how`."""

    total: Tensor
    inner: Any

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.mix = how, nn.Linear(3, 3)
        self.cache, self.table, self.calls, self.name = Cache(), {"n": 0}, 0, "a"
        self.pair, self.recent, self.array = (torch.zeros(3), 0), deque([0.0], 2), np.zeros(3)
        self.mem = torch.zeros(0)
        self.register_buffer("total", torch.zeros(3))
        self.inner = nn.Module()
        self.inner._hidden = torch.zeros(3)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.mix(x) + 0.5 * h)
        kind: Callable[[Tensor], Tensor] = getattr(self, self.how)
        return kind(h), h

    def integer_in_an_object(self, h: Tensor) -> Tensor:
        self.cache.seen += 1
        return h * (self.cache.seen < 20)

    def list_in_an_object(self, h: Tensor) -> Tensor:
        self.cache.keys.append(h.mean())
        first: Tensor = self.cache.keys[0]
        return h + first

    def dictionary(self, h: Tensor) -> Tensor:
        self.table["n"] += 1
        return h * (self.table["n"] % 30 > 0)

    def attribute(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h if self.calls < 50 else -h

    def text(self, h: Tensor) -> Tensor:
        self.name += "a"
        return h * len(self.name)

    def pair_(self, h: Tensor) -> Tensor:
        self.pair = (self.pair[0] + h[0].detach(), self.pair[1] + 1)
        return h + self.pair[0]

    def queue(self, h: Tensor) -> Tensor:
        self.recent.append(float(h.mean()))
        return h + self.recent[0]

    def numpy(self, h: Tensor) -> Tensor:
        self.array = self.array + 1
        return h + float(self.array[0])

    def private(self, h: Tensor) -> Tensor:
        self.inner._hidden = 0.5 * self.inner._hidden + h[0]
        hidden: Tensor = self.inner._hidden
        return h + hidden

    def buffer_in_place(self, h: Tensor) -> Tensor:
        self.total.add_(h[0])
        return h + self.total

    def weight(self, h: Tensor) -> Tensor:
        self.mix.weight.mul_(0.99)
        return h


NAMES = {
    "integer_in_an_object": "cache.seen",
    "list_in_an_object": r"cache.keys\[0\]",
    "dictionary": r"table\['n'\]",
    "attribute": "calls",
    "text": "name",
    "pair_": "pair",
    "queue": r"recent\[0\]",
    "numpy": "array",
    "private": "inner._hidden",
    "buffer_in_place": "total",
    "weight": "mix.weight",
}


@pytest.mark.parametrize("how", NAMES)
def test_state_is_found_and_named_wherever_it_hangs_and_the_module_is_left_as_it_was(how: str) -> None:
    module = Keeps(how)
    before = (module.cache.seen, list(module.cache.keys), dict(module.table), module.calls, list(module.recent))
    held = module.total.clone(), module.pair, module.inner._hidden
    message = rf"""Keeps keeps its attributes \[['"]{NAMES[how]}['"]"""
    with pytest.raises(UnsupportedError, match=message):
        nsm.as_step(module, [H], token_shape=(3,))
    now = (module.cache.seen, list(module.cache.keys), dict(module.table), module.calls, list(module.recent))
    assert now == before
    assert module.total.equal(held[0])
    assert module.pair is held[1]
    assert module.inner._hidden is held[2]
    assert module.training


class Shadow(nn.Module):
    """Writes what it is given to a place of its own before it reads it there, as snntorch's neurons do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.mix = how, nn.Linear(3, 3)
        self.cache = Cache()
        self.register_buffer("mem", torch.zeros(1, 3), persistent=False)
        self.plain = torch.zeros(0)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        if self.how == "attribute":
            self.plain = h
            self.plain = 0.9 * self.plain + self.mix(x)
            return (self.plain > 0).float(), self.plain
        if self.how == "buffer":
            self.mem = 0.9 * h + self.mix(x)
            return (self.mem > 0).float(), self.mem
        if self.how == "created":
            self.last = 0.9 * h + self.mix(x)
            return self.last * 2, self.last
        self.cache.seen = x.shape[1]
        return h * self.cache.seen, 0.9 * h + self.mix(x)


@pytest.mark.parametrize("how", ["attribute", "buffer", "created", "object"])
def test_what_is_written_before_it_is_read_is_no_state(how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Shadow(how)
    step = nsm.as_step(module, [H], token_shape=(3,))
    assert any("before it reads them in every call" in item.text for item in step.examination.messages)
    assert "last" not in vars(module)
    assert module.mem.shape == (1, 3)
    lanes = 1 if step.lanes else 2
    x = np.random.default_rng(0).standard_normal((lanes, 30, 3)).astype(np.float32)
    bundle = nsm.export_model(step, "onnxruntime", tmp_path / "m.nsm", batch=lanes, golden_steps=8)
    wanted, h = [], torch.zeros(lanes, 3)
    with torch.no_grad():
        for t in range(30):
            y, h = module(torch.from_numpy(x[:, t]), h)
            wanted.append(y)
    with nsm.open(bundle) as session:
        np.testing.assert_allclose(session.run(x)["outputs"], torch.stack(wanted, 1), atol=1e-6)


class Random(nn.Module):
    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.draw, self.noise = draw, Noise(draw)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = 0.5 * h + x
        return self.noise(h), h


class Noise(nn.Module):
    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, h: Tensor) -> Tensor:
        return self.draw(h)


@pytest.mark.parametrize(
    "draw",
    [
        lambda h: F.dropout(h + 1, 0.5, True),
        lambda h: h + torch.rand_like(h),
        lambda h: h + float(np.random.rand()),  # noqa: NPY002
        lambda h: h + __import__("random").random(),
    ],
)
def test_random_numbers_are_recognised_by_their_generators_and_named(draw: Callable[[Tensor], Tensor]) -> None:
    before = torch.get_rng_state()
    with pytest.raises(
        UnsupportedError, match=r"draws random numbers in noise \(Noise\) \(dropout or rand in forward\)"
    ):
        nsm.as_step(Random(draw), [H], token_shape=(3,))
    assert torch.get_rng_state().equal(before)


def test_random_numbers_that_change_nothing_are_no_fault() -> None:
    assert nsm.as_step(Random(lambda h: h + 0 * torch.rand_like(h)), [H], token_shape=(3,)).lanes is None


def test_dropout_that_is_a_module_is_off() -> None:
    module = Random(nn.Dropout(0.5))
    assert nsm.as_step(module, [H], token_shape=(3,)).lanes is None
    assert module.training


counter = {"calls": 0}


class Global(nn.Module):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        counter["calls"] += 1
        h = torch.tanh(x + 0.5 * h)
        return (h if counter["calls"] % 40 else h + 1), h


def test_a_counter_outside_of_the_module_is_found_by_running_a_stream_twice() -> None:
    with pytest.raises(UnsupportedError, match=r"gives another output outputs at call \d+ .* \(a global, a closure\)"):
        nsm.as_step(Global(), [H], token_shape=(3,))


class Normalised(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = 0.5 * h + self.norm(x)
        return h * 2, h


class AlwaysTraining(nn.BatchNorm1d):
    def train(self, mode: bool = True) -> AlwaysTraining:
        return super().train(True)


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (nn.BatchNorm1d(3, track_running_stats=False), r"norm \(BatchNorm1d\) has no running statistics"),
        (AlwaysTraining(3), r"norm \(AlwaysTraining\) is in train mode"),
    ],
)
def test_a_batch_normalisation_over_streams_is_named(norm: nn.Module, message: str) -> None:
    with pytest.raises(nsm.errors.NsmError, match=message):
        nsm.as_step(Normalised(norm), [H], token_shape=(3,))
    assert nsm.as_step(Normalised(nn.BatchNorm1d(3)), [H], token_shape=(3,)).lanes is None


class Buffer(nn.Module):
    cache: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.mix = how, nn.Linear(3, 3)
        self.register_buffer("cache", torch.zeros(1, 4, 3))
        self.log = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "assign":
            self.cache = torch.cat([self.cache[:, 1:], x[:, None]], 1)
        elif self.how == "copy_":
            self.cache.copy_(torch.cat([self.cache[:, 1:], x[:, None]], 1))
        elif self.how == "log":
            self.log = x
        y: Tensor = self.mix(x if self.how == "log" else self.cache.mean(1))
        return y


@pytest.mark.parametrize("states", [None, []])
@pytest.mark.parametrize("how", ["assign", "copy_"])
def test_the_only_state_in_a_buffer_is_named_with_the_way_out(how: str, states: Any) -> None:
    module = Buffer(how)
    message = r"registered buffer cache \[1, 4, 3\], .*def forward\(self, x, cache\).*Carried\('cache', torch.zeros\(1"
    with pytest.raises(UnsupportedError, match=message):
        nsm.as_step(module, states, token_shape=(3,))
    assert not module.cache.any()
    assert module.training


def test_an_attribute_that_nothing_reads_is_no_state() -> None:
    with pytest.raises(nsm.errors.ConfigError, match="has no step"):
        nsm.as_step(Buffer("log"), token_shape=(3,))
