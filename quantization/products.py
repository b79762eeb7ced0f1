"""The products of a graph that low precision is about: tokens, or tokens and a state, times constant matrices."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from onnx import numpy_helper

from nsm.trace import Array


@dataclass(frozen=True)
class Product:
    """x [..., D] @ W [D, N] with constant numbers W.

    node: its name in the graph, after the module it comes from.
    activation, weight: names of x and W in the graph.
    shape: (D, N).
    key: of the numbers of W, the same in every entry of a model.
    sums: W is of zeros and ones alone, and no weights.
    operator: "LSTM" for the products of such an operator, taken together: x is its input, W has those of the input and
        those of the state, D = I + H, for all gates, N = 4 H.
    """

    node: str
    activation: str
    weight: str
    shape: tuple[int, int]
    key: str
    sums: bool = False
    operator: Literal["MatMul", "LSTM"] = "MatMul"

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


def products_of(model: onnx.ModelProto, lstm: bool = False) -> list[Product]:
    """The products with constant matrices, in the order of the graph. Weights must be loaded.

    Args:
        model: the graph.
        lstm: whether those of the operator `LSTM` count.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if lstm and node.op_type == "LSTM" and (product := _of_lstm(node, constants)) is not None:
            found.append(product)
            continue
        tensor = constants.get(node.input[1]) if node.op_type == "MatMul" else None
        if tensor is None or len(tensor.dims) != 2 or tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        numbers = numpy_helper.to_array(tensor)
        shape = int(tensor.dims[0]), int(tensor.dims[1])
        sums = bool(np.isin(numbers, (0.0, 1.0)).all())
        found.append(Product(node.name, node.input[0], tensor.name, shape, weight_key(numbers), sums))
    return found


def _of_lstm(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> Product | None:
    """The products of an operator with constant matrices [directions, 4 H, I] and [directions, 4 H, H], time first."""
    lanes_first = any(item.name == "layout" and item.i for item in node.attribute)
    if lanes_first or not all(name in constants for name in node.input[1:3]):
        return None
    arrays = [numpy_helper.to_array(constants[name]) for name in node.input[1:3]]
    joined = np.concatenate(arrays, -1)
    shape = joined.shape[-1], joined.shape[0] * joined.shape[1]
    return Product(node.name, node.input[0], node.input[1], shape, weight_key(joined), operator="LSTM")


def weight_key(numbers: Array) -> str:
    """A short name for a matrix of numbers."""
    return hashlib.sha256(np.ascontiguousarray(numbers).tobytes()).hexdigest()[:16]
