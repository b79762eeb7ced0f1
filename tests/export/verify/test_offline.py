"""`--offline`: the step of a file is compared with a program of the model over whole sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import nsm
from nsm.bundle import Bundle
from nsm.errors import InputError, UnsupportedError
from nsm.export.options import ExportOptions
from nsm.export.pipeline import export, plan
from tests.export.helpers import invoke, succeeded, the_json

WIDTH = 4


class Whole(nn.Module):
    """A GRU over whole sequences [1, T, 4], from zeros; `gain` makes it another model."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head, self.gain = nn.GRUCell(WIDTH, 6), nn.Linear(6, 2), gain

    def forward(self, x: Tensor) -> Tensor:
        h, rows = torch.zeros(x.shape[0], 6), []
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            rows.append(self.head(h) * self.gain)
        return torch.stack(rows, 1)


class Step(Whole):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        h = self.cell(x, h)
        return self.head(h), h


class Cumulated(nn.Module):
    """Any number of tokens: the mean so far."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


class Sum(nn.Module):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = h + x
        return h * 1.0, h


@pytest.fixture(params=[".pt2", ".onnx"])
def suffix(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


def write(path: Path, module: nn.Module, arguments: tuple[Tensor, ...], dynamic: Any = None) -> Path:
    names = ["x", "past_h"][: len(arguments)]
    if path.suffix == ".pt2":
        torch.export.save(torch.export.export(module.eval(), arguments, dynamic_shapes=dynamic), path)
    else:
        outputs = ["y", "present_h"][: len(arguments)]
        torch.onnx.export(
            module.eval(), arguments, path, input_names=names, output_names=outputs, dynamo=True, dynamic_shapes=dynamic
        )
    return path


def options(suffix: str, **more: Any) -> ExportOptions:
    states = ["h=1"] if suffix == ".pt2" else ["past_h=present_h"]
    return ExportOptions(["onnxruntime"], states=states, num_samples=2, golden_steps=24, **more)


@pytest.mark.filterwarnings("ignore")
def test_a_step_that_is_the_model_is_said_to_be_compared(suffix: str, tmp_path: Path) -> None:
    step = write(tmp_path / f"step{suffix}", Step(), (torch.zeros(1, WIDTH), torch.zeros(1, 6)))
    whole = write(tmp_path / f"whole{suffix}", Whole(), (torch.zeros(1, 20, WIDTH),))
    bundle = export(step, options(suffix, offline=whole, output=tmp_path / "m.nsm"))
    last = Bundle(bundle.path).manifest.examination[-1]
    assert (last.name, last.status) == ("offline", "passed")
    assert last.detail == f"equal to whole{suffix} over 2 whole sequences"


@pytest.mark.filterwarnings("ignore")
def test_a_step_that_is_another_model_is_refused(suffix: str, tmp_path: Path) -> None:
    step = write(tmp_path / f"step{suffix}", Step(), (torch.zeros(1, WIDTH), torch.zeros(1, 6)))
    whole = write(tmp_path / f"whole{suffix}", Whole(1.1), (torch.zeros(1, 20, WIDTH),))
    with pytest.raises(UnsupportedError, match=r"is not the model: from token 0 on, \w+ departs from the offline run"):
        plan(step, options(suffix, offline=whole))
    long = write(tmp_path / f"long{suffix}", Whole(), (torch.zeros(1, 30, WIDTH),))
    with pytest.raises(InputError, match="takes sequences of 30 tokens; given 24"):
        plan(step, options(suffix, offline=long))
    with pytest.raises(InputError, match=r"has the inputs .*; expected one, a whole sequence"):
        plan(step, options(suffix, offline=step))
    wide = write(tmp_path / f"wide{suffix}", nn.Linear(5, 2), (torch.zeros(1, 20, 5),))
    with pytest.raises(InputError, match=r"does not take a sequence float32\[1, 20, 4\]"):
        plan(step, options(suffix, offline=wide))


@pytest.mark.filterwarnings("ignore")
def test_a_program_of_any_length_is_compared_over_the_whole_sequence(suffix: str, tmp_path: Path) -> None:
    step = write(tmp_path / f"step{suffix}", Sum(), (torch.zeros(1, WIDTH), torch.zeros(1, WIDTH)))
    whole = write(tmp_path / f"whole{suffix}", Cumulated(), (torch.zeros(1, 20, WIDTH),), ({1: Dim("T", min=2)},))
    assert plan(step, options(suffix, offline=whole)).examination[-1].status == "passed"


def test_it_belongs_to_foreign_files(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(
        InputError, match=r"--offline applies to foreign \.pt2 and \.onnx files only; SimpleNSM is an nsm model"
    ):
        plan(checkpoint, ExportOptions(["onnxruntime"], offline=tmp_path / "w.onnx"))


@pytest.mark.filterwarnings("ignore")
def test_without_it_the_report_says_so_and_inspect_lists_the_experiments(tmp_path: Path) -> None:
    step = write(tmp_path / "step.onnx", Step(), (torch.zeros(1, WIDTH), torch.zeros(1, 6)))
    with pytest.raises(InputError, match=r"expected a \.pt2 or \.onnx of the model over whole sequences"):
        plan(step, options(".onnx", offline=tmp_path / "w.txt"))
    made = invoke("export", step, "-t", "ort", "-o", tmp_path / "m.nsm", "--golden-steps", "8")
    succeeded(made)
    assert "not compared with an offline run" in made.stderr
    shown = invoke("inspect", tmp_path / "m.nsm")
    succeeded(shown)
    assert "Examination" in shown.output
    assert "every state is read" in shown.output
    listed = the_json(invoke("inspect", tmp_path / "m.nsm", "--json"))["examination"]
    assert listed[0] == {"name": "finite", "status": "passed", "detail": "outputs and states are finite"}


class Window(nn.Module):
    """The mean of the last 100 inputs."""

    def forward(self, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        cache = torch.cat([cache[:, 1:], x[:, None]], 1)
        return cache.mean(1), cache


def test_parity_goes_on_until_no_state_is_filling(tmp_path: Path) -> None:
    step = nsm.as_step(Window(), [torch.zeros(1, 100, WIDTH)], token_shape=(WIDTH,))
    assert step.examination.filled == 100
    bundle = nsm.export_model(step, "onnxruntime", tmp_path / "m.nsm", num_samples=1)
    assert bundle.trace().steps == 116
    np.testing.assert_array_equal(bundle.trace().inputs["tokens"][0, 64:67, 0] == 0, False)
    assert nsm.export_model(step, "onnxruntime", tmp_path / "n.nsm", golden_steps=5).trace().steps == 5
