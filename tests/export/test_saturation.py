"""Products in int8 on whatever processor this is: no sum of two of them is cut off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions

from nsm.bundle import Bundle
from nsm.errors import DeviceUnavailableError
from nsm.export import guard
from nsm.export.low_precision import write_graphs
from nsm.export.weights import load_shared
from nsm.manifest import Artifact
from nsm.quantization import forms
from nsm.quantization.policy import LEVELS, POLICIES, SAFE_LEVELS, find_policy
from nsm.quantization.products import products_of
from nsm.runtimes import processor
from nsm.runtimes.opening import open_artifact
from nsm.runtimes.targets import find_target
from nsm.trace import Array

TOKENS, DEPTH, WIDTH = 16, 256, 64


def model_of(matrix: Array) -> onnx.ModelProto:
    shapes = {"x": [1, TOKENS, DEPTH], "y": [1, TOKENS, WIDTH]}
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    graph = helper.make_graph([node], "graph", [x], [y], [numpy_helper.from_array(matrix, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def exactly(model: onnx.ModelProto, x: Array) -> Array:
    """In floating point, operation by operation: quantised numbers, but no product in int8."""
    options = SessionOptions()
    options.graph_optimization_level = GraphOptimizationLevel.ORT_DISABLE_ALL
    session = InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


ACTIVATIONS = ("all of a sign", "all the largest", "of both signs", "alike in a token")


def activations(kind: str, random: np.random.Generator) -> Array:
    shape = (1, TOKENS, DEPTH)
    return {
        "all of a sign": np.abs(random.standard_normal(shape)) + 1,
        "all the largest": np.full(shape, 2.0),
        "of both signs": random.standard_normal(shape),
        "alike in a token": random.standard_normal((1, TOKENS, 1)) + 0.1 * random.standard_normal(shape),
    }[kind].astype(np.float32)


def matrix_of(random: np.random.Generator) -> Array:
    """With columns all of whose numbers are the largest, which is the worst."""
    matrix = (random.standard_normal((DEPTH, WIDTH)) * 0.1).astype(np.float32)
    matrix[:, 0], matrix[:, 1] = 0.3, -0.3
    return matrix


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_openvino_adds_up_what_the_graph_says(kind: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    model, x = model_of(matrix_of(random)), activations(kind, random)
    scale = float(np.abs(x).max() / LEVELS)
    low = forms.static(model, products_of(model), {item.key: scale for item in products_of(model)}, SAFE_LEVELS)
    onnx.save(low, str(tmp_path / "m.onnx"))
    compiled = openvino.Core().compile_model(tmp_path / "m.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    wanted = exactly(low, x)
    np.testing.assert_allclose(compiled([x])[0], wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_onnx_runtime_adds_up_what_the_graph_says(kind: str) -> None:
    random = np.random.default_rng(0)
    matrix = matrix_of(random)
    model, x = model_of(matrix), activations(kind, random)
    low = forms.dynamic(model, products_of(model), SAFE_LEVELS)
    given = InferenceSession(low.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    levels, scales = forms.quantised_weight(matrix, SAFE_LEVELS)
    # DynamicQuantizeLinear, by the ONNX standard
    low_end, high_end = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = np.float32((high_end - low_end) / 255)
    zero = np.clip(np.rint(-low_end / scale), 0, 255)
    quantised = np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.int64)
    wanted = ((quantised - int(zero)) @ levels.astype(np.int64)) * (scale * scales)
    np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_matrices_stay_small_wherever_a_processor_adds_products_of_bytes() -> None:
    found = {key: policy for key, policy in POLICIES.items() if policy.form in ("static", "dynamic")}
    for (target, _), policy in found.items():
        assert policy.levels == (SAFE_LEVELS if "cpu" in find_target(target).devices else LEVELS)


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_for_processors_with_dot_products_they_have_all_their_levels(target: str) -> None:
    policy = find_policy(target, "int8", "CPU-DOT")
    assert policy is not None
    assert policy.levels == LEVELS


# -- the processor -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("processor : 0\nflags : fpu sse2 avx2 fma\n", False),
        ("processor : 0\nflags : fpu avx512f avx512_vnni\n", True),
        ("processor : 0\nflags : fpu avx2 avx_vnni\n", True),
        ("processor : 0\nFeatures : fp asimd asimddp\n", True),
        ("processor : 0\nFeatures : fp asimd\n", False),
        ("processor : 0\n", None),
    ],
)
def test_what_a_processor_says_of_itself(
    text: str, found: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "cpuinfo")
    assert processor.int8_dot_products() is found
    if found is False:
        processor.require_device("cpu", "int8")
        processor.require_device("cpu-dot", "fp32")
        with pytest.raises(DeviceUnavailableError, match=r"--device cpu-dot.*none: .*nsm build BUNDLE"):
            processor.require_device("cpu-dot", "int8")
    else:
        processor.require_device("cpu-dot", "int8")


def test_elsewhere_than_on_linux_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "absent")
    assert processor.int8_dot_products() is None


@pytest.mark.parametrize(
    ("device", "dot", "named"),
    [("cpu", True, True), ("cpu", False, False), ("cpu", None, False), ("cpu-dot", True, False)],
)
def test_the_more_exact_device_is_named_where_it_would_do(
    device: str, dot: bool | None, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = find_policy("onnxruntime", "int8", device)
    assert policy is not None
    monkeypatch.setattr(guard, "int8_dot_products", lambda: dot)
    maker = object.__new__(guard.Maker)
    maker.policy = policy
    notes = maker._notes(Artifact("onnxruntime", device, "int8", "int8", (), {"status": "passed"}, ("one",)))
    assert notes[:2] == ("one", policy.note)
    assert any("--device cpu-dot is more exact" in note for note in notes) == named


@pytest.mark.parametrize(("device", "levels"), [("cpu", SAFE_LEVELS), ("cpu-dot", LEVELS)])
def test_the_levels_reach_the_graphs(device: str, levels: int, int8_bundle: Path, tmp_path: Path) -> None:
    policy, spec = find_policy("onnxruntime", "int8", device), Bundle(int8_bundle).manifest.spec
    assert policy is not None
    write_graphs(int8_bundle, tmp_path / "low", spec, policy, None)
    model = load_shared(tmp_path / "low" / "step.onnx")
    matrices = [numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == TensorProto.INT8 and t.dims]
    assert matrices
    assert {int(np.abs(matrix).max()) for matrix in matrices} == {levels}


def test_no_device_that_is_asked_for_gets_around_the_processor(
    int8_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An artifact is what it was built for."""
    bundle = Bundle(int8_bundle)
    artifact = replace(bundle.artifact("openvino"), device="cpu-dot")
    monkeypatch.setattr(processor, "int8_dot_products", lambda: False)
    for device in (None, "cpu", "cpu-dot"):
        with pytest.raises(DeviceUnavailableError, match="built for processors with VNNI"):
            open_artifact(bundle, artifact, device)
    open_artifact(bundle, bundle.artifact("openvino"), "cpu").close()
