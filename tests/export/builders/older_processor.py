"""How far a backend's linear op in int8 is off what the graph says, on the processor that it finds.

python tests/export/builders/older_processor.py {static,asymmetric,dynamic} {saturation-safe,bare}

Prints the largest error over `ACTIVATIONS`. With ONEDNN_MAX_CPU_ISA=AVX2 OpenVINO takes the kernels of processors that
have no more, and under `qemu-x86_64-static -cpu Haswell` ONNX Runtime does.
"""

from __future__ import annotations

import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions

from nsm.quantization import rewrite
from nsm.quantization.calibration_data import Asymmetric
from nsm.quantization.linear_ops import linear_ops_of
from nsm.quantization.policy import LEVELS
from nsm.trace import Array

TOKENS, DEPTH, WIDTH = 16, 256, 64
ACTIVATIONS = ("all of a sign", "all the largest", "of both signs", "alike in a token")


def error(scheme: str, kind: str, saturation_safe: bool) -> float:
    """Of OpenVINO ("static", "asymmetric") or ONNX Runtime ("dynamic"), relative to the largest output."""
    random = np.random.default_rng(0)
    matrix, x = _matrix(random), _activations(kind, random)
    model = _model(matrix)
    if scheme == "dynamic":
        low = rewrite.dynamic(model, linear_ops_of(model), saturation_safe)
        found = InferenceSession(low.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        wanted = _dynamically(x, *rewrite.quantised_weight(matrix, saturation_safe))
    else:
        import io

        import openvino  # which an emulated processor need not be able to load

        (linear_op,) = linear_ops_of(model)
        scales = {linear_op.key: float(np.abs(x).max() / LEVELS)}
        asymmetric = {linear_op.key: _asymmetric(x)} if scheme == "asymmetric" else {}
        low = rewrite.static(model, [linear_op], scales, saturation_safe, asymmetric)
        network = openvino.convert_model(io.BytesIO(low.SerializeToString()))
        compiled = openvino.Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found, wanted = compiled([x])[0], _in_float(low, x)
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def _model(matrix: Array) -> onnx.ModelProto:
    shapes = {"x": [1, TOKENS, DEPTH], "y": [1, TOKENS, WIDTH]}
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    graph = helper.make_graph([node], "graph", [x], [y], [numpy_helper.from_array(matrix, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _matrix(random: np.random.Generator) -> Array:
    """With columns all of whose numbers are the largest, which is the worst, and with large neighbours in others."""
    matrix = (random.standard_normal((DEPTH, WIDTH)) * 0.1).astype(np.float32)
    matrix[:, 0], matrix[:, 1] = 0.3, -0.3
    matrix[6:8, 2], matrix[7:9, 3], matrix[8, 4] = 1.0, 1.0, -1.0
    return matrix


def _activations(kind: str, random: np.random.Generator) -> Array:
    shape = (1, TOKENS, DEPTH)
    return {
        "all of a sign": np.abs(random.standard_normal(shape)) + 1,
        "all the largest": np.full(shape, 2.0),
        "of both signs": random.standard_normal(shape),
        "alike in a token": random.standard_normal((1, TOKENS, 1)) + 0.1 * random.standard_normal(shape),
    }[kind].astype(np.float32)


def _asymmetric(x: Array) -> Asymmetric:
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = (high - low) / 255
    return Asymmetric(scale, round(-low / scale))


def _in_float(model: onnx.ModelProto, x: Array) -> Array:
    """Operation by operation: quantized numbers, but no linear op in int8."""
    options = SessionOptions()
    options.graph_optimization_level = GraphOptimizationLevel.ORT_DISABLE_ALL
    session = InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def _dynamically(x: Array, numbers: Array, scales: Array) -> Array:
    """With the activations that DynamicQuantizeLinear makes, by the ONNX standard, and exact sums."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = np.float32((high - low) / 255)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    quantised = np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.int64)
    return np.asarray(((quantised - int(zero)) @ numbers.astype(np.int64)) * (scale * scales))


if __name__ == "__main__":
    print(max(error(sys.argv[1], kind, sys.argv[2] == "saturation-safe") for kind in ACTIVATIONS))
