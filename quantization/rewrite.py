"""Quantization schemes for linear ops and tables, as functions from one ONNX graph to another.

Matrices are symmetric: a level q means scale * q, without a zero point, with one scale per column. Activations with a
calibrated scale are symmetric too, except those with hardly any negative value: they may be asymmetric uint8, with a
zero point, which TensorRT refuses. Biases and all operations between the linear ops are kept in fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from nsm.quantization.calibration_data import Asymmetric
from nsm.quantization.linear_ops import LinearOp
from nsm.quantization.policy import LEVELS, SAFE_SUM, Tables
from nsm.trace import Array


def quantised_weight(numbers: Array, saturation_safe: bool = False) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A matrix [D, N] as int8 [D, N], from -127 to 127, and a scale for each column, [N].

    If it is saturation-safe, two weights of one sign in rows 2 i and 2 i + 1 add up to `SAFE_SUM` at most.
    """
    largest = np.abs(numbers).max(0)
    if saturation_safe:
        # To one less before they are rounded, which may add a half to each.
        largest = np.maximum(largest, _largest_pair(numbers) * (LEVELS / (SAFE_SUM - 1)))
    scale = _scales(largest)
    return np.clip(np.rint(numbers / scale), -LEVELS, LEVELS).astype(np.int8), scale


def weights_only(model: onnx.ModelProto, linear_ops: Sequence[LinearOp]) -> onnx.ModelProto:
    """Weight-only int8: x @ dequantized(W), in fp32."""
    return _Rewriter(model, linear_ops).run(lambda rewriter, linear_op: rewriter.dequantised_weight(linear_op))


def static(
    model: onnx.ModelProto,
    linear_ops: Sequence[LinearOp],
    scales: Mapping[str, float],
    saturation_safe: bool = False,
    asymmetric: Mapping[str, Asymmetric] = MappingProxyType({}),
) -> onnx.ModelProto:
    """Static int8 (QDQ): dequantized(quantized(x)) @ dequantized(W), which backends fuse into an int8 linear op.

    Args:
        model: the graph.
        linear_ops: those to quantize.
        scales: scales of the activations, by the key of the linear op.
        saturation_safe: the matrices; see `quantised_weight`.
        asymmetric: by key too: activations that become uint8 instead.
    """

    def rewrite(rewriter: _Rewriter, linear_op: LinearOp) -> None:
        rewriter.dequantised_weight(linear_op)
        if (found := asymmetric.get(linear_op.key)) is None:
            rewriter.quantised_activation(linear_op, scales[linear_op.key], np.int8(0))
        else:
            rewriter.quantised_activation(linear_op, found.scale, np.uint8(found.zero))

    return _Rewriter(model, linear_ops, saturation_safe).run(rewrite)


def dynamic(model: onnx.ModelProto, linear_ops: Sequence[LinearOp], saturation_safe: bool = False) -> onnx.ModelProto:
    """Dynamic int8: the scale of the activations is computed in each call, which is fast in ONNX Runtime on a CPU.

    One scale for all lanes and tokens of a call; `saturation_safe` concerns the matrices. An LSTM becomes an operator
    of ONNX Runtime that does the same at every step.
    """
    rewriter = _Rewriter(model, linear_ops, saturation_safe)
    if any(linear_op.operator == "LSTM" for linear_op in linear_ops):
        rewriter.use_domain("com.microsoft")

    def rewrite(rewriter: _Rewriter, linear_op: LinearOp) -> None:
        (rewriter.integer_lstm if linear_op.operator == "LSTM" else rewriter.integer_linear_op)(linear_op)

    return rewriter.run(rewrite)


def blocked(model: onnx.ModelProto, linear_ops: Sequence[LinearOp], block: int = 32) -> onnx.ModelProto:
    """Weights in int8 with a scale for every `block` rows of a column, by ONNX Runtime's own operator.

    Its kernel quantizes the activations too, token by token and block by block.
    """
    rewriter = _Rewriter(model, linear_ops)
    rewriter.use_domain("com.microsoft")
    return rewriter.run(lambda self, linear_op: self.blockwise_linear_op(linear_op, block))


def half(model: onnx.ModelProto, linear_ops: Sequence[LinearOp], kind: int = TensorProto.FLOAT16) -> onnx.ModelProto:
    """Linear ops in fp16 or bf16, each between two casts; state, norms, softmax and sums are kept in fp32."""
    return _Rewriter(model, linear_ops).run(lambda rewriter, linear_op: rewriter.half_linear_op(linear_op, kind))


def looked_up(model: onnx.ModelProto, tables: Sequence[LinearOp], kept: Tables) -> onnx.ModelProto:
    """Store embedding tables in low precision; a call dequantizes only the rows it looks up.

    Args:
        model: the graph.
        tables: linear ops of the operator Gather.
        kept: as int8 with a scale for each row, or in half precision.
    """

    def rewrite(rewriter: _Rewriter, linear_op: LinearOp) -> None:
        if kept == "int8":
            rewriter.rows_of_bytes(linear_op)
        else:
            rewriter.rows_of_halves(linear_op, _HALVES[kept])

    return _Rewriter(model, tables).run(rewrite)


