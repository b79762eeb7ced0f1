"""`DFT` and `STFT` of constant length, rewritten as a MatMul with a constant matrix.

OpenVINO 2026.4 gives a one-sided `DFT` one axis too many, ignores the axis of `DFT` since operator set 20, and converts
`STFT` in some forms only; TensorRT has neither. Every target multiplies matrices. The rules:

1. `DFT` of an axis with a known size, and a known `dft_length` if it has one, is rewritten, in both directions.
2. `STFT` of a signal with a known length, with constant step, length and window, is rewritten: a Gather of the frames,
   then a MatMul with the window in its matrix.
3. A transform stays as it is if its matrix would have more than `LARGEST` elements, or if it is one-sided and complex
   or inverse, which ONNX does not define.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

LARGEST = 1 << 23
"""Elements of a matrix above which a transform is not rewritten: 32 MB in float32."""

_REAL = (onnx_ir.DataType.FLOAT, onnx_ir.DataType.DOUBLE, onnx_ir.DataType.FLOAT16)


def transforms_as_matmuls(model: onnx_ir.Model) -> bool:
    """Rewrite each `DFT` and `STFT` that the rules of this module allow, in place, in branches and loops too.

    Returns:
        Whether a node was rewritten.
    """
    opset = model.opset_imports.get("", 0)
    rewritten = False
    for node in list(model.graph.all_nodes()):
        made = None
        if node.op_type == "DFT" and not node.domain:
            made = _dft(node, model.graph, opset)
        elif node.op_type == "STFT" and not node.domain:
            made = _stft(node, model.graph)
        if made is None:
            continue
        assert isinstance(node.graph, onnx_ir.Graph)
        made.outputs[0].type, made.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        nodes = _inserted(made, node)
        onnx_ir.convenience.replace_nodes_and_values(
            node.graph, node, [node], nodes, [node.outputs[0]], [made.outputs[0]]
        )
        rewritten = True
    if rewritten:
        RemoveUnusedNodesPass()(model)
    return rewritten


def matrix(length: int, given: int, parts: int, *, inverse: bool, onesided: bool) -> NDArray[np.float64]:
    """The matrix [given * parts, count * 2] of a discrete Fourier transform; real and imaginary parts are interleaved.

    Args:
        length: of the transform.
        given: number of values; those past `length` are cut off, missing ones are zeros.
        parts: 1 for a real input, 2 for a complex one.
        inverse: with the sign of the exponent changed, and divided by `length`.
        onesided: the first `length // 2 + 1` frequencies only; else all.
    """
    count = length // 2 + 1 if onesided else length
    turns = np.outer(np.arange(given), np.arange(count)) % length / length
    waves = np.exp((2j if inverse else -2j) * np.pi * turns) / (length if inverse else 1)
    waves[length:] = 0
    made = np.zeros((given, parts, count, 2))
    made[:, 0] = np.stack([waves.real, waves.imag], -1)
    if parts == 2:  # i (a + b i) = -b + a i
        made[:, 1] = np.stack([-waves.imag, waves.real], -1)
    return made.reshape(given * parts, count * 2)


def _dft(node: onnx_ir.Node, main: onnx_ir.Graph, opset: int) -> onnx_ir.Node | None:
    """The last node of a `DFT` [..., N, ..., parts] as Transpose, Reshape, MatMul, Reshape, Transpose."""
    x = node.inputs[0]
    assert x is not None
    if x.shape is None or x.dtype not in _REAL:
        return None
    rank = len(x.shape)
    axis = node.attributes.get_int("axis", 1) if opset < 20 else _integer(node, 2, -2)
    if axis is None or not -rank <= axis < rank - 1:
        return None
    axis %= rank
    given, parts = x.shape[axis], x.shape[-1]
    if not isinstance(given, int) or not isinstance(parts, int):
        return None
    length = _integer(node, 1, given)
    inverse, onesided = bool(node.attributes.get_int("inverse", 0)), bool(node.attributes.get_int("onesided", 0))
    if length is None or not _allowed(length, given, parts, inverse=inverse, onesided=onesided):
        return None
    values = matrix(length, given, parts, inverse=inverse, onesided=onesided)
    lead = [0] * (rank - 2)  # Reshape copies these sizes
    order = [index for index in range(rank - 1) if index != axis]
    build = _Builder(node, main)
    last = build("Transpose", x, perm=[*order, axis, rank - 1]) if axis != rank - 2 else x
    last = build("Reshape", last, build.constant("shape", np.array([*lead, given * parts])))
    last = build("MatMul", last, build.constant("matrix", values.astype(x.dtype.numpy())))
    last = build("Reshape", last, build.constant("pairs", np.array([*lead, values.shape[1] // 2, 2])))
    if axis != rank - 2:
        back = [*range(axis), rank - 2, *range(axis, rank - 2), rank - 1]
        last = build("Transpose", last, perm=back)
    return last.producer()


def _stft(node: onnx_ir.Node, main: onnx_ir.Graph) -> onnx_ir.Node | None:
    """The last node of an `STFT` [batch, length(, parts)] as Gather, Reshape, MatMul, Reshape."""
    signal = node.inputs[0]
    assert signal is not None
    if signal.shape is None or signal.dtype not in _REAL or len(signal.shape) not in (2, 3):
        return None
    given, parts = signal.shape[1], signal.shape[2] if len(signal.shape) == 3 else 1
    step, window = _integer(node, 1, None), _constant(node, 2)
    length = _integer(node, 3, None if window is None else window.size)
    if not isinstance(given, int) or not isinstance(parts, int) or not step or not length or length > given:
        return None
    has_window = len(node.inputs) > 2 and node.inputs[2] is not None
    onesided = bool(node.attributes.get_int("onesided", 1))
    if has_window and (window is None or window.size != length):
        return None
    if not _allowed(length, length, parts, inverse=False, onesided=onesided):
        return None
    values = matrix(length, length, parts, inverse=False, onesided=onesided)
    if window is not None:
        values *= np.repeat(window.reshape(-1), parts)[:, None]
    starts = np.arange(0, given - length + 1, step)
    build = _Builder(node, main)
    frames = build("Gather", signal, build.constant("frames", starts[:, None] + np.arange(length)), axis=1)
    rows = build("Reshape", frames, build.constant("shape", np.array([0, 0, length * parts])))
    spectrum = build("MatMul", rows, build.constant("matrix", values.astype(signal.dtype.numpy())))
    pairs = build.constant("pairs", np.array([0, 0, values.shape[1] // 2, 2]))
    return build("Reshape", spectrum, pairs).producer()


def _allowed(length: int, given: int, parts: int, *, inverse: bool, onesided: bool) -> bool:
    count = length // 2 + 1 if onesided else length
    defined = parts in (1, 2) and length > 0 and not (onesided and (inverse or parts == 2))
    return defined and given * parts * count * 2 <= LARGEST


class _Builder:
    """Makes the nodes that replace one node, with its name before theirs."""

    def __init__(self, node: onnx_ir.Node, main: onnx_ir.Graph) -> None:
        self._node = node
        self._main = main
        self._stem = node.name or node.outputs[0].name
        self._count = 0

    def __call__(self, op_type: str, *inputs: onnx_ir.Value, **attributes: int | Sequence[int]) -> onnx_ir.Value:
        self._count += 1
        name = f"{self._stem}/{op_type}.{self._count}"
        props = dict(self._node.metadata_props)
        made = onnx_ir.node(op_type, list(inputs), dict(attributes), name=name, metadata_props=props)
        made.outputs[0].name = name
        made.outputs[0].type = inputs[0].type
        return made.outputs[0]

    def constant(self, name: str, array: NDArray[np.generic]) -> onnx_ir.Value:
        """An initializer of the main graph; branches and loops read it from outside."""
        tensor = onnx_ir.tensor(array, name=f"{self._stem}/{name}")
        shape = onnx_ir.Shape(array.shape)
        value = onnx_ir.Value(name=tensor.name, const_value=tensor, shape=shape, type=onnx_ir.TensorType(tensor.dtype))
        self._main.register_initializer(value)
        return value


def _inserted(last: onnx_ir.Node, replaced: onnx_ir.Node) -> list[onnx_ir.Node]:
    """The chain of new nodes that ends in `last`, in order."""
    nodes = [last]
    while (first := nodes[0].inputs[0]) is not replaced.inputs[0]:
        assert first is not None
        producer = first.producer()
        assert producer is not None
        nodes.insert(0, producer)
    return nodes


def _constant(node: onnx_ir.Node, index: int) -> NDArray[np.generic] | None:
    """The value of a constant input; None if it is absent or computed."""
    value = node.inputs[index] if index < len(node.inputs) else None
    tensor = None if value is None else onnx_ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _integer(node: onnx_ir.Node, index: int, default: int | None) -> int | None:
    """A constant whole number; `default` if the input is absent, None if it is computed."""
    if index >= len(node.inputs) or node.inputs[index] is None:
        return default
    array = _constant(node, index)
    return None if array is None or math.prod(array.shape) != 1 else int(array.reshape(-1)[0])
