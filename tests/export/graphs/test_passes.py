from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from nsm.export.graphs.passes import optimise

FLOAT = TensorProto.FLOAT


def gemm(*, constant: bool = True, bias: bool = True, **attributes: Any) -> onnx.ModelProto:
    """y = Gemm(x [2, 3], W, b), twice with one W where it is constant."""
    random = np.random.default_rng(0)
    shape = (4, 3) if attributes.get("transB") else (3, 4)
    names = ["W", "b"] if bias else ["W"]
    nodes = [
        helper.make_node("Gemm", ["x", *names], ["y"], "first", **attributes),
        helper.make_node("Gemm", ["x", *names], ["y1"], "second", **attributes),
        helper.make_node("Tanh", ["y1"], ["z"]),
    ]
    rows = [3, 2] if attributes.get("transA") else [2, 3]
    inputs = [helper.make_tensor_value_info("x", FLOAT, rows)]
    inputs += [] if constant else [helper.make_tensor_value_info("W", FLOAT, shape)]
    outputs = [helper.make_tensor_value_info(name, FLOAT, [2, 4]) for name in ("y", "z")]
    weight = numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), "W")
    offset = numpy_helper.from_array(random.standard_normal(4).astype(np.float32), "b")
    graph = helper.make_graph(
        nodes, "g", inputs, outputs, [*([weight] if constant else []), *([offset] if bias else [])]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def passed(model: onnx.ModelProto) -> onnx.ModelProto:
    made = onnx_ir.from_proto(model)
    optimise(made)
    result: onnx.ModelProto = onnx_ir.to_proto(made)
    onnx.checker.check_model(result, full_check=True)
    return result


def run(model: onnx.ModelProto) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString())
    random = np.random.default_rng(1)
    feed = {item.name: random.standard_normal(item.shape).astype(np.float32) for item in session.get_inputs()}
    return [np.asarray(value) for value in session.run(None, feed)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("turned", [0, 1])
def test_a_gemm_with_a_constant_matrix_is_a_product_and_a_sum(bias: bool, turned: int) -> None:
    before = gemm(bias=bias, transB=turned)
    after = passed(before)
    kinds = [node.op_type for node in after.graph.node]
    assert "Gemm" not in kinds
    assert kinds.count("Add") == (kinds.count("MatMul") if bias else 0)
    matrices = [tensor.name for tensor in after.graph.initializer if len(tensor.dims) == 2]
    assert len(matrices) == 1, "the matrix is there once"
    for given, wanted in zip(run(after), run(before), strict=True):
        np.testing.assert_allclose(given, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("attributes", [{"alpha": 0.5}, {"beta": 2.0}, {"transA": 1}, {"constant": False}])
def test_another_gemm_stays(attributes: dict[str, Any]) -> None:
    before = gemm(**attributes)
    after = passed(before)
    assert "Gemm" in [node.op_type for node in after.graph.node]
    for given, wanted in zip(run(after), run(before), strict=True):
        np.testing.assert_allclose(given, wanted, rtol=1e-6, atol=1e-6)


def test_equal_operations_are_done_once_and_what_nothing_needs_is_gone() -> None:
    after = passed(gemm())
    assert [node.op_type for node in after.graph.node].count("MatMul") == 1
