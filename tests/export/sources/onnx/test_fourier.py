"""`DFT` and `STFT` as MatMuls give the values of numpy's transforms, on every runtime that is here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import openvino
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import nsm
from nsm.export.options import ExportOptions
from nsm.export.pipeline import export
from nsm.export.sources.onnx import fourier
from nsm.export.sources.onnx.fourier import matrix, transforms_as_matmuls

Array = NDArray[np.float32]


def graph(node: onnx.NodeProto, x: Array, opset: int, constants: dict[str, NDArray[np.generic]]) -> onnx_ir.Model:
    proto = helper.make_model(
        helper.make_graph(
            [node],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=9,
    )
    return onnx_ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def dft(x: Array, opset: int, axis: int, length: int | None, **attributes: int) -> onnx_ir.Model:
    constants = {} if length is None else {"length": np.array(length)}
    inputs = ["x", *constants]
    if opset < 20:
        attributes["axis"] = axis
    else:
        constants["axis"] = np.array(axis)
        inputs += [""] * (2 - len(inputs)) + ["axis"]
    node = helper.make_node("DFT", inputs, ["y"], "spectrum", **attributes)  # type: ignore[arg-type]
    return graph(node, x, opset, constants)


def operators(model: onnx_ir.Model) -> set[str]:
    return {node.op_type for node in model.graph.all_nodes()}


def outputs(model: onnx_ir.Model, x: Array) -> list[Array]:
    """Of ONNX Runtime and OpenVINO."""
    file = onnx_ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [session.run(None, {"x": x})[0], compiled([x])[0]]


def pairs(values: NDArray[np.complexfloating]) -> Array:
    return np.stack([values.real, values.imag], -1).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(
    opset=st.sampled_from([17, 20]),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    size=st.integers(1, 9),
    place=st.integers(0, 2),
    length=st.none() | st.integers(1, 12),
    kind=st.sampled_from(["real", "onesided", "complex", "inverse", "real inverse"]),
    backwards=st.booleans(),
)
def test_a_dft_equals_numpy(
    opset: int, sizes: list[int], size: int, place: int, length: int | None, kind: str, backwards: bool
) -> None:
    axis = place % (len(sizes) + 1)
    parts = 2 if kind in ("complex", "inverse") else 1
    inverse, onesided = "inverse" in kind, kind == "onesided"
    sizes = [*sizes[:axis], size, *sizes[axis:]]
    x = np.random.default_rng(size).standard_normal((*sizes, parts)).astype(np.float32)
    rank = x.ndim
    model = dft(x, opset, axis - rank if backwards else axis, length, inverse=inverse, onesided=onesided)
    assert transforms_as_matmuls(model)
    assert operators(model) <= {"Transpose", "Reshape", "MatMul"}
    values = x[..., 0] if parts == 1 else x[..., 0] + 1j * x[..., 1]
    spectrum = (np.fft.ifft if inverse else np.fft.fft)(values, length, axis)
    if onesided:
        spectrum = np.take(spectrum, range((length or size) // 2 + 1), axis)
    for output in outputs(model, x):
        np.testing.assert_allclose(output, pairs(spectrum), atol=2e-5)


@pytest.mark.parametrize("onesided", [False, True])
@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("rank", [2, 3])
def test_an_stft_equals_numpy(rank: int, window: bool, onesided: bool) -> None:
    x = np.random.default_rng(0).standard_normal((2, 43, 1)[:rank]).astype(np.float32)
    shape = np.hanning(16).astype(np.float32) if window else np.ones(16, np.float32)
    constants: dict[str, NDArray[np.generic]] = {"step": np.array(8), "length": np.array(16)}
    if window:
        constants["window"] = shape
    node = helper.make_node(
        "STFT", ["x", "step", "window" if window else "", "length"], ["y"], "spectrum", onesided=onesided
    )
    model = graph(node, x, 17, constants)
    assert transforms_as_matmuls(model)
    frames = np.stack([x.reshape(2, 43)[:, start : start + 16] * shape for start in (0, 8, 16, 24)], 1)
    spectrum = np.fft.rfft(frames) if onesided else np.fft.fft(frames)
    for output in outputs(model, x):
        np.testing.assert_allclose(output, pairs(spectrum), atol=2e-5)


def test_a_transform_that_onnx_does_not_define_or_that_is_too_large_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.zeros((1, 8, 2), np.float32)
    assert not transforms_as_matmuls(dft(x, 17, 1, None, onesided=1))
    assert not transforms_as_matmuls(dft(x[..., :1], 17, 1, None, onesided=1, inverse=1))
    monkeypatch.setattr(fourier, "LARGEST", 7)
    model = dft(x, 17, 1, None)
    assert not transforms_as_matmuls(model)
    assert operators(model) == {"DFT"}


def test_a_transform_in_a_branch_is_rewritten() -> None:
    branches = {
        name: helper.make_graph(
            [helper.make_node("DFT", ["x"], [name], axis=1, inverse=index)],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 6, 2])],
        )
        for index, name in enumerate(("then_branch", "else_branch"))
    }
    x = np.random.default_rng(0).standard_normal((1, 6, 2)).astype(np.float32)
    model = graph(helper.make_node("If", ["choice"], ["y"], **branches), x, 17, {"choice": np.array(False)})
    assert transforms_as_matmuls(model)
    assert operators(model) == {"If", "Reshape", "MatMul"}
    for output in outputs(model, x):
        np.testing.assert_allclose(output, pairs(np.fft.ifft(x[..., 0] + 1j * x[..., 1])), atol=1e-6)


def test_the_matrix_cuts_off_and_fills_up() -> None:
    long, short = np.arange(9.0), np.arange(3.0)
    for values in (long, short):
        made = (values @ matrix(6, len(values), 1, inverse=False, onesided=True)).reshape(-1, 2)
        np.testing.assert_allclose(made[:, 0] + 1j * made[:, 1], np.fft.rfft(values, 6), atol=1e-12)


def spectrogram(path: Path) -> Path:
    """A stream of frames of 8 samples: the power spectrum of the last frame mixed with the sum of all."""
    nodes = [
        helper.make_node("Mul", ["past", "leak"], ["rest"]),
        helper.make_node("Add", ["x", "rest"], ["next"]),
        helper.make_node("Unsqueeze", ["next", "last"], ["wide"]),
        helper.make_node("DFT", ["wide", "", "axis"], ["spectrum"], onesided=1),
        helper.make_node("Mul", ["spectrum", "spectrum"], ["squares"]),
        helper.make_node("ReduceSum", ["squares", "last"], ["y"], keepdims=0),
    ]
    ports = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 8]) for name in ("x", "past")}
    constants = {"last": np.array([2]), "axis": np.array(1), "leak": np.array(0.5, np.float32)}
    made = helper.make_graph(
        nodes,
        "g",
        list(ports.values()),
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", s]) for n, s in (("y", 5), ("next", 8))],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_file_with_a_one_sided_dft_streams_as_numpy_does(target: str, tmp_path: Path) -> None:
    output = tmp_path / "m.nsm"
    export(
        spectrogram(tmp_path / "m.onnx"), ExportOptions(targets=[target], output=output, states=["past=next"], batch=2)
    )
    frames = np.random.default_rng(1).standard_normal((2, 40, 8)).astype(np.float32)
    past, expected = np.zeros((2, 8)), []
    for frame in frames.swapaxes(0, 1):
        past = frame + past * 0.5
        expected.append(np.abs(np.fft.rfft(past)) ** 2)
    with nsm.open(output, target=target) as session:
        np.testing.assert_allclose(session.feed(frames)["y"], np.stack(expected, 1), rtol=1e-4, atol=1e-5)
