"""Programs of torch.export: what they may take and give. That nothing in them is executed: test_program_archive.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nsm
from nsm.errors import ConfigError, InputError, NsmError, UnsupportedError
from nsm.export.sources.program import load_program
from nsm.export.sources.state_options import parse_states
from tests.export.helpers import invoke, refused, succeeded
from tests.nsm.adapters.models import Logarithm

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
    with pytest.raises(InputError, match="A state is a tensor; --state names the output None"):
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


# -- sizes that were left dynamic --------------------------------------------------------------------------------------


class Running(torch.nn.Module):
    """The sum over all tokens so far; where it is frozen, without the first of the call."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.frozen = frozen

    def forward(self, x: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        sums = torch.cumsum(x, 1) + total.unsqueeze(1)
        return sums - x[:, :1] if self.frozen else sums, sums[:, -1]


BATCH, TIME, WIDTH = (torch.export.Dim(name, min=1) for name in ("batch", "time", "width"))
TIMED = ({0: BATCH, 1: TIME}, {0: BATCH})


def test_a_program_may_take_any_number_of_tokens(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt2", Running(), (torch.zeros(2, 5, 3), torch.zeros(2, 3)), dynamic_shapes=TIMED)
    options = (
        "--state",
        "total=1",
        "--batch",
        "2",
        "--tokens-per-call",
        "4",
        "--golden-steps",
        "5",
        "-o",
        tmp_path / "m.nsm",
    )
    succeeded(invoke("export", path, "-t", "ort", *options))
    x = np.random.default_rng(0).standard_normal((2, 11, 3)).astype(np.float32)
    with nsm.open(tmp_path / "m.nsm") as session:
        assert [entry.inputs[0].shape for entry in session.spec.entries] == [(2, 4, 3), (2, 1, 3)]
        parts = [session.feed(part)["outputs"] for part in np.split(x, [4, 5, 6], 1)]
        np.testing.assert_allclose(np.concatenate(parts, 1), x.cumsum(1), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(session.read_state()["total"], x.sum(1), rtol=1e-5, atol=1e-5)


def test_a_length_that_is_built_into_a_program_is_found_out(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt2", Running(True), (torch.zeros(2, 5, 3), torch.zeros(2, 3)), dynamic_shapes=TIMED)
    with pytest.raises(
        UnsupportedError, match=r"answers 32 tokens in one call differently than in calls of .*built into"
    ):
        load_program(path, parse_states(["total=1"]))


class Mean(torch.nn.Module):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return x + h.mean(), 0.5 * h + x.mean()


class Both(torch.nn.Module):
    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return x + h + c, 0.5 * h + x


OPEN: dict[str, tuple[torch.nn.Module, list[list[int]], Any, list[str], type[NsmError], str]] = {
    "a state that grows": (
        Mean(),
        [[1, 3], [1, 4]],
        (None, {1: WIDTH}),
        ["h=1"],
        UnsupportedError,
        r"The state h has the shape \['1', 's\d+'\]: besides the streams, axis 1 is dynamic.*a window of fixed length",
    ),
    "a token of any size": (
        Mean(),
        [[2, 5, 7], [2, 4]],
        ({0: BATCH, 1: TIME, 2: WIDTH}, {0: BATCH}),
        ["h=1"],
        UnsupportedError,
        r"The input x has the shape \['s\d+', 's\d+', 's\d+'\], with dynamic sizes besides .*with these fixed",
    ),
    "three streams": (
        Mean(),
        [[3, 4], [3, 4]],
        None,
        ["h=1"],
        UnsupportedError,
        "exported for 3 streams at a time; export it for one, or for any",
    ),
    "two states on one output": (
        Both(),
        [[1, 3]] * 3,
        None,
        ["h=1", "c=add_2"],
        InputError,
        "Two states are to be the output add_2; each has one of its own",
    ),
}


@pytest.mark.parametrize("kind", OPEN)
def test_a_program_that_is_no_step_is_refused(kind: str, tmp_path: Path) -> None:
    module, sizes, shapes, states, error, message = OPEN[kind]
    path = saved(tmp_path / "m.pt2", module, tuple(map(torch.zeros, sizes)), dynamic_shapes=shapes)
    with pytest.raises(error, match=message):
        load_program(path, parse_states(states))


class Deciding(torch.nn.Module):
    """One decision for all lanes: loud frames are added to the state, others subtracted."""

    def forward(self, x: Tensor, h: Tensor) -> Any:
        h = torch.cond(x.mean() > 1.0, lambda x, h: x + 0.5 * h, lambda x, h: x - 0.5 * h, (x, h))
        return torch.tanh(h), h


def test_a_program_that_decides_by_its_data_takes_one_stream(tmp_path: Path) -> None:
    lanes = torch.export.Dim("lanes", min=2, max=64)
    shapes = {"x": {0: lanes}, "h": {0: lanes}}
    path = saved(tmp_path / "m.pt2", Deciding(), (X.repeat(2, 1), H.repeat(2, 1)), dynamic_shapes=shapes)
    frames = 2 * np.random.default_rng(0).standard_normal((3, 20, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", frames)
    options = (
        "-t",
        "ort",
        "--state",
        "h=1",
        "--data",
        tmp_path / "x.npy",
        "--golden-steps",
        "20",
        "-o",
        tmp_path / "m",
    )
    succeeded(invoke("export", path, *options))
    with nsm.open(tmp_path / "m") as session:
        given, h = session.run(frames[:1])["outputs"], H
        for place in range(20):
            wanted, h = Deciding()(torch.from_numpy(frames[:1, place]), h)
            np.testing.assert_allclose(given[:, place], wanted, rtol=1e-5, atol=1e-6)
    message = refused(invoke("export", path, *options, "--batch", "2", "--force"), 3, "Asked for are 2 lanes")
    assert "decides by values of the stream" in message
