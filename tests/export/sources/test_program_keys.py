"""A .pt2 whose forward takes and returns mappings: states are paired by key."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nsm
from tests.export.helpers import invoke, refused, succeeded

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own deprecated parts

WIDTH = 3


class Nested(nn.Module):
    """Takes {"h", "c"} and returns {"c", "h"}."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        cell = 0.9 * state["c"] + self.linear(x)
        hidden = 0.5 * state["h"] + torch.tanh(cell)
        return hidden + 0.1 * cell, {"c": cell, "h": hidden}


class Flat(Nested):
    """Takes h and c, and returns {"y", "c", "h"}."""

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        y, state = super().forward(x, {"h": h, "c": c})
        return {"y": y, **state}


def program(module: nn.Module, path: Path) -> Path:
    zeros = [torch.zeros(1, WIDTH) for _ in range(3)]
    given = (zeros[0], {"h": zeros[1], "c": zeros[2]}) if type(module) is Nested else tuple(zeros)
    torch.export.save(torch.export.export(module.eval(), given), path)
    return path


@pytest.mark.parametrize(("module", "prefix"), [(Nested(), "state_"), (Flat(), "")], ids=["nested", "flat"])
def test_states_are_named_by_their_keys(module: Nested, prefix: str, tmp_path: Path) -> None:
    path = program(module, tmp_path / "m.pt2")
    states = [f"--state={prefix}{key}={key}" for key in ("h", "c")]
    succeeded(invoke("export", path, "-t", "ort", "-o", tmp_path / "m.nsm", *states))
    x = torch.randn(1, 20, WIDTH, generator=torch.Generator().manual_seed(1))
    state, wanted = {"h": torch.zeros(1, WIDTH), "c": torch.zeros(1, WIDTH)}, []
    for token in x.unbind(1):
        with torch.no_grad():
            y, state = Nested.forward(module, token, state)
        wanted.append(y.numpy())
    with nsm.open(tmp_path / "m.nsm") as session:
        found = session.run(x.numpy())["outputs"]
    np.testing.assert_allclose(found, np.stack(wanted, 1), atol=1e-5)


@pytest.mark.parametrize("swapped", [("h=c", "c=h"), ("h=1", "c=2")], ids=["by key", "by place"])
def test_a_state_with_the_output_of_another_key_is_refused(swapped: tuple[str, str], tmp_path: Path) -> None:
    path = program(Flat(), tmp_path / "m.pt2")
    result = invoke("export", path, "-t", "ort", "-o", tmp_path / "m.nsm", *(f"--state={pair}" for pair in swapped))
    assert "Give --state h=h" in refused(result, 2)
    assert not (tmp_path / "m.nsm").exists()


def test_the_outputs_are_shown_by_their_keys(tmp_path: Path) -> None:
    path = program(Flat(), tmp_path / "m.pt2")
    assert "['y', 'c', 'h']" in refused(invoke("export", path, "-t", "ort", "-o", tmp_path / "m.nsm"), 2)
