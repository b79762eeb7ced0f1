"""Low precision of recurrent operators: refused at once, for what it is, whichever file the model comes in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

import nsm
from nsm.errors import UnsupportedError
from nsm.export.sources.program import Program
from nsm.export.sources.torch_weights import largest_weights
from nsm.quantization import linear_ops as products
from tests.export.helpers import invoke, refused

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch says of its own deprecated parts


class Net(nn.Module):
    """x [B, 40] through a convolution, a table, and a recurrent layer that holds most of the weights."""

    def __init__(self, memory: nn.Module) -> None:
        super().__init__()
        self.table = nn.Embedding(500, 40)
        self.kernel = nn.Conv1d(40, 40, 16)
        self.memory = memory
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        given, h = self.memory(x[:, None] + self.table.weight[:1], h)
        return self.head(given[:, 0]), h


def gru() -> Net:
    return Net(nn.GRU(40, 64, batch_first=True)).eval()


@pytest.mark.parametrize(
    ("module", "largest"),
    [
        (gru(), {"GRU": 64 * 192, "": 64 * 4}),
        (Net(nn.LSTM(40, 64)), {"LSTM": 64 * 256, "": 64 * 4}),
        (Net(nn.LSTM(40, 64, proj_size=8)), {"": 40 * 256}),  # becomes linear ops
        (Net(nn.RNN(40, 64)), {"": 64 * 64}),
        (nn.GRUCell(40, 64), {"": 64 * 192}),
        (nn.Sequential(nn.Embedding(500, 40), nn.Conv1d(40, 40, 16)), {}),
    ],
)
def test_the_largest_weights_of_a_module(module: nn.Module, largest: dict[str, int]) -> None:
    assert largest_weights(module) == largest


def test_those_of_a_program_are_found_by_its_operators() -> None:
    program = torch.export.export(gru(), (torch.zeros(1, 40), torch.zeros(1, 1, 64)))
    found = largest_weights(Program(program, ["x", "h"]))
    assert found["GRU"] == 64 * 192
    assert found[""] <= 500 * 40


def test_those_of_a_graph_are_found_by_its_nodes() -> None:
    shapes = {"w": (1, 192, 40), "r": (1, 192, 64), "m": (64, 4), "e": (9, 9)}
    nodes = [
        helper.make_node("GRU", ["x", "w", "r", "", "", "h"], ["y", "z"], hidden_size=64),
        helper.make_node("MatMul", ["z", "m"], ["o"]),
        helper.make_node("Gather", ["e", "i"], ["g"]),
    ]
    tensors = [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in shapes.items()]
    graph = helper.make_graph(nodes, "graph", [], [], tensors)
    assert products.largest_weights(helper.make_model(graph)) == {"GRU": 64 * 192, "": 64 * 4}


def test_it_is_refused_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And before sequences to calibrate on are asked for, which would not help."""
    monkeypatch.setattr("nsm.export.pipeline.record", None)
    step = nsm.as_step(nn.LSTM(40, 128))
    with pytest.raises(
        UnsupportedError, match=r"all inside of LSTM operators, and int8 on openvino reaches linear ops"
    ):
        nsm.export_model(step, "openvino", tmp_path / "m.nsm", precision="int8")
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_is_added_to_a_bundle_is_refused_for_the_same_reason(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_samples": 1, "golden_steps": 2}
    samples = [np.random.default_rng(0).standard_normal((64, 40)).astype(np.float32)]
    bundle = nsm.export_model(nsm.as_step(nn.GRU(40, 128)), "onnx", tmp_path / "m.nsm", samples=samples, **options)
    told = "all inside of GRU operators, and int8-weights on openvino reaches linear ops only: they would stay fp32."
    refused(invoke("build", bundle.path, "-t", "openvino", "-p", "int8-weights"), 3, told)
