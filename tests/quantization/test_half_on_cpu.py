"""Why ONNX Runtime on processors has no fp16 or bf16; where one of these fails, there may be something to gain."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto

from nsm.quantization import rewrite
from nsm.quantization.linear_ops import linear_ops_of
from tests.quantization.graphs import make_graph, product_node

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="on Arm ONNX Runtime has linear ops in fp16"
)


def half(kind: int) -> bytes:
    """Of y = x @ W + x, the form that TensorRT and CUDA get."""
    weight = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)
    shape = {"x": [1, 128]}
    nodes = [product_node("p/MatMul", "x", "W", "z"), onnx.helper.make_node("Add", ["x", "z"], ["y"])]
    model = make_graph(nodes, shape, {"y": [1, 128]}, {"W": weight})
    low: onnx.ModelProto = rewrite.half(model, linear_ops_of(model), kind)
    assert any(tensor.data_type == kind for tensor in low.graph.initializer)
    content: bytes = low.SerializeToString()
    return content


def test_products_in_fp16_become_products_in_fp32_again(tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(half(TensorProto.FLOAT16), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath).graph
    (weight,) = (tensor for tensor in graph.initializer if list(tensor.dims) == [128, 128])
    assert weight.data_type == TensorProto.FLOAT


def test_products_in_bf16_are_refused() -> None:
    with pytest.raises(Exception, match=r"Could not find an implementation for MatMul"):
        ort.InferenceSession(half(TensorProto.BFLOAT16), providers=["CPUExecutionProvider"])
