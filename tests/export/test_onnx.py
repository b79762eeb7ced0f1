from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from nsm.bundle import STATE_INIT, Bundle
from nsm.errors import BuildError
from nsm.export.onnx import STATES_KEY, WEIGHTS, export_onnx, initial_arrays
from nsm.models.simple import SimpleNSM
from nsm.spec import StepSpec
from nsm.trace import Array, Arrays


@dataclass(frozen=True)
class Graph:
    """A graph on disk with the model it came from."""

    model: SimpleNSM
    spec: StepSpec
    path: Path
    opset: int

    def proto(self) -> onnx.ModelProto:
        return onnx.load(str(self.path), load_external_data=False)


VARIANTS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "ids, one lane": ({}, 1, 1, 20),
    "ids, three lanes, two chunks a call": ({}, 3, 2, 18),
    "vectors, lstm": (
        {
            "vocab_size": None,
            "input_dim": 3,
            "gate_type": "lstm",
            "consolidate_every": 2,
            "communication": True,
            "initial_states": 4,
            "window": 12,
        },
        1,
        1,
        23,
    ),
}


def write_graph(model: SimpleNSM, bundle: Path, batch: int, chunks: int, opset: int) -> Graph:
    """The part of a bundle that any ONNX client needs: the graph, its weights, and the initial state."""
    spec = model.spec(batch, chunks * model.chunk_size)
    (bundle / "graphs").mkdir(parents=True)
    path = export_onnx(model, spec, bundle / "graphs", opset)
    arrays: dict[str, Any] = dict(initial_arrays(model, batch))
    np.savez(bundle / STATE_INIT, allow_pickle=False, **arrays)
    return Graph(model, spec, path, opset)


@pytest.fixture(scope="module")
def graphs(model_factory: Callable[..., SimpleNSM], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Graph]:
    return {
        name: write_graph(model_factory(**changes), tmp_path_factory.mktemp("onnx") / "b", batch, chunks, opset)
        for name, (changes, batch, chunks, opset) in VARIANTS.items()
    }


@pytest.fixture(params=VARIANTS)
def graph(graphs: dict[str, Graph], request: pytest.FixtureRequest) -> Graph:
    return graphs[str(request.param)]


class StockClient:
    """Streams a graph with ONNX Runtime, knowing the file alone: its inputs, and the table in its metadata."""

    def __init__(self, path: Path) -> None:
        self.session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.table: list[dict[str, Any]] = json.loads(self.session.get_modelmeta().custom_metadata_map["nsm.states"])
        self.state = {entry["past"]: self._initial(path, entry) for entry in self.table}
        self.outputs = [item.name for item in self.session.get_outputs()]

    @staticmethod
    def _initial(path: Path, entry: dict[str, Any]) -> Array:
        if entry["init"] == "zeros":
            return np.zeros(entry["shape"], entry["dtype"])
        with np.load(path.parent / entry["init"]["file"], allow_pickle=False) as archive:
            value: Array = archive[entry["init"]["key"]]
        assert list(value.shape) == entry["shape"]
        assert value.dtype == entry["dtype"]
        return value

    def step(self, **inputs: Array) -> Arrays:
        given = self.session.run(None, {**inputs, **self.state})
        results: Arrays = dict(zip(self.outputs, given, strict=True))
        self.state = {entry["past"]: results.pop(entry["present"]) for entry in self.table}
        return results

    def by_name(self) -> Arrays:
        return {entry["name"]: self.state[entry["past"]] for entry in self.table}


def make_tokens(model: SimpleNSM, *shape: int, seed: int = 1) -> Array:
    generator = np.random.default_rng(seed)
    if model.token_spec.maximum is not None:
        return generator.integers(0, model.token_spec.maximum + 1, shape)
    return generator.standard_normal((*shape, *model.token_spec.shape)).astype(np.float32)


