from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import QuantType, quantize_dynamic

from nsm.bundle import Bundle
from nsm.errors import InputError, MissingDependencyError, UnsupportedError
from nsm.manifest import file_record
from nsm.results import Quantiles
from nsm.runtimes.backends.onnxruntime import load
from nsm.runtimes.opening.artifacts import open_artifact
from nsm.runtimes.parity.bisection.operation import compare_probes, feeds_of, find_operation, first_at_fault
from nsm.runtimes.parity.bisection.probes import Node, onnx_probe, openvino_probe, read_nodes
from nsm.runtimes.parity.bisection.search import bisect, check_bisectable, find_state
from nsm.runtimes.parity.budgets import find_budget
from nsm.runtimes.parity.report import Bisection
from nsm.runtimes.session.session import Session
from nsm.runtimes.targets import TARGETS
from nsm.spec import COUNT
from nsm.trace import Arrays
from tests.runtimes.fake import CHUNK, After, fake_session, fake_trace
from tests.runtimes.half_state import HalfState

FP32 = find_budget("fp32")


def bisected(path: Path, target: str) -> Bisection:
    bundle = Bundle(path)
    artifact = bundle.artifact(target)
    with open_artifact(bundle, artifact) as session:
        found = bisect(bundle, artifact, session, bundle.trace(), FP32)
        assert session.is_fresh()
    json.dumps(found.to_json(), allow_nan=False)
    return found


# -- an operation -------------------------------------------------------------------------------------------------


