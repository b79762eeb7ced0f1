"""Quantizable nodes: MatMul with constant weights, and embedding tables."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx
from onnx import numpy_helper

from nsm.trace import Array

RECURRENT = ("LSTM", "GRU", "RNN")
"""Operators of ONNX with a recurrence inside."""

Operator = Literal["MatMul", "LSTM", "Gather"]


@dataclass(frozen=True)
class LinearOp:
    """x [..., D] @ W [D, N] with constant numbers W.

    node: its name in the graph, after the module it comes from.
    activation, weight: names of x and W in the graph.
    shape: (D, N).
    key: hash of W, the same in every entry of a model.
    sums: W has only zeros and ones: it adds up values and is not a weight.
    operator: "LSTM" for all linear ops of an LSTM together: x is its input, W has the rows of the input and of the
        state, D = I + H, for all gates, N = 4 H. "Gather" for the rows of a table W that the ids x select, as in an
        embedding: the MatMul of the one-hot x and W.
    largest: magnitude of the numbers of W.
    """

    node: str
    activation: str
    weight: str
    shape: tuple[int, int]
    key: str
    sums: bool = False
    operator: Operator = "MatMul"
    largest: float = 0.0

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


def linear_ops_of(model: onnx.ModelProto, operators: Collection[str] = ("MatMul",)) -> list[LinearOp]:
    """The linear ops of these operators, in the order of the graph. Weights must be loaded."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type not in operators:
            continue
        if node.op_type == "LSTM":
            linear_op = _of_lstm(node, constants)
        elif node.op_type == "Gather":
            linear_op = _of_table(node, constants)
        else:
            linear_op = _of_matrix(node, node.input[1], node.input[0], constants)
        if linear_op is not None:
            found.append(linear_op)
    return found


def largest_weights(model: onnx.ModelProto) -> dict[str, int]:
    """Numbers in the largest constant matrix of each recurrent operator, by its type, and of linear ops as ""."""
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    largest: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type in RECURRENT:
            kind, weights = node.op_type, node.input[1:3]
        elif node.op_type in ("MatMul", "Gemm"):
            kind, weights = "", node.input[:2]
        else:
            continue
        largest[kind] = max(largest.get(kind, 0), *(sizes.get(name, 0) for name in weights))
    return largest


def _of_matrix(
    node: onnx.NodeProto, weight: str, activation: str, constants: dict[str, onnx.TensorProto]
) -> LinearOp | None:
    tensor = constants.get(weight)
    if tensor is None or len(tensor.dims) != 2 or tensor.data_type != onnx.TensorProto.FLOAT:
        return None
    numbers = numpy_helper.to_array(tensor)
    sums = bool(np.isin(numbers, (0.0, 1.0)).all())
    shape = int(tensor.dims[0]), int(tensor.dims[1])
    return LinearOp(node.name, activation, weight, shape, weight_key(numbers), sums, largest=_largest(numbers))


def _of_table(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> LinearOp | None:
    if any(item.name == "axis" and item.i for item in node.attribute):
        return None
    linear_op = _of_matrix(node, node.input[0], node.input[1], constants)
    return None if linear_op is None else replace(linear_op, operator="Gather")


def _of_lstm(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> LinearOp | None:
    """The linear ops of an LSTM with constant matrices [directions, 4 H, I] and [directions, 4 H, H], time first."""
    lanes_first = any(item.name == "layout" and item.i for item in node.attribute)
    if lanes_first or not all(name in constants for name in node.input[1:3]):
        return None
    arrays = [numpy_helper.to_array(constants[name]) for name in node.input[1:3]]
    joined = np.concatenate(arrays, -1)
    shape = joined.shape[-1], joined.shape[0] * joined.shape[1]
    return LinearOp(
        node.name, node.input[0], node.input[1], shape, weight_key(joined), operator="LSTM", largest=_largest(joined)
    )


def _largest(numbers: Array) -> float:
    return float(np.abs(numbers).max(initial=0.0))


def weight_key(numbers: Array) -> str:
    """A short name for a matrix of numbers."""
    return hashlib.sha256(np.ascontiguousarray(numbers).tobytes()).hexdigest()[:16]