def assert_states_match(given: Arrays, wanted: dict[str, torch.Tensor]) -> None:
    assert given.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(given[name], value.detach().numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of subgraphs included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from nodes(inner)


# -- running it ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_stock_client_streams_it_with_what_the_file_says(graph: Graph) -> None:
    model, client = graph.model, StockClient(graph.path)
    batch, count = graph.spec.batch, graph.spec.entry("step").inputs[0].shape[1]
    tokens = make_tokens(model, 40, batch, count)
    state = model.initial_state(batch)
    first = model.initial_state(batch)
    for step in range(40):
        # Lanes idle now and then, and the streams end inside a chunk.
        valid = np.full(batch, count, np.int64)
        valid[0] = 0 if step % 7 == 3 else valid[0]
        valid[-1] = valid[-1] - 3 if step == 39 else valid[-1]
        wanted, state = model.step(torch.from_numpy(tokens[step]), state, torch.from_numpy(valid))
        given = client.step(tokens=tokens[step], valid=valid)
        assert given.keys() == {"outputs"}
        for lane in range(batch):
            kept = slice(0, int(valid[lane]))
            np.testing.assert_allclose(
                given["outputs"][lane, kept], wanted[lane, kept].numpy(), rtol=1e-4, atol=1e-5, err_msg=f"step {step}"
            )
    assert_states_match(client.by_name(), state)
    assert any(bool((state[name] != value).any()) for name, value in first.items())
    assert int(state["lane.offset"][-1]) == model.chunk_size - 3


@torch.no_grad()
def test_a_stock_client_streams_the_bundle_from_its_learned_initial_state(exported: Path, model: SimpleNSM) -> None:
    client = StockClient(exported / "graphs" / "step.onnx")
    learned = [entry for entry in client.table if entry["init"] != "zeros"]
    assert any(np.abs(client.state[entry["past"]].astype(np.float64)).max() > 0 for entry in learned)
    assert {entry["name"] for entry in client.table} == set(model.spec().state_names)
    tokens = make_tokens(model, 30, 2, model.chunk_size)
    valid = np.full(2, model.chunk_size, np.int64)
    state = model.initial_state(2)
    for step in range(30):
        wanted, state = model.step(torch.from_numpy(tokens[step]), state)
        given = client.step(tokens=tokens[step], valid=valid)
        np.testing.assert_allclose(given["outputs"], wanted.numpy(), rtol=1e-4, atol=1e-5, err_msg=f"step {step}")
    assert_states_match(client.by_name(), state)


def test_more_chunks_in_a_call_give_the_same_stream(graphs: dict[str, Graph]) -> None:
    one, two = graphs["ids, one lane"], graphs["ids, three lanes, two chunks a call"]
    size = one.model.chunk_size
    tokens = make_tokens(one.model, 10, 2 * size)
    single, double = StockClient(one.path), StockClient(two.path)
    for run in tokens:
        valid = np.full(1, size, np.int64)
        wanted = [single.step(tokens=half[None], valid=valid)["outputs"][0] for half in (run[:size], run[size:])]
        given = double.step(tokens=np.stack([run] * 3), valid=np.full(3, 2 * size, np.int64))["outputs"]
        for lane in range(3):
            np.testing.assert_allclose(given[lane], np.concatenate(wanted), rtol=1e-4, atol=1e-5)
    for name, value in single.by_name().items():
        np.testing.assert_allclose(double.by_name()[name][2], value[0], rtol=1e-4, atol=1e-5, err_msg=name)


# -- what is in the file ---------------------------------------------------------------------------------------------


def test_names_follow_the_architecture_and_sorted_inputs_pair_with_sorted_outputs(graph: Graph) -> None:
    proto = graph.proto()
    table = json.loads({item.key: item.value for item in proto.metadata_props}[STATES_KEY])
    inputs = [value.name for value in proto.graph.input]
    outputs = [value.name for value in proto.graph.output]
    assert inputs == ["tokens", "valid", *(entry["past"] for entry in table)]
    assert outputs == ["outputs", *(entry["present"] for entry in table)]
    roles = set()
    for entry in table:
        layer, role = entry["name"].split(".")
        roles.add(role)
        if role in ("key", "value"):
            wanted = (f"past_key_values.{layer}.{role}", f"present.{layer}.{role}")
        else:
            wanted = (f"past_state.{layer}.{role}", f"present_state.{layer}.{role}")
        assert (entry["past"], entry["present"]) == wanted
    assert {"bank", "mask", "key", "value", "offset"} <= roles
    pairs = set(zip(sorted(inputs[2:]), sorted(outputs[1:]), strict=True))
    assert pairs == {(entry["past"], entry["present"]) for entry in table}


def test_sorted_names_pair_beyond_nine_layers(model_factory: Callable[..., SimpleNSM]) -> None:
    states = model_factory(num_layers=11).spec().states
    pairs = zip(sorted(s.past for s in states), sorted(s.present for s in states), strict=True)
    assert set(pairs) == {(s.past, s.present) for s in states}


def test_the_table_says_what_the_graph_takes_and_gives(graph: Graph) -> None:
    proto = graph.proto()
    table = json.loads({item.key: item.value for item in proto.metadata_props}[STATES_KEY])
    values = {value.name: value.type.tensor_type for value in (*proto.graph.input, *proto.graph.output)}
    for entry in table:
        assert set(entry) == {"name", "past", "present", "shape", "dtype", "batch_axis", "init"}
        assert entry["batch_axis"] == 0
        assert entry["shape"][0] == graph.spec.batch
        for name in (entry["past"], entry["present"]):
            assert [dim.dim_value for dim in values[name].shape.dim] == entry["shape"]
            assert onnx.helper.tensor_dtype_to_np_dtype(values[name].elem_type) == np.dtype(entry["dtype"])
        if entry["init"] != "zeros":
            assert entry["init"] == {"file": "../state_init.npz", "key": entry["name"]}


def test_every_shape_is_static(graph: Graph) -> None:
    proto = graph.proto()
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        dims = value.type.tensor_type.shape.dim
        assert all(dim.HasField("dim_value") for dim in dims), value.name
    batch, count = graph.spec.batch, graph.spec.entry("step").inputs[0].shape[1]
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.input}
    assert shapes["tokens"][:2] == [batch, count]
    assert shapes["valid"] == [batch]


