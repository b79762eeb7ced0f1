"""Small foreign graphs in files, for tests of what is read of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64
Ports = dict[str, Sequence[int | str | None]]


def write(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: Ports,
    outputs: Ports,
    constants: dict[str, Any] | None = None,
    opset: int = 18,
    **more: Any,
) -> Path:
    """A graph of float tensors in a file; integers are inputs that are called ids."""
    given, made = (
        [helper.make_tensor_value_info(name, INT if name == "ids" else FLOAT, shape) for name, shape in ports.items()]
        for ports in (inputs, outputs)
    )
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()]
    graph = helper.make_graph(nodes, "graph", given, made, tensors)
    opsets = [helper.make_opsetid("", opset), *more.pop("opsets", [])]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9, **more), str(path))
    return path


def leaky(out: str = "hn") -> list[onnx.NodeProto]:
    """h' = h / 2 + x, and the answer y = 2 h'."""
    return [
        helper.make_node("Mul", ["h", "half"], ["faded"]),
        helper.make_node("Add", ["faded", "x"], [out]),
        helper.make_node("Add", [out, out], ["y"]),
    ]


HALF = {"half": np.float32(0.5)}
PLAIN: tuple[Ports, Ports] = {"x": ["batch", 3], "h": ["batch", 3]}, {"y": ["batch", 3], "hn": ["batch", 3]}


def silero(path: Path, change: Callable[[onnx.ModelProto], None] | None = None) -> Path:
    """A voice activity detector as they are passed around: frames [B, 64], state [2, B, 12], a sample rate."""
    random = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array((random.standard_normal(shape) * 0.2).astype(np.float32), name)

    nodes = [
        helper.make_node("Cast", ["sr"], ["rate"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["rate", "base"], ["gain"]),
        helper.make_node("Mul", ["input", "gain"], ["scaled"]),
        helper.make_node("Unsqueeze", ["scaled", "zero"], ["sequence"]),
        helper.make_node("Split", ["state"], ["h", "c"], axis=0, num_outputs=2),
        helper.make_node("LSTM", ["sequence", "W", "R", "", "", "h", "c"], ["Y", "h1", "c1"], "lstm", hidden_size=12),
        helper.make_node("Concat", ["h1", "c1"], ["stateN"], axis=0),
        helper.make_node("Squeeze", ["h1", "zero"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "head"], ["logit"], "head"),
        helper.make_node("Sigmoid", ["logit"], ["output"]),
    ]
    inputs = [
        helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 64]),
        helper.make_tensor_value_info("state", TensorProto.FLOAT, [2, "batch", 12]),
        helper.make_tensor_value_info("sr", TensorProto.INT64, []),
    ]
    outputs = [
        helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 1]),
        helper.make_tensor_value_info("stateN", TensorProto.FLOAT, [2, "batch", 12]),
    ]
    constants = [
        numpy_helper.from_array(np.array(16000, np.float32), "base"),
        numpy_helper.from_array(np.array([0]), "zero"),
    ]
    constants += [weight("W", 1, 48, 64), weight("R", 1, 48, 12), weight("head", 12, 1)]
    graph = helper.make_graph(nodes, "vad", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    if change is not None:
        change(model)
    onnx.save(model, str(path))
    return path
