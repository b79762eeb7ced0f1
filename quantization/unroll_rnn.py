"""Unroll recurrent operators into linear ops, so that low precision applies to them.

The graphs in fp32 keep `GRU` and `RNN`, for which every backend has a kernel. ONNX Runtime has none in int8 for them,
as it has for an LSTM; but a step is two MatMuls and a few elementwise operations, and a call of a stream has few steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from nsm.quantization.policy import LONGEST
from nsm.trace import Array

# Defaults of the operators; operators with other values are kept.
_ACTIVATIONS = {"GRU": (["Sigmoid", "Tanh"],), "RNN": (["Tanh"], ["Relu"])}
# Split and Unsqueeze take their sizes and axes as inputs from here on.
_OPSET = 13


def unroll(model: onnx.ModelProto) -> None:
    """Replace, in place, each `GRU` and `RNN` of up to `LONGEST` steps; weights must be loaded.

    An operator is replaced where it runs forward, from a given state, with constant matrices, no lengths of its own,
    no clipping and the usual activations. The others stay.
    """
    graph = model.graph
    opset = max((item.version for item in model.opset_import if not item.domain), default=0)
    if opset < _OPSET or not any(node.op_type in _ACTIVATIONS for node in graph.node):
        return
    lengths = _lengths(model)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        length = lengths.get(node.input[0]) if node.op_type in _ACTIVATIONS and not node.domain else None
        if length is None or not 1 <= length <= LONGEST or not _is_plain(node, constants):
            nodes.append(node)
            continue
        writer = _Writer(node, constants, length)
        nodes += writer.nodes
        graph.initializer.extend(writer.constants)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)


def _lengths(model: onnx.ModelProto) -> dict[str, int]:
    """Return the size of axis 0 of every value with a known one."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    found = {}
    for value in (*graph.value_info, *graph.input):
        dims = value.type.tensor_type.shape.dim
        if dims and dims[0].HasField("dim_value"):
            found[value.name] = dims[0].dim_value
    return found


def _is_plain(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    attributes: dict[str, Any] = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    activations = [name.decode() for name in attributes.get("activations", [])]
    inputs = [*node.input, *[""] * (6 - len(node.input))]
    return (
        attributes.get("direction", b"forward") == b"forward"
        and not attributes.get("layout", 0)
        and "clip" not in attributes
        and (not activations or activations in _ACTIVATIONS[node.op_type])
        and all(name in constants for name in inputs[1:3])
        and (not inputs[3] or inputs[3] in constants)
        and not inputs[4]
        and bool(inputs[5])
    )


class _Writer:
    """The steps of one operator. Letters: T steps, B lanes, I numbers of a token, H of the state, G gates."""

    def __init__(self, node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], length: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._stem = node.name or node.output[0] or node.op_type
        self._attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        arrays = [numpy_helper.to_array(constants[name])[0] if name else None for name in node.input[1:4]]
        weight, recurrent = arrays[:2]
        bias = arrays[2] if len(arrays) > 2 else None
        assert weight is not None
        assert recurrent is not None
        self._size = recurrent.shape[-1]
        width = len(weight)
        of_input, of_state = (None, None) if bias is None else (bias[:width], bias[width:])
        # [T, B, I] -> [T, B, G H], all steps at once; a step is [1, B, ..] from here on, as the states are.
        made = self._product(node.input[0], weight, "input", of_input)
        steps = [made] if length == 1 else self._split(made, [1] * length, "steps", axis=0)
        state = node.input[5]
        step = {"GRU": self._gru, "RNN": self._rnn}[node.op_type]
        states = []
        for index, part in enumerate(steps):
            state = step(part, state, recurrent, of_state, f".{index}" if index else "")
            states.append(state)
        outputs = [*node.output, *[""] * (2 - len(node.output))]
        if outputs[0]:
            joined = states[0] if length == 1 else self._node("Concat", states, "states", axis=0)
            self._node("Unsqueeze", [joined, self._constant("one", np.array([1], np.int64))], output=outputs[0])
        if outputs[1]:
            self._node("Identity", [state], output=outputs[1])

    def _gru(self, made: str, state: str, recurrent: Array, bias: Array | None, step: str) -> str:
        """One step: h' = n + z (h - n).

        n = tanh(x W + r (h R + b)), or tanh(x W + (r h) R + b) without `linear_before_reset`.
        """
        size = self._size
        of_input, fresh = self._split(made, [2 * size, size], f"parts{step}")
        if self._attributes.get("linear_before_reset", 0):
            product = self._product(state, recurrent, "recurrent", bias, step)
            of_state, candidate = self._split(product, [2 * size, size], f"recurrent_parts{step}")
            z, r = self._gates(of_input, of_state, step)
            candidate = self._node("Mul", [r, candidate], f"let_through{step}")
        else:
            first, last = (None, None) if bias is None else (bias[: 2 * size], bias[2 * size :])
            of_state = self._product(state, recurrent[: 2 * size], "recurrent", first, step)
            z, r = self._gates(of_input, of_state, step)
            reset = self._node("Mul", [r, state], f"reset{step}")
            candidate = self._product(reset, recurrent[2 * size :], "candidate", last, step)
        fresh = self._node("Tanh", [self._node("Add", [fresh, candidate], f"sum{step}")], f"fresh{step}")
        change = self._node("Mul", [z, self._node("Sub", [state, fresh], f"change{step}")], f"kept{step}")
        return self._node("Add", [fresh, change], f"hidden{step}")

    def _gates(self, of_input: str, of_state: str, step: str) -> list[str]:
        gates = self._node("Sigmoid", [self._node("Add", [of_input, of_state], f"gates{step}")], f"open{step}")
        return self._split(gates, [self._size, self._size], f"gate{step}")

    def _rnn(self, made: str, state: str, recurrent: Array, bias: Array | None, step: str) -> str:
        """One step: h' = tanh(x W + h R + b), or relu."""
        (kind,) = self._attributes.get("activations", [b"Tanh"])
        total = self._node("Add", [made, self._product(state, recurrent, "recurrent", bias, step)], f"sum{step}")
        return self._node(kind.decode(), [total], f"hidden{step}")

    # -- nodes ---------------------------------------------------------------------------------------------------

    def _product(self, x: str, matrix: Array, role: str, bias: Array | None, step: str = "") -> str:
        """The nodes of x @ matrix^T + bias; matrix and bias are there once for all steps."""
        weight = self._constant(f"{role}.weight", np.ascontiguousarray(matrix.T))
        product = self._node("MatMul", [x, weight], f"{role}{step}")
        if bias is None or not bias.any():
            return product
        return self._node("Add", [product, self._constant(f"{role}.bias", bias)], f"{role}.sum{step}")

    def _split(self, value: str, sizes: Sequence[int], role: str, axis: int = -1) -> list[str]:
        names = [f"{self._stem}/{role}.{index}" for index in range(len(sizes))]
        given = [value, self._constant(f"sizes{'_'.join(map(str, sizes))}", np.array(sizes, np.int64))]
        self.nodes.append(helper.make_node("Split", given, names, f"{self._stem}/{role}/Split", axis=axis))
        return names

    def _constant(self, role: str, value: Array) -> str:
        name = f"{self._stem}/{role}"
        if all(tensor.name != name for tensor in self.constants):
            self.constants.append(numpy_helper.from_array(value, name))
        return name

    def _node(self, kind: str, inputs: Sequence[str], role: str = "", output: str = "", **attributes: Any) -> str:
        output = output or f"{self._stem}/{role}"
        name = f"{self._stem}/{role}" if kind == "MatMul" else f"{output}/{kind}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name, **attributes))
        return output