def test_it_uses_standard_operators_of_the_opset_that_was_asked_for(graph: Graph) -> None:
    proto = graph.proto()
    assert [(item.domain, item.version) for item in proto.opset_import] == [("", graph.opset)]
    assert {node.domain for node in nodes(proto.graph)} == {""}
    assert not proto.functions


def test_the_checker_passes_and_the_weights_lie_beside_the_graph(graph: Graph) -> None:
    onnx.checker.check_model(str(graph.path), full_check=True)
    assert sorted(path.name for path in graph.path.parent.iterdir()) == sorted(["step.onnx", WEIGHTS])
    places = {
        pair.value
        for tensor in graph.proto().graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for pair in tensor.external_data
        if pair.key == "location"
    }
    assert places == {WEIGHTS}


def test_nothing_of_this_machine_is_in_the_file(graph: Graph) -> None:
    content = graph.path.read_bytes() + (graph.path.parent / WEIGHTS).read_bytes()
    here = [str(Path.cwd()), str(Path(torch.__file__).parents[1]), str(Path.home()), str(graph.path.parent)]
    here = [place for place in here if len(place) > 1]  # a home may be /
    for trace in ("site-packages", "dist-packages", "Traceback", "stack_trace", '.py"', "line ", "/nsm/", *here):
        assert trace.encode() not in content, trace
    assert not re.search(rb"[\w/]+\.py\b", content)


