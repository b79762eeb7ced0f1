"""The forms of a graph in low precision, of its products and its tables: functions from one ONNX graph to another.

Matrices are symmetric: a number q stands for scale * q, with no zero point, and there is a scale for each column. So
are activations whose scale is calibrated, but for those of which hardly any is negative: they may be unsigned, with a
zero point, which TensorRT refuses. Biases and everything between the products stay float.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from nsm.quantization.calibration_data import Unsigned
from nsm.quantization.linear_ops import Product
from nsm.quantization.policy import LEVELS, SAFE_SUM, Tables
from nsm.trace import Array


def quantised_weight(numbers: Array, guarded: bool = False) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A matrix [D, N] as int8 [D, N], from -127 to 127, and a scale for each column, [N].

    If it is guarded, two neighbours of a sign, in rows 2 i and 2 i + 1, add up to `SAFE_SUM` at most.
    """
    largest = np.abs(numbers).max(0)
    if guarded:
        # To one less before they are rounded, which may add a half to each.
        largest = np.maximum(largest, _largest_pair(numbers) * (LEVELS / (SAFE_SUM - 1)))
    scale = _scales(largest)
    return np.clip(np.rint(numbers / scale), -LEVELS, LEVELS).astype(np.int8), scale


def weights_only(model: onnx.ModelProto, products: Sequence[Product]) -> onnx.ModelProto:
    """Int8 in memory, float in the product: x @ dequantised(W)."""
    return _Rewriter(model, products).run(lambda rewriter, product: rewriter.dequantised_weight(product))


def static(
    model: onnx.ModelProto,
    products: Sequence[Product],
    scales: Mapping[str, float],
    guarded: bool = False,
    unsigned: Mapping[str, Unsigned] = MappingProxyType({}),
) -> onnx.ModelProto:
    """Backends run it as an int8 product: dequantised(quantised(x)) @ dequantised(W).

    Args:
        model: the graph.
        products: those to quantise.
        scales: of the activations, by the key of the product.
        guarded: the matrices; see `quantised_weight`.
        unsigned: by key too: activations that become uint8 instead.
    """

    def rewrite(rewriter: _Rewriter, product: Product) -> None:
        rewriter.dequantised_weight(product)
        if (found := unsigned.get(product.key)) is None:
            rewriter.quantised_activation(product, scales[product.key], np.int8(0))
        else:
            rewriter.quantised_activation(product, found.scale, np.uint8(found.zero))

    return _Rewriter(model, products, guarded).run(rewrite)


def dynamic(model: onnx.ModelProto, products: Sequence[Product], guarded: bool = False) -> onnx.ModelProto:
    """An integer product whose activations get their scale at each call: ONNX Runtime's fast form on a CPU.

    One scale for all lanes and tokens of a call; `guarded` is said of the matrices. An LSTM becomes ONNX Runtime's own
    operator, which does the same at every step.
    """
    rewriter = _Rewriter(model, products, guarded)
    if any(product.operator == "LSTM" for product in products):
        rewriter.use_domain("com.microsoft")

    def rewrite(rewriter: _Rewriter, product: Product) -> None:
        (rewriter.integer_lstm if product.operator == "LSTM" else rewriter.integer_product)(product)

    return rewriter.run(rewrite)


def blocked(model: onnx.ModelProto, products: Sequence[Product], block: int = 32) -> onnx.ModelProto:
    """Weights in int8 with a scale for every `block` rows of a column, by ONNX Runtime's own operator.

    Its kernel quantises the activations too, token by token and block by block.
    """
    rewriter = _Rewriter(model, products)
    rewriter.use_domain("com.microsoft")
    return rewriter.run(lambda self, product: self.blocked_product(product, block))


def half(model: onnx.ModelProto, products: Sequence[Product], kind: int = TensorProto.FLOAT16) -> onnx.ModelProto:
    """Products in half precision, each between two casts; state, norms, softmax and sums stay fp32."""
    return _Rewriter(model, products).run(lambda rewriter, product: rewriter.half_product(product, kind))


