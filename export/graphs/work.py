"""The work of a graph: floating-point operations and bytes moved, counted from its shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import helper
from onnx.shape_inference import InferenceError

from nsm.errors import BuildError
from nsm.manifest import EntryWork

_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum")


# Whole recurrent layers: products with the weights of their second and third inputs, for every token.
_RECURRENT = ("LSTM", "GRU", "RNN")


@dataclass(frozen=True)
class Work:
    """Work of one call of an entry: floating-point operations and bytes moved, by operation."""

    operations: tuple[tuple[str, float, float], ...]

    @property
    def flops(self) -> float:
        return sum(flops for _, flops, _ in self.operations)

    @property
    def nbytes(self) -> float:
        return sum(nbytes for _, _, nbytes in self.operations)

    @property
    def total(self) -> EntryWork:
        """The sums, as a manifest has them."""
        return EntryWork(self.flops, self.nbytes)

    def least_seconds(self, machine: Machine) -> float:
        """The time that the roofline allows."""
        return sum(
            max(flops / machine.flops_per_second, nbytes / machine.bytes_per_second)
            for _, flops, nbytes in self.operations
        )


@dataclass(frozen=True)
class Machine:
    """Peak rates of a target here: on a large MatMul, and on reading a large matrix once."""

    flops_per_second: float
    bytes_per_second: float


def work_of(graph: Path) -> Work:
    """Count the work of a graph with static shapes.

    Raises:
        BuildError: a shape is not known.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(str(graph), load_external_data=False), strict_mode=True)
    shapes: dict[str, tuple[int, int]] = {}
    dims: dict[str, list[int]] = {}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        kind = value.type.tensor_type
        if not all(dim.HasField("dim_value") for dim in kind.shape.dim):
            continue
        dims[value.name] = [dim.dim_value for dim in kind.shape.dim]
        shapes[value.name] = int(np.prod(dims[value.name])), helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
    for tensor in model.graph.initializer:
        dims[tensor.name] = list(tensor.dims)
        shapes[tensor.name] = int(np.prod(tensor.dims)), helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    outside = {value.name for value in (*model.graph.input, *model.graph.output)}
    operations = []
    for node in model.graph.node:
        product = node.op_type in (*_PRODUCTS, *_RECURRENT)
        names = [name for name in dict.fromkeys((*node.input, *node.output)) if name in outside or (name and product)]
        outside -= set(names)  # inputs and states are read once
        if any(name not in shapes for name in names):
            raise BuildError(f"{graph}: the shapes of {node.name} are not known. Export the bundle again.")
        nbytes = float(sum(shapes[name][0] * shapes[name][1] for name in names))
        flops = _flops(node, dims) if product else 0.0
        if flops or nbytes:
            operations.append((node.name, flops, nbytes))
    return Work(tuple(operations))


def entry_work(graph: Path) -> EntryWork | None:
    """The sums of `work_of`; None where it cannot be counted."""
    try:
        return work_of(graph).total
    except (BuildError, InferenceError, DecodeError):
        return None


def _flops(node: onnx.NodeProto, dims: Mapping[str, Sequence[int]]) -> float:
    """Of a linear op: two per multiply-add."""
    first, second = dims[node.input[0]], dims[node.input[1]] if len(node.input) > 1 else ()
    if node.op_type in _RECURRENT:
        return 2.0 * math.prod(first[:2]) * sum(math.prod(dims[name]) for name in node.input[1:3])
    if node.op_type == "ConvTranspose":  # every input meets every weight of its channel
        return 2.0 * math.prod(first) * math.prod(second[1:])
    if node.op_type == "Einsum":
        equation = next(item.s.decode() for item in node.attribute if item.name == "equation").replace(" ", "")
        sizes: dict[str, int] = {}
        for term, name in zip(equation.split("->")[0].split(","), node.input, strict=True):
            before, _, after = term.partition("...")
            sizes |= dict(zip(before, dims[name], strict=False))
            sizes |= dict(zip(reversed(after), reversed(dims[name]), strict=False))
            rest = dims[name][len(before) : len(dims[name]) - len(after)]
            sizes |= {
                f"...{place}": max(size, sizes.get(f"...{place}", 1)) for place, size in enumerate(reversed(rest))
            }
        return 2.0 * math.prod(sizes.values())
    depth = math.prod(second[1:]) if node.op_type == "Conv" else first[-1]
    return 2.0 * math.prod(dims[node.output[0]]) * depth