def test_exporting_changes_neither_the_model_nor_the_log_level(
    model_factory: Callable[..., SimpleNSM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging

    model = model_factory()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(torch.onnx, "export", lambda *_args, **_options: None)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with pytest.raises(BuildError):
        export_onnx(model, model.spec(), tmp_path)
    assert logger.level == level
    assert all(bool((model.state_dict()[name] == value).all()) for name, value in before.items())


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_step_that_depends_on_the_data_is_a_build_error(
    model_factory: Callable[..., SimpleNSM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_factory()
    step = model.step

    def step_by_data(tokens: torch.Tensor, state: Any, valid: torch.Tensor) -> Any:
        return step(tokens if bool(tokens.sum() > 3) else tokens + 1, state, valid)

    monkeypatch.setattr(model, "step", step_by_data)
    with pytest.raises(BuildError, match=r"The ONNX exporter failed: .*torch\.export"):
        export_onnx(model, model.spec(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_exporter_without_a_program_is_a_build_error(
    model: SimpleNSM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *_args, **_options: None)
    with pytest.raises(BuildError, match="returned no program"):
        export_onnx(model, model.spec(), tmp_path)


def _rename(proto: onnx.ModelProto) -> None:
    proto.graph.output[1].name = "getitem_17"


def _drop(proto: onnx.ModelProto) -> None:
    del proto.graph.input[3]


def _foreign(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].domain = "com.microsoft"


def _reshape(proto: onnx.ModelProto) -> None:
    proto.graph.output[3].type.tensor_type.shape.dim[1].dim_value = 99


def _unchanged(proto: onnx.ModelProto) -> None:
    del proto


@pytest.mark.parametrize(
    ("change", "batch", "opset", "message"),
    [
        (_rename, 2, 20, r"named the graph's values .*getitem_17.*declared are .*present_state\.lane\.offset"),
        (_drop, 2, 20, r"named the graph's values \['tokens', 'valid', 'past_state\.lane\.offset', 'past_state\.0"),
        (_reshape, 2, 20, r"present_state\.0\.bank has the shape \(2, 99, 32\) in the graph; declared is \(2, 6, 32\)"),
        (_unchanged, 3, 20, r"tokens has the shape \(2, 8\) in the graph; declared is \(3, 8\)"),
        (_foreign, 2, 20, r"outside the ONNX standard: domains .*com\.microsoft"),
        (_unchanged, 2, 19, r"wrote the operator sets \[\('', 20\)\]; asked for was opset 19"),
    ],
)
def test_a_graph_that_is_not_as_declared_is_a_build_error(
    model: SimpleNSM,
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[onnx.ModelProto], None],
    batch: int,
    opset: int,
    message: str,
) -> None:
    proto = onnx.load(str(bundle.path / "graphs" / "step.onnx"))
    change(proto)
    monkeypatch.setattr(torch.onnx, "export", lambda *_args, **_options: SimpleNamespace(model_proto=proto))
    with pytest.raises(BuildError, match=message):
        export_onnx(model, model.spec(batch), tmp_path, opset)
    assert list(tmp_path.iterdir()) == []


def test_a_state_of_another_name_is_refused(
    model: SimpleNSM, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = onnx.load(str(bundle.path / "graphs" / "step.onnx"))
    monkeypatch.setattr(torch.onnx, "export", lambda *_args, **_options: SimpleNamespace(model_proto=proto))
    spec = model.spec(2)
    states = (replace(spec.states[0], past="past_state.elsewhere"), *spec.states[1:])
    with pytest.raises(BuildError, match=r"declared are .*past_state\.elsewhere"):
        export_onnx(model, replace(spec, states=states), tmp_path)


# -- the initial state -----------------------------------------------------------------------------------------------


def test_initial_arrays_are_the_models_own_for_every_lane(model: SimpleNSM) -> None:
    arrays = initial_arrays(model, 3)
    spec = model.spec(3)
    assert set(arrays) == set(spec.state_names)
    wanted = model.initial_state(3)
    for state in spec.states:
        assert arrays[state.name].shape == state.shape
        assert arrays[state.name].dtype == state.numpy_dtype
        np.testing.assert_array_equal(arrays[state.name], wanted[state.name].detach().numpy())
        if state.init == "zeros":
            assert not arrays[state.name].any()
