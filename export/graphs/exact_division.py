"""Whole numbers are divided as whole numbers.

The exporter writes `torch.div(n, d, rounding_mode=...)` of integers over float32, which is right up to 2^24 only:

    floor   Cast(Floor(Div(Cast(n), d)))
    trunc   Cast(Floor(Abs(Div(Cast(n), d))) * Sign(Div(Cast(n), d)))

With a constant d these become integer operations, which are exact.
"""

from __future__ import annotations

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

_INTEGERS = (onnx_ir.DataType.INT64, onnx_ir.DataType.INT32)


def exact_division(model: onnx_ir.Model) -> None:
    """Replace division over float32 in a graph that torch's exporter wrote and `optimise` went over, in place."""
    graph = model.graph
    for node in list(graph):
        found = _divided(node)
        if found is None:
            continue
        number, divisor, floored = found
        assert number.dtype is not None
        name = f"{node.outputs[0].name}.divisor"
        tensor = onnx_ir.tensor(np.array(divisor, number.dtype.numpy()), name=name)
        constant = onnx_ir.Value(name=name, const_value=tensor, shape=onnx_ir.Shape(()), type=number.type)
        graph.register_initializer(constant)
        made = []
        whole = number
        if floored:  # n - n % d, which d divides: `Mod` has the sign of d
            rest = onnx_ir.node("Mod", [number, constant], metadata_props=dict(node.metadata_props))
            made = [rest, onnx_ir.node("Sub", [number, rest.outputs[0]], metadata_props=dict(node.metadata_props))]
            whole = made[-1].outputs[0]
        made.append(onnx_ir.node("Div", [whole, constant], metadata_props=dict(node.metadata_props)))
        for item in made:
            item.outputs[0].type, item.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        onnx_ir.convenience.replace_nodes_and_values(
            graph, node, [node], made, [node.outputs[0]], [made[-1].outputs[0]]
        )
    RemoveUnusedNodesPass()(model)


def _divided(node: onnx_ir.Node) -> tuple[onnx_ir.Value, int, bool] | None:
    """n, d, and whether the quotient is rounded down, of the last `Cast` of such a division."""
    if node.op_type != "Cast":
        return None
    quotient, floored = None, False
    rounded = _made(node.inputs[0])
    if rounded is not None and rounded.op_type == "Floor":
        quotient, floored = _made(rounded.inputs[0]), True
    elif rounded is not None and rounded.op_type == "Mul":
        magnitude, sign = (_made(value) for value in rounded.inputs)
        if magnitude is not None and sign is not None and (magnitude.op_type, sign.op_type) == ("Floor", "Sign"):
            absolute, quotient = _made(magnitude.inputs[0]), _made(sign.inputs[0])
            if absolute is None or absolute.op_type != "Abs" or absolute.inputs[0] is not sign.inputs[0]:
                return None
    if quotient is None or quotient.op_type != "Div":
        return None
    widened, divisor = _made(quotient.inputs[0]), quotient.inputs[1]
    constant = None if divisor is None else divisor.const_value
    if widened is None or widened.op_type != "Cast" or constant is None or constant.size != 1:
        return None
    number, by = widened.inputs[0], float(constant.numpy().reshape(-1)[0])
    if number is None or number.dtype not in _INTEGERS or number.dtype != node.outputs[0].dtype:
        return None
    return (number, int(by), floored) if by.is_integer() and by else None


def _made(value: onnx_ir.Value | None) -> onnx_ir.Node | None:
    return None if value is None else value.producer()
