"""The step against the model's own forward over whole sequences: what no comparison with the step itself can show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nsm
from nsm.adapters.validate import summary
from nsm.errors import ConfigError, UnsupportedError

WINDOW, WIDTH = 20, 4


class Seen:
    """A cache that counts in a Python number, as those of decoders do."""

    def __init__(self) -> None:
        self.seen = 0


class Attention(nn.Module):
    """Causal attention with a window; `forward` over whole sequences of ids [B, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.project = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, ids: Tensor) -> Tensor:
        q, k, v = self.project(self.embed(ids)).chunk(3, -1)
        places = torch.arange(ids.shape[1])
        ahead = places[:, None] - places
        hidden = (ahead < 0) | (ahead >= WINDOW)
        y: Tensor = self.head((q @ k.mT).masked_fill(hidden, -1e4).softmax(-1) @ v)
        return y


class Wrapper(nn.Module):
    """A step of it with a cache of the window's length; `how` it knows how much of it is filled."""

    def __init__(self, model: Attention, how: str) -> None:
        super().__init__()
        self.model, self.how, self.cache = model, how, Seen()

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        cache = torch.zeros(batch, WINDOW, WIDTH)
        return {"keys": cache, "values": cache.clone(), "position": torch.zeros(batch, dtype=torch.int64)}

    def step(self, ids: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v = self.model.project(self.model.embed(ids)).chunk(3, -1)
        position = state["position"]
        if self.how == "made anew":
            self.cache = Seen()  # so that its number is that of the first token, always
        if self.how == "carried":
            seen = position + 1
        else:
            self.cache.seen += 1
            seen = torch.full_like(position, self.cache.seen)
        keys, values = (torch.cat([state[n][:, 1:], new[:, None]], 1) for n, new in (("keys", k), ("values", v)))
        empty = torch.arange(WINDOW) < (WINDOW - seen)[:, None]
        scores = (keys @ q[:, :, None]).squeeze(-1).masked_fill(empty, -1e4)
        y = self.model.head((scores.softmax(-1)[:, None] @ values).squeeze(1))
        return y, {"keys": keys, "values": values, "position": position + 1}


def wrapped(how: str) -> tuple[Attention, Wrapper]:
    torch.manual_seed(0)
    model = Attention()
    with torch.no_grad():
        model.project.weight.mul_(4)
    return model, Wrapper(model, how)


def test_a_step_that_is_the_model_passes() -> None:
    model, wrapper = wrapped("carried")
    step = nsm.as_step(wrapper, vocab_size=11, offline=model)
    assert step.examination.experiments[-1].status == "passed"
    assert step.examination.filled >= WINDOW


def test_a_window_kept_in_a_python_number_is_named() -> None:
    model, wrapper = wrapped("kept")
    for offline in (None, model):
        with pytest.raises(UnsupportedError, match=r"keeps its attributes \['cache.seen'\] from one call to the next"):
            nsm.as_step(wrapper, vocab_size=11, offline=offline)


def test_a_window_that_is_always_that_of_the_first_token_is_not_the_model() -> None:
    model, wrapper = wrapped("made anew")
    step = nsm.as_step(wrapper, vocab_size=11)
    assert "not compared with an offline run" in summary(step.examination.experiments)
    with pytest.raises(UnsupportedError, match=r"is not the model: from token 1 on, outputs departs from the offline"):
        nsm.as_step(wrapper, vocab_size=11, offline=model)


@pytest.mark.parametrize(
    ("offline", "message"),
    [
        (lambda ids: (ids,), r"offline gave a tuple for sequences \[1, 83\]; expected a tensor"),
        (lambda ids: torch.zeros(1, ids.shape[1]), r"step by step, and the offline run .* \[1, 83\]"),
    ],
)
def test_an_offline_run_that_gives_something_else_is_refused(offline: Any, message: str) -> None:
    _, wrapper = wrapped("made anew")
    with pytest.raises((ConfigError, UnsupportedError), match=message):
        nsm.as_step(wrapper, vocab_size=11, offline=offline)
