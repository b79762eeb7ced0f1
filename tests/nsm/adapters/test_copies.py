"""Modules that hold what `copy.deepcopy` refuses, as training leaves it in attributes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nsm
from nsm.errors import ConfigError
from nsm.models.base import duplicate

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's old weight_norm is deprecated


class Policy(nn.Module):
    """x [B, 4] and h [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.kept: Any = None

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.mix(x) + h, h * 0.5 + 0.1


class Scaled(Policy):
    """It uses what it keeps."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.linear(self.mix(x), self.kept["matrix"][0]) + h, h * 0.5 + 0.1


def _last() -> Policy:
    module = Policy()
    module.kept = module.mix(torch.randn(1, 4))
    return module


def _distribution() -> Policy:
    module = Policy()
    module.kept = torch.distributions.Normal(module.mix(torch.randn(1, 4)), torch.ones(4))
    return module


def _used() -> Policy:
    module = Scaled()
    module.kept = {"matrix": [module.mix.weight * 2]}
    return module


def _normalized() -> Policy:
    module = Policy()
    module.mix = nn.utils.weight_norm(module.mix)
    return module


MODULES: dict[str, Callable[[], Policy]] = {
    "the last result": _last,
    "a distribution": _distribution,
    "a matrix that it uses": _used,
    "weights of weight_norm": _normalized,
}


@pytest.mark.parametrize("name", MODULES)
def test_results_of_other_tensors_are_copied(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = MODULES[name]().eval()
    tokens = torch.randn(1, 20, 4)
    h, wanted = torch.zeros(1, 4), []
    with torch.no_grad():
        for index in range(20):
            y, h = module(tokens[:, index], h)
            wanted.append(y)
    step = nsm.as_step(module, [torch.zeros(1, 4)], token_shape=(4,))
    nsm.export_model(step, "onnxruntime", tmp_path / "m.nsm", num_samples=1, golden_steps=4)
    with nsm.open(tmp_path / "m.nsm") as session:
        given = session.run(tokens.numpy())["outputs"]
    np.testing.assert_allclose(given, torch.stack(wanted, 1).numpy(), rtol=1e-5, atol=1e-6)


def test_a_copy_has_tensors_of_its_own() -> None:
    module = _last()
    module.kept = [module.kept, {"again": module.kept}]
    step = nsm.as_step(module, [torch.zeros(1, 4)], token_shape=(4,))
    copied: Any = duplicate(step).module
    first, second = copied.kept[0], copied.kept[1]["again"]
    assert first is second  # what was one tensor is one
    assert first is not module.kept[0]
    assert torch.equal(first, module.kept[0])
    assert not first.requires_grad
    assert copied.mix.weight is not module.mix.weight
    assert isinstance(copied.mix.weight, nn.Parameter)


def test_what_has_no_copy_is_named(tmp_path: Path) -> None:
    module = Policy()
    module.kept = threading.Lock()
    step = nsm.as_step(module, [torch.zeros(1, 4)], token_shape=(4,))
    with pytest.raises(ConfigError, match=r"Policy cannot be copied.*TypeError: cannot pickle '_thread\.lock' object"):
        nsm.export_model(step, "onnx", tmp_path / "m.nsm")
    assert list(tmp_path.iterdir()) == []
