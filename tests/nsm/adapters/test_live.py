"""What is exported is the module as it is at the export; as_step leaves it as it came, whatever it holds."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nsm
from nsm import Carried
from nsm.errors import UnsupportedError
from tests.nsm.adapters.models import Decay, InPlace, Learned

H = torch.zeros(1, 3)


class Trained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.drop, self.head = nn.GRUCell(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)
        self.start = nn.Parameter(torch.randn(2, 4))
        self.register_buffer("other", torch.randn(1, 4))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.cell(x, h)
        return self.head(self.drop(h)), h


STARTS: dict[str, Callable[[Any], Tensor]] = {
    "a view of a parameter": lambda m: m.start[1:],
    "a buffer": lambda m: m.other,
    "a copy": lambda m: torch.tanh(m.start[1:]),
}


@pytest.mark.parametrize("kind", STARTS)
def test_weights_and_initial_values_that_are_learned_later_are_exported(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Trained()
    step = nsm.as_step(module, [Carried("h", STARTS[kind](module))], token_shape=(3,))
    before = STARTS[kind](module).detach().clone()
    with torch.no_grad():
        for value in (*module.parameters(), *module.buffers()):
            value.add_(torch.randn_like(value))
    module.start = nn.Parameter(module.start.detach() + 1)
    x = torch.randn(1, 20, 3)
    h = before if kind == "a copy" else STARTS[kind](module)
    bundle = nsm.export_model(step, "onnxruntime", tmp_path / "m.nsm", golden_steps=8)
    wanted = []
    reference = copy.deepcopy(module).eval()
    with torch.no_grad():
        for t in range(20):
            y, h = reference(x[:, t], h)
            wanted.append(y)
    with nsm.open(bundle) as session:
        np.testing.assert_allclose(session.run(x.numpy())["outputs"], torch.stack(wanted, 1), atol=1e-5)


def test_the_initial_state_of_a_protocol_is_asked_for_anew() -> None:
    module = Decay()
    step = nsm.as_step(module, token_shape=(3,))
    first = nsm.reference(step).fingerprint
    with torch.no_grad():
        module.start.add_(1)
    torch.testing.assert_close(step.initial_state(2)["mean"][1], torch.linspace(0, 2, 3))
    assert step.spec().states[0].init == "learned"
    assert nsm.reference(step).fingerprint != first
    assert copy.deepcopy(step).double().initial_state(1)["mean"].dtype == torch.float64


@pytest.mark.parametrize("training", [True, False])
def test_a_module_leaves_as_step_and_an_export_in_the_modes_in_which_it_came(training: bool, tmp_path: Path) -> None:
    module = Trained().train(training)
    module.head.train(not training)
    modes = [part.training for part in module.modules()]
    step = nsm.as_step(module, [Carried("h", module.start[:1])], token_shape=(3,))
    assert [part.training for part in module.modules()] == modes
    bundle = nsm.export_model(step, "onnxruntime", tmp_path / "m.nsm", golden_steps=4)
    assert [part.training for part in module.modules()] == modes
    x = np.ones((1, 5, 3), np.float32)
    with nsm.open(bundle) as session, nsm.reference(step) as reference:
        np.testing.assert_allclose(session.run(x)["outputs"], reference.run(x)["outputs"], atol=1e-6)


def test_a_module_that_fails_is_left_in_its_mode_too() -> None:
    module = Learned().train()
    with pytest.raises(nsm.errors.ConfigError, match="fails on tokens"):
        nsm.as_step(module, [Carried("h", torch.zeros(1, 5))], token_shape=(3,))
    assert all(part.training for part in module.modules())


def test_tensors_in_attributes_that_are_results_of_others_are_no_hindrance(tmp_path: Path) -> None:
    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
            self.last: Any = None

        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            return self.mix(x) + h, h * 0.5 + x

    module = Policy()
    module.last = {"of": [module.mix(torch.randn(1, 3))], "pair": (module.mix(torch.randn(1, 3)), 1)}
    step = nsm.as_step(module, [H], token_shape=(3,))
    bundle = nsm.export_model(step, "onnxruntime", tmp_path / "m.nsm", golden_steps=4)
    assert bundle.manifest.artifacts[0].parity.status == "passed"
    assert module.last["of"][0].grad_fn is not None


def test_what_python_does_not_copy_is_named() -> None:
    class Locked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            return x + h, h * 0.5 + x

    step = nsm.as_step(Locked(), [H], token_shape=(3,))
    with pytest.raises(UnsupportedError, match=r"Locked cannot be copied.*cannot pickle .*lock.*a lock, a file"):
        copy.deepcopy(step)


def test_a_module_that_writes_into_its_arguments_is_handed_copies(tmp_path: Path) -> None:
    step = nsm.as_step(InPlace(), [H], token_shape=(3,))
    assert step.copies
    assert any(
        "writes into its arguments ['state_0']; it is given copies" in item.text for item in step.examination.messages
    )
    state = step.initial_state(2)
    step.step(torch.ones(2, 1, 3), state)
    assert not state["state_0"].any()
    bundle = nsm.export_model(step, ["onnxruntime"], tmp_path / "m.nsm", batch=2, golden_steps=8)
    x, h, wanted = np.random.default_rng(0).standard_normal((2, 30, 3)).astype(np.float32), np.zeros((2, 3)), []
    for t in range(30):
        h = 0.5 * h + x[:, t]
        wanted.append(h)
    with nsm.open(bundle) as session:
        np.testing.assert_allclose(session.run(x)["outputs"], np.stack(wanted, 1), atol=1e-5)
