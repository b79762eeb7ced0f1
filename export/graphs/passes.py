"""Passes that simplify an exported graph for every backend.

1. Fold constants: values that depend on weights only (transposed and joined matrices, tables, masks).
2. Merge equal operations on equal inputs, such as those of the layers on the lanes' counters.
3. Replace a `Gemm` with a constant matrix by `MatMul` and `Add`, so that linear ops have one form for quantization.
   Backends fuse the two again.
4. Remove unused nodes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
from onnxscript import optimizer

# No limit: joined weights may be large, but computing them in each step is never faster.
_ANY_SIZE = 1 << 40


def optimise(model: onnx_ir.Model) -> None:
    """Run all passes, in place."""
    optimizer.optimize_ir(model, input_size_limit=_ANY_SIZE, output_size_limit=_ANY_SIZE)
    CommonSubexpressionEliminationPass()(model)
    _split_gemms(model.graph)
    RemoveUnusedNodesPass()(model)


def _split_gemms(graph: onnx_ir.Graph) -> None:
    for node in list(graph):
        if node.op_type != "Gemm" or node.domain or not _is_plain(node):
            continue
        x, weight, *bias = node.inputs
        assert x is not None
        assert weight is not None
        matrix = weight
        if node.attributes.get_int("transB", 0):
            assert weight.const_value is not None
            name = f"{weight.name}.transposed"
            if name not in graph.initializers:
                array = np.ascontiguousarray(weight.const_value.numpy().T)
                tensor = onnx_ir.tensor(array, name=name)
                graph.register_initializer(
                    onnx_ir.Value(name=name, const_value=tensor, shape=onnx_ir.Shape(array.shape), type=weight.type)
                )
            matrix = graph.initializers[name]
        product = onnx_ir.node("MatMul", [x, matrix], metadata_props=dict(node.metadata_props))
        made = [product]
        if bias and bias[0] is not None:
            made.append(onnx_ir.node("Add", [product.outputs[0], bias[0]], metadata_props=dict(node.metadata_props)))
            product.outputs[0].type, product.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        last = made[-1].outputs[0]
        last.type, last.shape = node.outputs[0].type, node.outputs[0].shape
        onnx_ir.convenience.replace_nodes_and_values(graph, node, [node], made, [node.outputs[0]], [last])


def _is_plain(node: onnx_ir.Node) -> bool:
    """Whether a Gemm is x W + b, or x W^T + b, with a constant W."""
    weight, attributes = node.inputs[1], node.attributes
    scaled = attributes.get_float("alpha", 1.0) != 1.0 or attributes.get_float("beta", 1.0) != 1.0
    constant = weight is not None and weight.is_initializer() and weight.const_value is not None
    return constant and not scaled and not attributes.get_int("transA", 0)
