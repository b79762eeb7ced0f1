"""Small model files, .onnx and .pt2, that each show one publicly reported fault; `FILES` lists them.

Every writer function takes the path. The graphs have the input x [B, width] or [1, width], the output y, and the
states of `FileCase.states`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from reported_models import Right
from torch import Tensor, nn

WIDTH = 6


@dataclass(frozen=True)
class FileCase:
    """A file and the reports that it represents.

    Args:
        name: short name for the table.
        reports: `owner/repository#number` each; empty if the case was found in this project.
        write: function that writes the file.
        right: the correct verdicts; see `reported_models.Case`.
        suffix: ".onnx" or ".pt2".
        states: for an .onnx, the outputs that the loop feeds back, by input.
        options: further arguments of `nsm-export`.
        shapes: shapes of the states for one lane.
    """

    name: str
    reports: tuple[str, ...]
    write: Callable[[Path], None]
    right: tuple[Right, ...]
    suffix: str = ".onnx"
    states: Mapping[str, str] = field(default_factory=lambda: {"past_h": "present_h"})
    options: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"past_h": (1, WIDTH)})


def _weight(name: str, *shape: int) -> TensorProto:
    random = np.random.default_rng(sum(map(ord, name)))
    return numpy_helper.from_array((random.standard_normal(shape) / 3).astype(np.float32), name)


def _save(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: list[TensorProto],
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    opset: int = 20,
) -> None:
    def port(name: str, given: Any) -> onnx.ValueInfoProto:
        dtype, shape = given if isinstance(given, tuple) else (TensorProto.FLOAT, given)
        return helper.make_tensor_value_info(name, dtype, shape)

    graph = helper.make_graph(
        nodes,
        "reported",
        [port(name, given) for name, given in inputs.items()],
        [port(name, given) for name, given in outputs.items()],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def _tanh(h: str = "past_h") -> list[onnx.NodeProto]:
    """Compute present_h = tanh(x W + h/2)."""
    return [
        helper.make_node("MatMul", ["x", "w"], ["xw"]),
        helper.make_node("Mul", [h, "half"], ["kept"]),
        helper.make_node("Add", ["xw", "kept"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["present_h"]),
    ]


def _weights() -> list[TensorProto]:
    return [_weight("w", WIDTH, WIDTH), numpy_helper.from_array(np.array(0.5, np.float32), "half")]


_ONE: dict[str, Any] = {"x": [1, WIDTH], "past_h": [1, WIDTH]}
_ANY: dict[str, Any] = {"x": ["B", WIDTH], "past_h": ["B", WIDTH]}


def canceller(path: Path) -> None:
    """Maps mic_in and ref to mic_out, and state_in to state_out; mic_in is an input, although named like a state."""
    nodes = [
        helper.make_node("Sub", ["mic_in", "ref"], ["x"]),
        *_tanh("state_in")[:3],
        helper.make_node("Tanh", ["sum"], ["state_out"]),
        helper.make_node("Mul", ["mic_in", "state_out"], ["mic_out"]),
    ]
    shape = [1, WIDTH]
    _save(
        path,
        nodes,
        _weights(),
        {"mic_in": shape, "ref": shape, "state_in": shape},
        {"mic_out": shape, "state_out": shape},
    )


def branch(path: Path) -> None:
    """One stream, with an If on its data."""
    then = helper.make_graph(
        [helper.make_node("Neg", ["present_h"], ["negative"])],
        "then",
        [],
        [helper.make_tensor_value_info("negative", TensorProto.FLOAT, [1, WIDTH])],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["present_h"], ["same"])],
        "other",
        [],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, [1, WIDTH])],
    )
    nodes = [
        *_tanh(),
        helper.make_node("ReduceSum", ["present_h"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "nothing"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], then_branch=then, else_branch=other),
    ]
    nothing = numpy_helper.from_array(np.array(0.0, np.float32), "nothing")
    _save(path, nodes, [*_weights(), nothing], _ONE, {"y": [1, WIDTH], "present_h": [1, WIDTH]})


def scalar(path: Path) -> None:
    """A counter of shape []."""
    nodes = [
        *_tanh(),
        helper.make_node("Mod", ["past_n", "ten"], ["place"]),
        helper.make_node("Cast", ["place"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["present_h", "number"], ["y"]),
        helper.make_node("Add", ["past_n", "one"], ["present_n"]),
    ]
    numbers = [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in (("one", 1), ("ten", 10))]
    counter: tuple[int, list[int]] = (TensorProto.INT64, [])
    _save(
        path,
        nodes,
        [*_weights(), *numbers],
        {**_ONE, "past_n": counter},
        {"y": [1, WIDTH], "present_h": [1, WIDTH], "present_n": counter},
    )


def gru_from_zeros(path: Path) -> None:
    """A state, and a GRU over the 6 values of a token that starts from zero in every call."""
    nodes = [
        *_tanh(),
        helper.make_node("Reshape", ["present_h", "column"], ["sequence"]),
        helper.make_node("GRU", ["sequence", "gw", "gr"], ["", "last"], hidden_size=4, linear_before_reset=1),
        helper.make_node("Reshape", ["last", "row"], ["y"]),
    ]
    shapes = [
        numpy_helper.from_array(np.array(value, np.int64), name)
        for name, value in (("column", [WIDTH, 1, 1]), ("row", [1, 4]))
    ]
    weights = [*_weights(), _weight("gw", 1, 12, 1), _weight("gr", 1, 12, 4), *shapes]
    _save(path, nodes, weights, _ONE, {"y": [1, 4], "present_h": [1, WIDTH]})


def layout(path: Path) -> None:
    """A GRU in the layout [batch, time, width], which few runtimes support."""
    nodes = [
        helper.make_node("Unsqueeze", ["x", "axis"], ["sequence"]),
        helper.make_node("Unsqueeze", ["past_h", "axis"], ["start"]),
        helper.make_node(
            "GRU",
            ["sequence", "gw", "gr", "", "", "start"],
            ["", "last"],
            hidden_size=WIDTH,
            layout=1,
            linear_before_reset=1,
        ),
        helper.make_node("Squeeze", ["last", "axis"], ["present_h"]),
        helper.make_node("Neg", ["present_h"], ["y"]),
    ]
    axis = numpy_helper.from_array(np.array([1], np.int64), "axis")
    weights = [_weight("gw", 1, 3 * WIDTH, WIDTH), _weight("gr", 1, 3 * WIDTH, WIDTH), axis]
    _save(path, nodes, weights, _ONE, {"y": [1, WIDTH], "present_h": [1, WIDTH]})


def batch_norm(path: Path) -> None:
    """BatchNormalization in training mode."""
    nodes = [
        *_tanh(),
        helper.make_node(
            "BatchNormalization",
            ["present_h", "scale", "bias", "mean", "variance"],
            ["y", "m", "v"],
            training_mode=1,
        ),
    ]
    vectors = [
        numpy_helper.from_array(np.full(WIDTH, value, np.float32), name)
        for name, value in (("scale", 1.0), ("bias", 0.0), ("mean", 0.0), ("variance", 1.0))
    ]
    _save(path, nodes, [*_weights(), *vectors], _ANY, {"y": ["B", WIDTH], "present_h": ["B", WIDTH]})


def dropout(path: Path) -> None:
    """Dropout in training mode."""
    nodes = [*_tanh(), helper.make_node("Dropout", ["present_h", "ratio", "training"], ["y"])]
    more = [
        numpy_helper.from_array(np.array(0.2, np.float32), "ratio"),
        numpy_helper.from_array(np.array(True), "training"),
    ]
    _save(path, nodes, [*_weights(), *more], _ANY, {"y": ["B", WIDTH], "present_h": ["B", WIDTH]})


def mixed_lanes(path: Path) -> None:
    """The mean of the states over the lanes."""
    nodes = [
        helper.make_node("ReduceMean", ["past_h", "axis"], ["mean"], keepdims=1),
        *_tanh("mean"),
        helper.make_node("Neg", ["present_h"], ["y"]),
    ]
    axis = numpy_helper.from_array(np.array([0], np.int64), "axis")
    _save(path, nodes, [*_weights(), axis], _ANY, {"y": ["B", WIDTH], "present_h": ["B", WIDTH]})


def never_read(path: Path) -> None:
    """A state that is written and never read."""
    nodes = [
        *_tanh(),
        helper.make_node("Neg", ["present_h"], ["y"]),
        helper.make_node("Add", ["present_h", "present_h"], ["present_u"]),
    ]
    _save(
        path,
        nodes,
        _weights(),
        {**_ONE, "past_u": [1, WIDTH]},
        {"y": [1, WIDTH], "present_h": [1, WIDTH], "present_u": [1, WIDTH]},
    )


class _InTraining(nn.Module):
    """h' = tanh(f(W x) + h/2), with dropout, BatchNorm or a buffer that counts as f."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.between = {"dropout": nn.Dropout(0.2), "batch norm": nn.BatchNorm1d(WIDTH)}.get(kind, nn.Identity())
        self.count: Tensor
        self.register_buffer("count", torch.zeros(WIDTH))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        z = self.between(self.linear(x))
        if self.kind == "buffer":
            self.count.add_(1)
            z = z + 0.01 * self.count
        h = torch.tanh(z + 0.5 * h)
        return h * 2, h


