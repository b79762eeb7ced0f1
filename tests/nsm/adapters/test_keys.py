"""States are matched by the keys of the result, and parameter names are compared with the declaration."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nsm
from nsm import Carried
from nsm.errors import ConfigError

H = torch.zeros(1, 4)


class Pair(NamedTuple):
    h: Any
    c: Any


class Swapped(NamedTuple):
    c: Any
    y: Any
    h: Any


class Cell(nn.Module):
    """Takes h and c as `take` says, and returns them as `give` says."""

    def __init__(self, take: Callable[[Any], tuple[Tensor, Tensor]], give: Callable[..., Any]) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(3, 4), nn.Linear(4, 2)
        self.take, self.give = take, give

    def forward(self, x: Tensor, state: Any) -> Any:
        h, c = self.cell(x, self.take(state))
        return self.give(self.head(h), h, c)


def _mapping(state: Any) -> tuple[Tensor, Tensor]:
    return state["h"], state["c"]


def _nested(state: Any) -> tuple[Tensor, Tensor]:
    return state["a"]["s"], state["b"]["s"]


def _named(state: Any) -> tuple[Tensor, Tensor]:
    return state.h, state.c


def _layers(state: Any) -> tuple[Tensor, Tensor]:
    return state[0]["s"], state[1]["s"]


H1, C1 = Carried("h", H), Carried("c", H)
FORMS: dict[str, tuple[Any, Any, Any]] = {
    "same order": ({"h": H1, "c": C1}, _mapping, lambda y, h, c: (y, {"h": h, "c": c})),
    "other order": ({"h": H1, "c": C1}, _mapping, lambda y, h, c: (y, {"c": c, "h": h})),
    "ordered": (OrderedDict(c=C1, h=H1), _mapping, lambda y, h, c: (y, OrderedDict(h=h, c=c))),
    "all in one": ({"h": H1, "c": C1}, _mapping, lambda y, h, c: {"c": c, "y": y, "h": h}),
    "other names": (
        {"h": Carried("hidden", H), "c": Carried("cell", H)},
        _mapping,
        lambda y, h, c: (y, {"c": c, "h": h}),
    ),
    "by name": ({"h": Carried("hidden", H), "c": C1}, _mapping, lambda y, h, c: {"c": c, "hidden": h, "y": y}),
    "nested": (
        {"a": {"s": H1}, "b": {"s": C1}},
        _nested,
        lambda y, h, c: {"state": {"b": {"s": c}, "a": {"s": h}}, "y": y},
    ),
    "named tuple": (Pair(H1, C1), _named, lambda y, h, c: (y, Pair(h, c))),
    "another named tuple": (Pair(H1, C1), _named, lambda y, h, c: Swapped(c, y, h)),
    "a tuple": ((H1, C1), tuple, lambda y, h, c: (y, (h, c))),
    "names of a flat list": ((H1, C1), tuple, lambda y, h, c: {"c": c, "h": h, "y": y}),
    "layers": ([{"s": H1}, {"s": C1}], _layers, lambda y, h, c: (y, [{"s": h}, {"s": c}])),
    "outputs in a mapping": ((H1, C1), tuple, lambda y, h, c: ({"y": y}, (h, c))),
}


@pytest.mark.parametrize("form", FORMS)
def test_states_are_found_by_their_keys(form: str) -> None:
    declared, take, give = FORMS[form]
    torch.manual_seed(0)
    module = Cell(take, give)
    step = nsm.as_step(module, [declared], token_shape=(3,))
    x, h, c, wanted = torch.randn(1, 20, 3), H, H, []
    with torch.no_grad():
        for t in range(20):
            h, c = module.cell(x[:, t], (h, c))
            wanted.append(module.head(h))
        given = step(x)
    torch.testing.assert_close(given, torch.stack(wanted, 1))


def test_outputs_are_found_by_their_names() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, h: Tensor) -> dict[str, Tensor]:
            h = 0.5 * h + x
            return {"aux": h.sum(-1, keepdim=True), "h": h, "main": h * 2}

    step = nsm.as_step(Two(), [Carried("h", H)], token_shape=(4,), outputs=["main", "aux"])
    assert step.examination.shapes == {"main": (4,), "aux": (1,)}

    class Protocol(nn.Module):
        def initial_state(self, batch: int) -> dict[str, Tensor]:
            return {"h": torch.zeros(batch, 4)}

        def step(self, x: Tensor, state: dict[str, Tensor]) -> Any:
            h = 0.5 * state["h"] + x
            return {"aux": h.sum(-1, keepdim=True), "main": h * 2}, {"h": h}

    assert nsm.as_step(Protocol(), token_shape=(4,), outputs=["main", "aux"]).examination.shapes["aux"] == (1,)


@pytest.mark.parametrize(
    ("declared", "give", "message"),
    [
        (
            {"h": H1, "c": C1},
            lambda y, h, c: {"y": y, "c": c, "hn": h},
            r"keys \['c', 'hn', 'y'\], and none .* state h",
        ),
        ({"h": H1, "c": C1}, lambda y, h, c: (y, {"h": h, "c": c}, {"h": h}), "returned 2 tensors under the key h"),
        ({"h": H1, "c": C1}, lambda y, h, c: (y, {"h": h}), "took 2 states and gave 2 tensors"),
        (
            {"h": H1, "c": C1},
            lambda y, h, c: (y, {"h": h, "c": None}),
            "The state c is a NoneType; expected a tensor",
        ),
        ({"h": H1, "c": C1}, lambda y, h, c: ("y", {"h": h, "c": c}), "The output outputs is a str; expected a tensor"),
    ],
)
def test_keys_that_do_not_fit_are_refused(declared: Any, give: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        nsm.as_step(Cell(_mapping, give), [declared], token_shape=(3,))


def test_parameters_of_forward_contradict_a_declaration_in_another_order() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x + h + c, 0.5 * h + x, 0.25 * c + x

    with pytest.raises(ConfigError, match=r"declared in the order c, h; Two\.forward takes h, c behind its input"):
        nsm.as_step(Two(), [Carried("c", H), Carried("h", H)], token_shape=(4,))
    for states in ([Carried("h", H), Carried("c", H)], [H, H], [Carried("a", H), Carried("b", H)]):
        assert nsm.as_step(Two(), states, token_shape=(4,)).lanes is None
    x = np.zeros((1, 2, 4), np.float32)
    assert nsm.reference(nsm.as_step(Two(), [H, H], token_shape=(4,))).run(x)["outputs"].shape == (1, 2, 4)
