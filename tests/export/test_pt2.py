"""Programs of torch.export: what they may take and give. That nothing in them is executed: test_foreign.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nsm
from nsm.errors import ConfigError, InputError, NsmError, UnsupportedError
from nsm.export.state_options import parse_states
from nsm.export.torch_program import load_program
from tests.adapters.models import Logarithm
from tests.export.helpers import invoke, succeeded

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch says of its own deprecated parts

X, H = torch.zeros(1, 3), torch.zeros(1, 3)


class Scaled(torch.nn.Module):
    """Takes what is no tensor, as modules do: an option that is None, a number, a word."""

    def forward(self, x: Tensor, h: Tensor, mask: Tensor | None = None, scale: float = 1.0, mode: str = "add") -> Any:
        h = 0.5 * h + (scale * x if mode == "add" else x)
        return h * 2 if mask is None else h * mask, h


class Plain(torch.nn.Module):
    def forward(self, x: Tensor, h: Tensor) -> Any:
        return (x + h).float(), (0.5 * h + x).to(h.dtype)


class Weightless(torch.nn.Module):
    """Gives a None among its outputs, as attention does that is asked for no weights."""

    def forward(self, x: Tensor, h: Tensor) -> Any:
        h = 0.5 * h + x
        return h * 2, None, h


class Counted(torch.nn.Module):
    def forward(self, x: Tensor, count: int, h: Tensor) -> Any:
        return x * count, h + x


def saved(path: Path, module: torch.nn.Module, arguments: tuple[Any, ...], **options: Any) -> Path:
    torch.export.save(torch.export.export(module, arguments, **options), path)
    return path


@pytest.mark.parametrize(
    ("arguments", "named"), [((X, H, None, 0.25), {}), ((X, H), {"scale": 0.25, "mode": "add", "mask": None})]
)
def test_arguments_that_are_no_tensors_are_those_it_was_exported_with(
    arguments: tuple[Any, ...], named: dict[str, Any], tmp_path: Path
) -> None:
    path = saved(tmp_path / "m.pt2", Scaled(), arguments, kwargs=named)
    output = tmp_path / "m.nsm"
    succeeded(invoke("export", path, "-t", "ort", "--state", "h=1", "--golden-steps", "4", "-o", output))
    x = np.random.default_rng(0).standard_normal((1, 5, 3)).astype(np.float32)
    state = H
    with nsm.open(output) as session:
        given = session.feed(x)["outputs"]
    for step in range(5):
        wanted, state = Scaled()(torch.from_numpy(x[:, step]), state, scale=0.25)
        np.testing.assert_allclose(given[:, step], wanted, rtol=1e-5, atol=1e-6)


def test_what_takes_a_logarithm_is_examined_on_positive_numbers(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt2", Logarithm(), (X + 1, H))
    checkpoint, _ = load_program(path, parse_states(["h=1"]))
    assert checkpoint.model.token_spec.shape == (3,)
    frames = np.random.default_rng(0).uniform(0.1, 9, (3, 24, 3)).astype(np.float32)
    np.save(tmp_path / "frames.npy", frames)
    options: list[str | Path] = [
        "-t",
        "ort",
        "--state",
        "h=1",
        "--data",
        tmp_path / "frames.npy",
        "-o",
        tmp_path / "m.nsm",
    ]
    succeeded(invoke("export", path, *options, "--golden-steps", "8"))


def test_an_output_that_is_no_tensor_is_no_answer(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt2", Weightless(), (X, H))
    model = load_program(path, parse_states(["h=2"]))[0].model
    torch.testing.assert_close(model(torch.ones(1, 2, 3)), torch.tensor([2.0, 3.0]).reshape(1, 2, 1).expand(1, 2, 3))
    with pytest.raises(InputError, match=r"\[None\] are to be states; a state is a tensor"):
        load_program(path, parse_states(["h=1"]))


@pytest.mark.parametrize(
    ("module", "arguments", "options", "error", "message"),
    [
        (Plain(), (X, H.bfloat16()), {}, ConfigError, r"The state h is torch.bfloat16; .*with .float\(\)"),
        (Plain(), (X, H.double()), {}, ConfigError, "its state h is torch.float64"),
        (Plain(), (X.bfloat16(), H), {}, UnsupportedError, r"The input x is torch.bfloat16; .*with .float\(\)"),
        (
            Counted(),
            (X, 3, H),
            {"dynamic_shapes": (None, torch.export.Dim.DYNAMIC, None)},
            UnsupportedError,
            "takes the number count, which may be another",
        ),
    ],
)
def test_what_no_step_takes_is_refused(
    module: torch.nn.Module,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    error: type[NsmError],
    message: str,
    tmp_path: Path,
) -> None:
    path = saved(tmp_path / "m.pt2", module, arguments, **options)
    with pytest.raises(error, match=message):
        load_program(path, parse_states(["h=1"]))