def _program(kind: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        torch.manual_seed(0)
        module = _InTraining(kind)
        module.train(kind != "buffer")
        arguments = (torch.randn(2 if kind == "batch norm" else 1, WIDTH),) * 2
        torch.export.save(torch.export.export(module, (arguments[0], arguments[1].clone())), path)

    return write


_TRAINING = ("microsoft/onnxruntime#26584", "pytorch/pytorch#52758", "onnx/onnx#2831")

FILES = (
    FileCase(
        "microphone named mic_in, mic_out",
        (),
        canceller,
        ("refused",),
        states={"state_in": "state_out"},
        shapes={"state_in": (1, WIDTH)},
    ),
    FileCase("If on a stream's own data", (), branch, ("equal",)),
    FileCase(
        "counter of shape []",
        (),
        scalar,
        ("equal", "stops", "refused"),
        states={"past_h": "present_h", "past_n": "present_n"},
        shapes={"past_h": (1, WIDTH), "past_n": ()},
    ),
    FileCase(
        "GRU that starts from zero in every call",
        ("Rikorose/DeepFilterNet#655", "Rikorose/DeepFilterNet#678"),
        gru_from_zeros,
        ("equal",),
    ),
    FileCase("GRU in layout 1", (), layout, ("equal", "refused")),
    FileCase("BatchNormalization in training form", _TRAINING, batch_norm, ("refused",)),
    FileCase("Dropout in training form", _TRAINING, dropout, ("refused",)),
    FileCase("mean of states over lanes", ("k2-fsa/sherpa#785",), mixed_lanes, ("refused",), options=("--batch", "2")),
    FileCase(
        "written and never read",
        ("Denys88/rl_games#316",),
        never_read,
        ("refused",),
        states={"past_h": "present_h", "past_u": "present_u"},
    ),
    *(
        FileCase(f".pt2 with {kind}", _TRAINING, _program(kind), ("refused",), ".pt2", options=("--state", "h=1"))
        for kind in ("dropout", "batch norm", "buffer")
    ),
)
