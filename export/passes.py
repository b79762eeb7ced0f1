"""Passes over an exported graph, so that every backend gets the same small one.

1. Constants: what depends on weights alone (transposed and joined matrices, tables, masks) is computed once, here.
2. Equal operations on equal values are done once: what the layers make of the lanes' counters, for instance.
3. Whatever became superfluous is removed.
"""

from __future__ import annotations

import onnx_ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
from onnxscript import optimizer

# Joined weights of a layer may be large; there is no size at which computing them anew at each step is better.
_ANY_SIZE = 1 << 40


def optimise(model: onnx_ir.Model) -> None:
    """Run all passes, in place."""
    optimizer.optimize_ir(model, input_size_limit=_ANY_SIZE, output_size_limit=_ANY_SIZE)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