_HALVES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def _largest_pair(numbers: Array) -> Array:
    """Return, per column [N], the largest sum of magnitudes of one sign in rows 2 i and 2 i + 1."""
    padded = np.pad(numbers, ((0, len(numbers) % 2), (0, 0)))
    found: Array = np.zeros(numbers.shape[1], np.float32)
    for part in (np.maximum(padded, 0), np.maximum(-padded, 0)):
        found = np.maximum(found, (part[0::2] + part[1::2]).max(0))
    return found


def _scales(largest: Array) -> NDArray[np.float32]:
    """Return the scales of groups with these largest values; 1 if a value is zero or too small to divide by."""
    scale = (largest / LEVELS).astype(np.float32)
    return np.where(scale >= np.finfo(np.float32).tiny, scale, np.float32(1.0))


def _brain(numbers: Array) -> NDArray[np.uint16]:
    """The bits of the nearest bf16, which numpy does not know: the upper half of a float32, ties to even."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


class _Rewriter:
    """Rewrites linear ops one by one in a copy of a graph; shared inputs are quantized once."""

    def __init__(self, model: onnx.ModelProto, linear_ops: Sequence[LinearOp], saturation_safe: bool = False) -> None:
        self.saturation_safe = saturation_safe
        self.model = copy.deepcopy(model)
        self.linear_ops = {linear_op.node: linear_op for linear_op in linear_ops}
        self.constants = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.added: dict[str, TensorProto] = {}
        self.made: dict[tuple[str, ...], str] = {}
        self.here: list[onnx.NodeProto] = []

    def run(self, rewrite: Callable[[_Rewriter, LinearOp], None]) -> onnx.ModelProto:
        graph, nodes = self.model.graph, []
        for node in self.model.graph.node:
            if node.name not in self.linear_ops:
                nodes.append(node)
                continue
            self.node, self.here = node, []
            rewrite(self, self.linear_ops[node.name])
            nodes += self.here if self.here and self.here[-1].output[0] == node.output[0] else [*self.here, node]
        used = {name for node in nodes for name in node.input}
        kept = [tensor for tensor in (*graph.initializer, *self.added.values()) if tensor.name in used]
        del graph.node[:], graph.initializer[:]
        graph.node.extend(nodes)
        graph.initializer.extend(kept)
        del graph.value_info[:]  # of values that may have gone, or have another type now
        return self.model

    def use_domain(self, domain: str) -> None:
        if all(item.domain != domain for item in self.model.opset_import):
            self.model.opset_import.append(helper.make_opsetid(domain, 1))

    # -- schemes of one linear op ------------------------------------------------------------------------------------

    def dequantised_weight(self, linear_op: LinearOp) -> None:
        if (name := self.made.get(("dequantized", linear_op.weight))) is None:
            weight, scale = self._int8(linear_op)
            name = f"{linear_op.weight}.dequantized"
            self._node("DequantizeLinear", [weight, scale], name, axis=1)
            self.made["dequantized", linear_op.weight] = name
        self.node.input[1] = name

    def quantised_activation(self, linear_op: LinearOp, scale: float, zero: np.int8 | np.uint8) -> None:
        key = ("quantized", linear_op.activation, str(scale), str(zero.dtype), str(zero))
        if key not in self.made:
            stem = f"{linear_op.node}.activation"
            constants = [
                self._constant(f"{stem}.scale", np.float32(scale)),
                self._constant(f"{stem}.zero", zero),
            ]
            self._node("QuantizeLinear", [linear_op.activation, *constants], f"{stem}.quantized")
            self._node("DequantizeLinear", [f"{stem}.quantized", *constants], f"{stem}.dequantized")
            self.made[key] = f"{stem}.dequantized"
        self.node.input[0] = self.made[key]

    def integer_linear_op(self, linear_op: LinearOp) -> None:
        weight, scale = self._int8(linear_op)
        key = ("dynamic", linear_op.activation)
        stem = self.made.get(key, f"{linear_op.node}.activation")
        if key not in self.made:
            outputs = [f"{stem}.quantized", f"{stem}.scale", f"{stem}.zero"]
            self.here.append(
                helper.make_node(
                    "DynamicQuantizeLinear", [linear_op.activation], outputs, f"{stem}/DynamicQuantizeLinear"
                )
            )
            self.made[key] = stem
        zero = self._constant("weight.zero", np.int8(0))
        inputs = [f"{stem}.quantized", weight, f"{stem}.zero", zero]
        self._node("MatMulInteger", inputs, f"{linear_op.node}.integer")
        self._node("Cast", [f"{linear_op.node}.integer"], f"{linear_op.node}.float", to=TensorProto.FLOAT)
        self._node("Mul", [f"{stem}.scale", scale], f"{linear_op.node}.scale")
        self._node("Mul", [f"{linear_op.node}.float", f"{linear_op.node}.scale"], self.node.output[0])

    def integer_lstm(self, linear_op: LinearOp) -> None:
        """Of an operator with matrices [directions, 4 H, D]; those in int8 are [directions, D, 4 H]."""
        inputs = [*self.node.input, *[""] * (8 - len(self.node.input))]
        scales = []
        for place in (1, 2):
            name = inputs[place]
            numbers = numpy_helper.to_array(self.constants[name])
            parts = [quantised_weight(matrix.T, self.saturation_safe) for matrix in numbers]
            inputs[place] = self._constant(f"{name}.int8", np.stack([levels for levels, _ in parts]))
            scale = np.stack([scale for _, scale in parts])
            scales.append(self._constant(f"{name}.scale", scale))
            scales.append(self._constant(f"{name}.zero", np.zeros(scale.shape, np.int8)))
        node = helper.make_node(
            "DynamicQuantizeLSTM", [*inputs, *scales], list(self.node.output), linear_op.node, domain="com.microsoft"
        )
        node.attribute.extend(item for item in self.node.attribute if item.name != "layout")
        self.here.append(node)

    def blockwise_linear_op(self, linear_op: LinearOp, block: int) -> None:
        numbers = numpy_helper.to_array(self.constants[linear_op.weight])
        depth, columns = numbers.shape
        count = -(-depth // block)
        padded = np.zeros((columns, count * block), np.float32)
        padded[:, :depth] = numbers.T
        parts = padded.reshape(columns, count, block)
        scale = _scales(np.abs(parts).max(-1))
        levels = np.clip(np.rint(parts / scale[..., None]), -LEVELS, LEVELS) + 128  # stored without a sign
        weight = self._constant(f"{linear_op.weight}.blocks", levels.astype(np.uint8))
        scales = self._constant(f"{linear_op.weight}.scales", scale.reshape(-1))
        self._node(
            "MatMulNBits",
            [linear_op.activation, weight, scales],
            self.node.output[0],
            domain="com.microsoft",
            K=depth,
            N=columns,
            bits=8,
            block_size=block,
            accuracy_level=4,
        )

    def half_linear_op(self, linear_op: LinearOp, kind: int) -> None:
        key = ("half", linear_op.activation)
        if key not in self.made:
            self.made[key] = f"{linear_op.node}.activation.half"
            self._node("Cast", [linear_op.activation], self.made[key], to=kind)
        weight = self._half(linear_op, kind, "half")
        self._node("MatMul", [self.made[key], weight], f"{linear_op.node}.half")
        self._node("Cast", [f"{linear_op.node}.half"], self.node.output[0], to=TensorProto.FLOAT)

    def rows_of_halves(self, table: LinearOp, kind: int) -> None:
        self._node("Gather", [self._half(table, kind, "rows"), table.activation], f"{table.node}.half")
        self._node("Cast", [f"{table.node}.half"], self.node.output[0], to=TensorProto.FLOAT)

    def rows_of_bytes(self, table: LinearOp) -> None:
        numbers, scale = quantised_weight(numpy_helper.to_array(self.constants[table.weight]).T)
        weight = self._constant(f"{table.weight}.rows", np.ascontiguousarray(numbers.T))
        scales = self._constant(f"{table.weight}.rows.scale", scale[:, None])
        self._node("Gather", [weight, table.activation], f"{table.node}.bytes")
        self._node("Cast", [f"{table.node}.bytes"], f"{table.node}.float", to=TensorProto.FLOAT)
        self._node("Gather", [scales, table.activation], f"{table.node}.scale")
        self._node("Mul", [f"{table.node}.float", f"{table.node}.scale"], self.node.output[0])

    # -- parts ---------------------------------------------------------------------------------------------------

    def _int8(self, linear_op: LinearOp) -> tuple[str, str]:
        """Names of the matrix in int8 and of its scales."""
        numbers, scale = quantised_weight(numpy_helper.to_array(self.constants[linear_op.weight]), self.saturation_safe)
        return (
            self._constant(f"{linear_op.weight}.int8", numbers),
            self._constant(f"{linear_op.weight}.scale", scale),
        )

    def _half(self, linear_op: LinearOp, kind: int, suffix: str) -> str:
        """Name of the matrix in half precision."""
        name = f"{linear_op.weight}.{suffix}"
        if name not in self.added:
            numbers = numpy_helper.to_array(self.constants[linear_op.weight])
            halves = numbers.astype(np.float16) if kind == TensorProto.FLOAT16 else _brain(numbers)
            # As raw bytes: OpenVINO misreads bf16 that is stored number by number.
            self.added[name] = helper.make_tensor(name, kind, numbers.shape, halves.tobytes(), raw=True)
        return name

    def _constant(self, name: str, value: Array | np.generic) -> str:
        if name not in self.added:
            self.added[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def _node(self, kind: str, inputs: list[str], output: str, domain: str = "", **attributes: int) -> None:
        node = helper.make_node(kind, inputs, [output], f"{output}/{kind}", domain=domain)
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        self.here.append(node)