def change_ir(path: Path, of: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the first weights of more than a few numbers that operations of a type take in OpenVINO's graph."""
    folder = path / "openvino"
    tree = ElementTree.parse(folder / "step.xml")
    layers = {layer.attrib["id"]: layer for layer in tree.iter("layer")}
    takers = {edge.attrib["from-layer"]: layers[edge.attrib["to-layer"]].get("type") for edge in tree.iter("edge")}
    for number, layer in layers.items():
        data = layer.find("data")
        if data is None or layer.get("type") != "Const" or data.get("element_type") != "f32":
            continue
        start, size = int(data.attrib["offset"]), int(data.attrib["size"])
        if takers[number] == of and size >= 1024:
            break
    content = bytearray((folder / "weights.bin").read_bytes())
    content[start : start + size] = change(np.frombuffer(bytes(content[start : start + size]), np.float32)).tobytes()
    (folder / "weights.bin").write_bytes(bytes(content))


def test_the_operation_whose_weights_differ_is_named(bundle_copy: Path) -> None:
    change_ir(bundle_copy, "MatMul", lambda weights: weights * np.float32(1.001))
    found = bisected(bundle_copy, "openvino")
    assert (found.kind, found.op) == ("operation", "MatMul")
    nodes = {node.name: node for node in read_nodes(bundle_copy / "graphs" / "step.onnx")}
    assert found.node is not None
    assert found.name in nodes[found.node].outputs
    assert FP32.one_step_p99 < found.error < 2e-3
    assert found.explanation.startswith("One operation, not accumulation: MatMul")
    assert bisected(bundle_copy, "onnxruntime").kind == "none"


def test_an_operation_that_gives_nan_is_named(bundle_copy: Path) -> None:
    change_ir(bundle_copy, "MatMul", lambda weights: weights * np.float32(np.nan))
    found = bisected(bundle_copy, "openvino")
    assert (found.kind, found.op, found.error) == ("operation", "MatMul", np.inf)
    assert found.to_json()["error"] is None


def test_a_portable_graph_that_is_another_model_is_to_blame_itself(bundle_copy: Path) -> None:
    scale_first_weights(bundle_copy / "graphs" / "step.onnx", 1.001)
    for target in ("onnx", "onnxruntime"):
        found = bisected(bundle_copy, target)
        assert found.kind == "operation"
        assert "The portable graph itself" in found.explanation
        assert found.error > FP32.one_step_p99
        assert found.op is not None


def test_a_portable_graph_that_gives_nan_is_to_blame_itself(bundle_copy: Path) -> None:
    scale_first_weights(bundle_copy / "graphs" / "step.onnx", float("nan"))
    found = bisected(bundle_copy, "onnxruntime")
    assert "The portable graph itself" in found.explanation
    assert found.error == np.inf


def test_an_error_that_vanishes_when_everything_is_in_sight_comes_from_joining(bundle: Bundle) -> None:
    spec, artifact = bundle.manifest.spec, bundle.artifact("onnxruntime")
    files = {entry.name: bundle.path / "graphs" / f"{entry.name}.onnx" for entry in spec.entries}
    runtime = HalfState(load(files, spec, "cpu", 1), ("0.bank",))
    seen: list[tuple[int, int]] = []
    with Session(runtime, spec, bundle.state_init(), bundle.manifest.fingerprint, "onnxruntime") as session:
        progress = lambda done, total: seen.append((done, total))  # noqa: E731
        found = bisect(bundle, artifact, session, bundle.trace(), FP32, progress)
    assert (found.kind, found.name, found.op) == ("operation", "0.bank", None)
    assert "fuses operations" in found.explanation
    assert seen[-1][0] == seen[-1][1] == len(seen)


def scale_first_weights(path: Path, factor: float) -> None:
    """Scale the smaller weights that stand in the graph itself."""
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL and tensor.data_type == onnx.TensorProto.FLOAT:
            scaled = onnx.numpy_helper.to_array(tensor) * np.float32(factor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(scaled, tensor.name))
    onnx.save(model, str(path))


def test_an_artifact_with_a_graph_of_its_own_is_looked_at_there(bundle_copy: Path) -> None:
    portable, own = bundle_copy / "graphs" / "step.onnx", bundle_copy / "onnxruntime" / "step.onnx"
    own.parent.mkdir()
    quantize_dynamic(portable, own, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8)
    bundle = Bundle(bundle_copy)
    artifact = bundle.artifact("onnxruntime")
    files = (*artifact.files, file_record(bundle_copy, "onnxruntime/step.onnx"))
    found = find_operation(bundle, replace(artifact, files=files), bundle.trace().first(4), FP32, 1.0)
    assert found.kind == "operation"
    nodes = {node.name: node for node in read_nodes(portable)}
    assert found.node in nodes
    assert (found.op, nodes[found.node].op) == ("MatMul", "MatMul")  # what int8 rounds first
    assert 1e-3 < found.error < 0.1


def test_every_result_of_a_graph_can_be_compared_with_itself(bundle: Bundle) -> None:
    path = bundle.path / "graphs" / "step.onnx"
    feeds = feeds_of(bundle, bundle.trace())[:3]
    names = {name for node in read_nodes(path) for name in node.outputs}
    plain = onnx_probe(path, optimise=False)
    errors = compare_probes(plain, onnx_probe(path, optimise=True), feeds)
    assert names == set(errors)
    assert max(errors.values()) < FP32.one_step_p99
    converted = compare_probes(plain, openvino_probe(bundle.path / "openvino" / "step.xml", names), feeds)
    assert len(names) / 3 < len(converted) < len(names)
    assert "outputs" in converted


def test_probed_tensors_of_other_shapes_are_not_compared() -> None:
    wanted = {"a": np.ones(2), "b": np.zeros(2), "c": np.ones(2), "d": np.full(2, np.inf)}
    given = {"a": np.full(2, 1.5), "b": np.zeros(2), "c": np.ones(3), "d": np.ones(2), "e": np.ones(1)}
    errors = compare_probes(lambda feeds: wanted, lambda feeds: given, [{}, {}])
    assert errors == {"a": pytest.approx(0.5), "b": 0.0, "d": np.inf}


GRAPH = (
    Node("one", "MatMul", ("x", "w"), ("a",)),
    Node("two", "Add", ("a", "state"), ("b",)),
    Node("three", "Mul", ("a", "x"), ("c",)),
    Node("four", "Tanh", ("b",), ("y",)),
    Node("five", "Exp", ("c",), ("z",)),
)


@pytest.mark.parametrize(
    ("errors", "wanted"),
    [
        ({"a": 0, "b": 1, "c": 0, "y": 1, "z": 0}, ("two", "b", 0)),
        ({"a": 1, "b": 1, "c": 1, "y": 1, "z": 1}, ("one", "a", 0)),
        ({"a": 0, "b": 0, "c": 0, "y": 1, "z": 0}, ("four", "y", 0)),
        ({"a": 0, "y": 1, "z": 0}, ("four", "y", 1)),  # b is not shown
        ({"y": 1, "z": 0}, ("four", "y", 2)),
        ({"a": 0, "b": 0, "c": 1, "y": 0, "z": 0}, None),  # what no end is off for is nobody's fault
        ({"a": 1, "b": 0, "c": 0, "y": 1, "z": 0}, ("four", "y", 0)),  # the error of a did not get through b
    ],
)
def test_the_first_operation_at_fault(errors: dict[str, float], wanted: tuple[str, str, int] | None) -> None:
    found = first_at_fault(GRAPH, errors, ("y", "z"), 0.5)
    assert (None if found is None else (found[0].name, *found[1:])) == wanted


# -- a state ------------------------------------------------------------------------------------------------------


def state_of(after: After, single: float = 1e-6) -> Bisection:
    session = fake_session(after=after)
    seen: list[tuple[int, int]] = []
    worst = Quantiles(single, single, single, "0.bank")
    found = find_state(fake_trace(), session, FP32, worst, (), lambda done, total: seen.append((done, total)))
    assert session.is_fresh()
    assert not seen or seen[-1][0] == seen[-1][1]
    json.dumps(found.to_json(), allow_nan=False)
    return found


def leak(share: float) -> After:
    def after(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
        state["0.bank"] *= 1 + share
        state["0.tail"] *= 1 + 1e-6

    return after


def test_the_state_in_which_errors_add_up_is_named() -> None:
    found = state_of(leak(3.5e-6))
    assert (found.kind, found.name, found.op) == ("state", "0.bank", None)
    assert found.error > FP32.free_run_p99
    assert found.all_replaced is not None
    assert found.all_replaced <= found.replaced["0.bank"] <= FP32.free_run_p99
    assert found.replaced["0.tail"] == pytest.approx(found.error, rel=0.01)
    assert set(found.replaced) == {"0.bank", "0.tail"}  # the others have no error to be cured of
    assert "Accumulated state, not one operation" in found.explanation
    assert "which is within the budget" in found.explanation


def test_a_state_that_helps_and_does_not_cure_is_named_with_what_remains() -> None:
    found = state_of(leak(2e-5))
    assert found.name == "0.bank"
    assert FP32.free_run_p99 < found.replaced["0.bank"] < found.error
    assert "still over the budget" in found.explanation
    assert "With all states replaced it is" in found.explanation


def test_something_that_is_not_in_the_states_is_told() -> None:
    def after(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
        outputs["outputs"][state[COUNT] > 30 * CHUNK] *= 1 + 1e-3

    found = state_of(after)
    assert (found.kind, found.name, found.replaced) == ("state", "", {})
    assert "something that is not in its states" in found.explanation


def test_a_mask_that_strays_is_among_the_suspects() -> None:
    def after(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
        state["0.mask"][state[COUNT] == 20 * CHUNK, 1] = False

    found = state_of(after)
    assert found.kind == "state"
    assert {"0.mask", "0.bank"} <= set(found.replaced)
    assert min(found.replaced, key=lambda name: found.replaced[name]) == found.name


def test_a_free_run_that_does_not_stay_finite_is_bisected() -> None:
    def after(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
        if calls > 60:
            state["0.written"][...] = np.inf

    found = state_of(after)
    assert (found.kind, found.error) == ("state", np.inf)
    assert found.to_json()["error"] is None
    assert found.all_replaced == 0.0


def test_nothing_over_budget_names_the_largest_error(exported: Path, target: str) -> None:
    found = bisected(exported, target)
    assert (found.kind, found.op, found.replaced) == ("none", None, {})
    assert 0 < found.error < found.budget == FP32.one_step_p99
    assert found.name in Bundle(exported).manifest.spec.state_names or found.name == "outputs"
    assert "Nothing is over budget" in found.explanation


# -- what cannot be bisected --------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", sorted(set(TARGETS) - {"onnx", "onnxruntime", "openvino"}))
def test_a_target_that_shows_no_intermediate_results_cannot_be_bisected(target: str) -> None:
    with pytest.raises(
        UnsupportedError, match=rf"artifact of {target} shows no .*onnx, onnxruntime, openvino\. Bisect"
    ):
        check_bisectable(target)


def test_an_engine_cannot_be_bisected(bundle: Bundle) -> None:
    with pytest.raises(UnsupportedError, match="--target onnxruntime"):
        bisect(bundle, bundle.artifact("tensorrt"), fake_session(), bundle.trace(), FP32)


def test_a_foreign_trace_is_refused(bundle: Bundle) -> None:
    trace = replace(bundle.trace(), fingerprint="0" * 64)
    artifact = bundle.artifact("onnx")
    with open_artifact(bundle, artifact) as session, pytest.raises(InputError, match="another model"):
        bisect(bundle, artifact, session, trace, FP32)


def test_without_onnx_no_operation_can_be_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    path = bundle.path / "graphs" / "step.onnx"
    with pytest.raises(MissingDependencyError, match="needs the package onnx, which is not installed"):
        read_nodes(path)
    with pytest.raises(MissingDependencyError, match="or onnx alone"):
        onnx_probe(path, optimise=False)
