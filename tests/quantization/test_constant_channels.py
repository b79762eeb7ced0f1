"""Channels that are constant, or always zero, in what enters a linear op and in its matrix."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession

from nsm.quantization import rewrite
from nsm.quantization.calibration import Range
from nsm.quantization.linear_ops import linear_ops_of
from nsm.quantization.policy import LEVELS
from nsm.trace import Array

DEPTH, WIDTH = 32, 8


@pytest.mark.parametrize("value", [3.0, -0.25, 1e-6])
def test_what_is_constant_is_stood_for_exactly(value: float) -> None:
    found = Range()
    found.add(np.full(100, value, np.float32))
    scale = found.scale()
    level = np.rint(value / scale)
    assert abs(level) <= LEVELS
    assert level * scale == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("scheme", ["static", "dynamic", "block-wise", "weight-only"])
@pytest.mark.parametrize("activations", [0.0, 0.7])
def test_constant_columns_of_a_matrix_give_what_they_should(scheme: str, activations: float) -> None:
    matrix = np.random.default_rng(0).standard_normal((DEPTH, WIDTH)).astype(np.float32)
    matrix[:, 0], matrix[:, 1], matrix[:, 2] = 0.0, 0.5, -2.0
    x = np.full((1, 2, DEPTH), activations, np.float32)
    found = Range()
    found.add(x)
    (got,) = _session(scheme, matrix, found.scale()).run(None, {"x": x})
    assert (got[..., 0] == 0).all()
    np.testing.assert_allclose(got[..., 1:3], (x @ matrix)[..., 1:3], rtol=1e-2)
    np.testing.assert_allclose(got, x @ matrix, atol=2e-2 * max(activations, 1e-9) * DEPTH)


def _session(scheme: str, matrix: Array, scale: float) -> InferenceSession:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, size]) for name, size in (("x", DEPTH), ("y", 8))
    ]
    graph = helper.make_graph([node], "graph", values[:1], values[1:], [numpy_helper.from_array(matrix, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    linear_ops = linear_ops_of(model)
    made: onnx.ModelProto = {
        "static": lambda: rewrite.static(model, linear_ops, {linear_ops[0].key: scale}, saturation_safe=True),
        "dynamic": lambda: rewrite.dynamic(model, linear_ops, saturation_safe=True),
        "block-wise": lambda: rewrite.blocked(model, linear_ops),
        "weight-only": lambda: rewrite.weights_only(model, linear_ops),
    }[scheme]()
    return InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
