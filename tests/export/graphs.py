"""Small foreign graphs in files, for tests of what is read of them."""

from __future__ import annotations

from collections.abc import Sequence
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