def looked_up(model: onnx.ModelProto, tables: Sequence[Product], kept: Tables) -> onnx.ModelProto:
    """Tables of embeddings in less room: the rows that a call looks up are made float, and no others.

    Args:
        model: the graph.
        tables: products of the operator Gather.
        kept: as int8 with a scale for each row, or in half precision.
    """

    def rewrite(rewriter: _Rewriter, product: Product) -> None:
        if kept == "int8":
            rewriter.rows_of_bytes(product)
        else:
            rewriter.rows_of_halves(product, _HALVES[kept])

    return _Rewriter(model, tables).run(rewrite)


_HALVES = {"half": TensorProto.FLOAT16, "brain": TensorProto.BFLOAT16}


def _largest_pair(numbers: Array) -> Array:
    """Of each column, [N]: the largest sum of the magnitudes of numbers of a sign in rows 2 i and 2 i + 1."""
    padded = np.pad(numbers, ((0, len(numbers) % 2), (0, 0)))
    found: Array = np.zeros(numbers.shape[1], np.float32)
    for part in (np.maximum(padded, 0), np.maximum(-padded, 0)):
        found = np.maximum(found, (part[0::2] + part[1::2]).max(0))
    return found


def _scales(largest: Array) -> NDArray[np.float32]:
    """Of groups whose largest numbers are these; 1 for a group of zeros, or of numbers too small to be divided."""
    scale = (largest / LEVELS).astype(np.float32)
    return np.where(scale >= np.finfo(np.float32).tiny, scale, np.float32(1.0))


