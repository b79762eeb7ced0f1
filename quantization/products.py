"""The products of a graph that low precision is about: tokens times a constant matrix."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

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
    """

    node: str
    activation: str
    weight: str
    shape: tuple[int, int]
    key: str
    sums: bool = False

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


def products_of(model: onnx.ModelProto) -> list[Product]:
    """The products with constant matrices, in the order of the graph. Weights must be loaded."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        tensor = constants.get(node.input[1]) if node.op_type == "MatMul" else None
        if tensor is None or len(tensor.dims) != 2 or tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        numbers = numpy_helper.to_array(tensor)
        shape = int(tensor.dims[0]), int(tensor.dims[1])
        sums = bool(np.isin(numbers, (0.0, 1.0)).all())
        found.append(Product(node.name, node.input[0], tensor.name, shape, weight_key(numbers), sums))
    return found


def weight_key(numbers: Array) -> str:
    """A short name for a matrix of numbers."""
    return hashlib.sha256(np.ascontiguousarray(numbers).tobytes()).hexdigest()[:16]
