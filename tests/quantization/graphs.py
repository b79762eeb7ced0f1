"""Graphs made by hand for the tests of low precision, and what runs them."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
from onnx import TensorProto, helper, numpy_helper

from nsm.quantization import rewrite
from nsm.quantization.linear_ops import LinearOp, linear_ops_of
from nsm.trace import Array, Arrays

LANES, TOKENS, DEPTH, WIDTH = 2, 3, 24, 8
BLOCK = 16
SCALES = {"A": np.float32(0.02), "B": np.float32(1 / 32)}
"""Of the activations of the linear ops with these weights."""

Fast = Callable[[onnx.ModelProto, Sequence[LinearOp]], onnx.ModelProto]


def make_graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int]],
    outputs: Mapping[str, Sequence[int]],
    weights: Mapping[str, Array],
    booleans: Sequence[str] = (),
) -> onnx.ModelProto:
    """A model of opset 20 with float inputs and outputs of these shapes; those in `booleans` are of bool."""

    def values(shapes: Mapping[str, Sequence[int]]) -> list[onnx.ValueInfoProto]:
        kinds = {name: TensorProto.BOOL if name in booleans else TensorProto.FLOAT for name in shapes}
        return [helper.make_tensor_value_info(name, kinds[name], shape) for name, shape in shapes.items()]

    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(list(nodes), "g", values(inputs), values(outputs), constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def product_node(name: str, left: str, right: str, output: str) -> onnx.NodeProto:
    return helper.make_node("MatMul", [left, right], [output], name)


def four_products(weights: Arrays) -> onnx.ModelProto:
    """y = x @ A + x @ B, r = z @ A, w = y @ C: two share x, two share A, and the last reads a result."""
    rows = [LANES, TOKENS]
    return make_graph(
        [
            product_node("one/MatMul", "x", "A", "p"),
            product_node("two/MatMul", "x", "B", "q"),
            helper.make_node("Add", ["p", "q"], ["y"], "sum"),
            product_node("three/MatMul", "z", "A", "r"),
            product_node("four/MatMul", "y", "C", "w"),
        ],
        {"x": [*rows, DEPTH], "z": [*rows, DEPTH]},
        {"y": [*rows, WIDTH], "w": [*rows, WIDTH], "r": [*rows, WIDTH]},
        weights,
    )


def weights() -> Arrays:
    """Row 0 has the largest number of each column, more than twice the next: see `feeds`."""
    random = np.random.default_rng(1)
    made = {}
    for name, rows in (("A", DEPTH), ("B", DEPTH), ("C", WIDTH)):
        made[name] = random.uniform(-1, 1, (rows, WIDTH)).astype(np.float32)
        made[name][0] = np.where(made[name][0] > 0, 2.125, -2.25)
    return made


def feeds() -> Arrays:
    """Numbers that no machine computes otherwise than another.

    Multiples of 1 / 32, with a 127 in every block of a token, so that a kernel that quantizes blocks of them loses
    nothing. The first number is the least, 0 as an unsigned byte: processors without VNNI add pairs of linear ops of
    bytes in 16 bits, and the largest weight meets it.
    """
    random = np.random.default_rng(2)
    made = {name: random.integers(-127, 128, (LANES, TOKENS, DEPTH)).astype(np.float32) / 32 for name in "xz"}
    for value in made.values():
        value[..., 0] = -127 / 32
        value[..., BLOCK] = 127 / 32
    return made


def chosen(model: onnx.ModelProto) -> list[LinearOp]:
    """All but the linear op with C."""
    return [linear_op for linear_op in linear_ops_of(model) if linear_op.weight != "C"]


def static(model: onnx.ModelProto, linear_ops: Sequence[LinearOp]) -> onnx.ModelProto:
    return rewrite.static(
        model, linear_ops, {linear_op.key: float(SCALES[linear_op.weight]) for linear_op in linear_ops}
    )


def blocked(model: onnx.ModelProto, linear_ops: Sequence[LinearOp]) -> onnx.ModelProto:
    return rewrite.blocked(model, linear_ops, BLOCK)


FAST: dict[str, Fast] = {
    "weight-only": rewrite.weights_only,
    "static": static,
    "dynamic": rewrite.dynamic,
    "block-wise": blocked,
    "fp16": rewrite.half,
    "bf16": lambda model, linear_ops: rewrite.half(model, linear_ops, TensorProto.BFLOAT16),
}
"""Every form, on `four_products`."""


def run(model: onnx.ModelProto, feeds: Arrays, optimise: bool = False) -> Arrays:
    """The outputs by name, as ONNX Runtime computes them."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def compiled(model: onnx.ModelProto) -> ov.CompiledModel:
    """For OpenVINO on the CPU, as a session compiles it."""
    network = ov.convert_model(io.BytesIO(model.SerializeToString()))
    return ov.Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def constants(model: onnx.ModelProto) -> Arrays:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def count(model: onnx.ModelProto, kind: str) -> int:
    return sum(node.op_type == kind for node in model.graph.node)


def slow_int8(weight: Array) -> tuple[Array, Array]:
    """Column by column, number by number: the int8 and the scale of each column."""
    levels, scales = np.zeros(weight.shape, np.float64), np.ones(weight.shape[1], np.float32)
    for column in range(weight.shape[1]):
        largest = max(abs(number) for number in weight[:, column])
        if largest > 0:
            scales[column] = np.float32(largest) / np.float32(127)
        for row in range(weight.shape[0]):
            levels[row, column] = round(float(weight[row, column] / scales[column]))
    return levels, scales


def largest_pair(numbers: Array) -> float:
    """Number by number: the largest sum, in magnitude, of those of a sign in rows 2 i and 2 i + 1 of a column."""
    found = 0.0
    for column in numbers.T.astype(float).tolist():
        for first in range(0, len(column), 2):
            pair = column[first : first + 2]
            for sign in (1, -1):
                found = max(found, sum(sign * number for number in pair if sign * number > 0))
    return found