def _brain(numbers: Array) -> NDArray[np.uint16]:
    """The bits of the nearest bf16, which numpy does not know: the upper half of a float32, ties to even."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


class _Rewriter:
    """Rewrites linear ops one by one in a copy of a graph; shared inputs are quantized once."""

    def __init__(self, model: onnx.ModelProto, products: Sequence[Product], guarded: bool = False) -> None:
        self.guarded = guarded
        self.model = copy.deepcopy(model)
        self.products = {product.node: product for product in products}
        self.constants = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.added: dict[str, TensorProto] = {}
        self.made: dict[tuple[str, ...], str] = {}
        self.here: list[onnx.NodeProto] = []

    def run(self, rewrite: Callable[[_Rewriter, Product], None]) -> onnx.ModelProto:
        graph, nodes = self.model.graph, []
        for node in self.model.graph.node:
            if node.name not in self.products:
                nodes.append(node)
                continue
            self.node, self.here = node, []
            rewrite(self, self.products[node.name])
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

    # -- forms of one product ------------------------------------------------------------------------------------

    def dequantised_weight(self, product: Product) -> None:
        if (name := self.made.get(("dequantised", product.weight))) is None:
            weight, scale = self._int8(product)
            name = f"{product.weight}.dequantised"
            self._node("DequantizeLinear", [weight, scale], name, axis=1)
            self.made["dequantised", product.weight] = name
        self.node.input[1] = name

    def quantised_activation(self, product: Product, scale: float, zero: np.int8 | np.uint8) -> None:
        key = ("quantised", product.activation, str(scale), str(zero.dtype), str(zero))
        if key not in self.made:
            stem = f"{product.node}.activation"
            constants = [
                self._constant(f"{stem}.scale", np.float32(scale)),
                self._constant(f"{stem}.zero", zero),
            ]
            self._node("QuantizeLinear", [product.activation, *constants], f"{stem}.quantised")
            self._node("DequantizeLinear", [f"{stem}.quantised", *constants], f"{stem}.dequantised")
            self.made[key] = f"{stem}.dequantised"
        self.node.input[0] = self.made[key]

    def integer_product(self, product: Product) -> None:
        weight, scale = self._int8(product)
        key = ("dynamic", product.activation)
        stem = self.made.get(key, f"{product.node}.activation")
        if key not in self.made:
            outputs = [f"{stem}.quantised", f"{stem}.scale", f"{stem}.zero"]
            self.here.append(
                helper.make_node(
                    "DynamicQuantizeLinear", [product.activation], outputs, f"{stem}/DynamicQuantizeLinear"
                )
            )
            self.made[key] = stem
        zero = self._constant("weight.zero", np.int8(0))
        inputs = [f"{stem}.quantised", weight, f"{stem}.zero", zero]
        self._node("MatMulInteger", inputs, f"{product.node}.integer")
        self._node("Cast", [f"{product.node}.integer"], f"{product.node}.float", to=TensorProto.FLOAT)
        self._node("Mul", [f"{stem}.scale", scale], f"{product.node}.scale")
        self._node("Mul", [f"{product.node}.float", f"{product.node}.scale"], self.node.output[0])

    def integer_lstm(self, product: Product) -> None:
        """Of an operator with matrices [directions, 4 H, D]; those in int8 are [directions, D, 4 H]."""
        inputs = [*self.node.input, *[""] * (8 - len(self.node.input))]
        scales = []
        for place in (1, 2):
            name = inputs[place]
            numbers = numpy_helper.to_array(self.constants[name])
            parts = [quantised_weight(matrix.T, self.guarded) for matrix in numbers]
            inputs[place] = self._constant(f"{name}.int8", np.stack([levels for levels, _ in parts]))
            scale = np.stack([scale for _, scale in parts])
            scales.append(self._constant(f"{name}.scale", scale))
            scales.append(self._constant(f"{name}.zero", np.zeros(scale.shape, np.int8)))
        node = helper.make_node(
            "DynamicQuantizeLSTM", [*inputs, *scales], list(self.node.output), product.node, domain="com.microsoft"
        )
        node.attribute.extend(item for item in self.node.attribute if item.name != "layout")
        self.here.append(node)

    def blocked_product(self, product: Product, block: int) -> None:
        numbers = numpy_helper.to_array(self.constants[product.weight])
        depth, columns = numbers.shape
        count = -(-depth // block)
        padded = np.zeros((columns, count * block), np.float32)
        padded[:, :depth] = numbers.T
        parts = padded.reshape(columns, count, block)
        scale = _scales(np.abs(parts).max(-1))
        levels = np.clip(np.rint(parts / scale[..., None]), -LEVELS, LEVELS) + 128  # stored without a sign
        weight = self._constant(f"{product.weight}.blocks", levels.astype(np.uint8))
        scales = self._constant(f"{product.weight}.scales", scale.reshape(-1))
        self._node(
            "MatMulNBits",
            [product.activation, weight, scales],
            self.node.output[0],
            domain="com.microsoft",
            K=depth,
            N=columns,
            bits=8,
            block_size=block,
            accuracy_level=4,
        )

    def half_product(self, product: Product, kind: int) -> None:
        key = ("half", product.activation)
        if key not in self.made:
            self.made[key] = f"{product.node}.activation.half"
            self._node("Cast", [product.activation], self.made[key], to=kind)
        weight = self._half(product, kind, "half")
        self._node("MatMul", [self.made[key], weight], f"{product.node}.half")
        self._node("Cast", [f"{product.node}.half"], self.node.output[0], to=TensorProto.FLOAT)

    def rows_of_halves(self, table: Product, kind: int) -> None:
        self._node("Gather", [self._half(table, kind, "rows"), table.activation], f"{table.node}.half")
        self._node("Cast", [f"{table.node}.half"], self.node.output[0], to=TensorProto.FLOAT)

    def rows_of_bytes(self, table: Product) -> None:
        numbers, scale = quantised_weight(numpy_helper.to_array(self.constants[table.weight]).T)
        weight = self._constant(f"{table.weight}.rows", np.ascontiguousarray(numbers.T))
        scales = self._constant(f"{table.weight}.rows.scale", scale[:, None])
        self._node("Gather", [weight, table.activation], f"{table.node}.bytes")
        self._node("Cast", [f"{table.node}.bytes"], f"{table.node}.float", to=TensorProto.FLOAT)
        self._node("Gather", [scales, table.activation], f"{table.node}.scale")
        self._node("Mul", [f"{table.node}.float", f"{table.node}.scale"], self.node.output[0])

    # -- parts ---------------------------------------------------------------------------------------------------

    def _int8(self, product: Product) -> tuple[str, str]:
        """Names of the matrix in int8 and of its scales."""
        numbers, scale = quantised_weight(numpy_helper.to_array(self.constants[product.weight]), self.guarded)
        return (
            self._constant(f"{product.weight}.int8", numbers),
            self._constant(f"{product.weight}.scale", scale),
        )

    def _half(self, product: Product, kind: int, suffix: str) -> str:
        """Name of the matrix in half precision."""
        name = f"{product.weight}.{suffix}"
        if name not in self.added:
            numbers = numpy_helper.to_array(self.constants[product.weight])
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
