"""Small baselines with random weights, in double precision: differences are of the algorithm and not of rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from nsm.baselines.base import CausalLM
from tests.nsm.baselines.makers import MAKERS


@torch.no_grad()
def _stir(module: nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)
    module.double().eval()


@pytest.fixture(scope="session")
def stir() -> Callable[[nn.Module], None]:
    """Makes all weights of a module random, in double precision."""
    return _stir


@pytest.fixture(scope="session", params=MAKERS.values(), ids=list(MAKERS))
def model(request: pytest.FixtureRequest) -> CausalLM:
    kind, changes = request.param
    torch.manual_seed(0)
    model: CausalLM = kind(**{"vocab_size": 20, "d_model": 8, "num_layers": 2, "chunk_size": 4, **changes})
    _stir(model)
    return model
