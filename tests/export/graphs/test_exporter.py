from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest
import torch

from nsm.baselines.transformer import TransformerLM
from nsm.bundle import STATE_INIT, WEIGHTS, Bundle
from nsm.errors import BuildError, UnsupportedError
from nsm.export.graphs import exporter as module
from nsm.export.graphs.exporter import export_onnx, initial_arrays
from nsm.export.graphs.external_data import MIN_BYTES
from nsm.export.graphs.metadata import STATES_KEY
from nsm.export.graphs.passes import optimise
from nsm.models.base import StepModel
from nsm.models.simple import SimpleNSM
from nsm.spec import StepSpec
from nsm.trace import Array, Arrays


@dataclass(frozen=True)
class Graph:
    """Graphs on disk with the model they came from."""

    model: StepModel
    spec: StepSpec
    folder: Path
    opset: int

    @property
    def path(self) -> Path:
        return self.folder / "step.onnx"

    def proto(self, entry: str = "step") -> onnx.ModelProto:
        return onnx.load(str(self.folder / f"{entry}.onnx"), load_external_data=False)

    def table(self, entry: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(
            {item.key: item.value for item in self.proto(entry).metadata_props}[STATES_KEY]
        )
        return found


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
            "num_layers": 1,
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
    paths = export_onnx(model, spec, bundle / "graphs", opset)
    assert paths == [bundle / "graphs" / f"{entry.name}.onnx" for entry in spec.entries]
    arrays: dict[str, Any] = dict(initial_arrays(model, batch))
    np.savez(bundle / STATE_INIT, allow_pickle=False, **arrays)
    return Graph(model, spec, bundle / "graphs", opset)


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
    """Streams graphs with ONNX Runtime, knowing the files alone: their inputs, and the tables in their metadata."""

    def __init__(self, folder: Path) -> None:
        self.sessions = {
            path.stem: ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            for path in sorted(folder.glob("*.onnx"))
        }
        self.tables: dict[str, list[dict[str, Any]]] = {
            name: json.loads(session.get_modelmeta().custom_metadata_map["nsm.states"])
            for name, session in self.sessions.items()
        }
        self.state = {entry["name"]: self._initial(folder, entry) for entry in self.tables["step"]}

    @staticmethod
    def _initial(folder: Path, entry: dict[str, Any]) -> Array:
        if entry["init"] == "zeros":
            return np.zeros(entry["shape"], entry["dtype"])
        with np.load(folder / entry["init"]["file"], allow_pickle=False) as archive:
            value: Array = archive[entry["init"]["key"]]
        assert list(value.shape) == entry["shape"]
        assert value.dtype == entry["dtype"]
        return value

    def call(self, name: str, **inputs: Array) -> Arrays:
        table, session = self.tables[name], self.sessions[name]
        wanted = {item.name for item in session.get_inputs()}
        given = {key: value for key, value in inputs.items() if key in wanted}
        given |= {entry["past"]: self.state[entry["name"]] for entry in table if entry["past"]}
        names = [item.name for item in session.get_outputs()]
        results: Arrays = dict(zip(names, session.run(None, given), strict=True))
        self.state |= {entry["name"]: results.pop(entry["present"]) for entry in table if entry["present"]}
        return results


def make_tokens(model: StepModel, *shape: int, seed: int = 1) -> Array:
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
    model, client = graph.model, StockClient(graph.folder)
    entry = graph.spec.entry("step")
    batch, count = graph.spec.batch, entry.inputs[0].shape[1]
    tokens = make_tokens(model, 20, batch, count)
    state = model.initial_state(batch)
    first = model.initial_state(batch)
    for step in range(20):
        valid = np.full(batch, count, np.int64)
        if entry.input("valid") is not None:
            # Lanes idle now and then, and the streams end inside a chunk.
            valid[0] = 0 if step % 7 == 3 else valid[0]
            valid[-1] = valid[-1] - 3 if step == 19 else valid[-1]
        wanted, state = model.step(torch.from_numpy(tokens[step]), state, torch.from_numpy(valid))
        given = client.call("step", tokens=tokens[step], valid=valid)
        assert given.keys() == {"outputs"}
        for lane in range(batch):
            kept = slice(0, int(valid[lane]))
            np.testing.assert_allclose(
                given["outputs"][lane, kept], wanted[lane, kept].numpy(), rtol=1e-4, atol=1e-5, err_msg=f"step {step}"
            )
    assert_states_match(client.state, state)
    assert any(bool((state[name] != value).any()) for name, value in first.items())
    assert int(state["lane.offset"][-1]) == (model.chunk_size - 3 if entry.input("valid") else 0)


@torch.no_grad()
def test_a_stock_client_goes_on_token_by_token(graph: Graph) -> None:
    model, client, batch = graph.model, StockClient(graph.folder), graph.spec.batch
    count = graph.spec.entry("step").inputs[0].shape[1]
    tokens = make_tokens(model, batch, count + 11)
    client.call("step", tokens=tokens[:, :count], valid=np.full(batch, count))
    outputs = []
    for index in range(count, count + 11):
        given = client.call("decode", tokens=tokens[:, index : index + 1], valid=np.ones(batch, np.int64))
        outputs.append(given["outputs"])
        assert client.call("commit") == {}
    wanted, state = model(torch.from_numpy(tokens), return_state=True)
    np.testing.assert_allclose(np.concatenate(outputs, 1), wanted[:, count:].numpy(), rtol=1e-4, atol=1e-5)
    assert_states_match(client.state, state)


@torch.no_grad()
def test_a_stock_client_streams_the_bundle_from_its_learned_initial_state(exported: Path, model: SimpleNSM) -> None:
    client = StockClient(exported / "graphs")
    learned = [entry for entry in client.tables["step"] if entry["init"] != "zeros"]
    assert any(np.abs(client.state[entry["name"]].astype(np.float64)).max() > 0 for entry in learned)
    assert set(client.state) == set(model.spec().state_names)
    tokens = make_tokens(model, 12, 2, model.chunk_size)
    valid = np.full(2, model.chunk_size, np.int64)
    state = model.initial_state(2)
    for step in range(12):
        wanted, state = model.step(torch.from_numpy(tokens[step]), state)
        given = client.call("step", tokens=tokens[step], valid=valid)
        np.testing.assert_allclose(given["outputs"], wanted.numpy(), rtol=1e-4, atol=1e-5, err_msg=f"step {step}")
    assert_states_match(client.state, state)


def test_more_chunks_in_a_call_give_the_same_stream(graphs: dict[str, Graph]) -> None:
    one, two = graphs["ids, one lane"], graphs["ids, three lanes, two chunks a call"]
    size = one.model.chunk_size
    tokens = make_tokens(one.model, 10, 2 * size)
    single, double = StockClient(one.folder), StockClient(two.folder)
    for run in tokens:
        wanted = [single.call("step", tokens=half[None])["outputs"][0] for half in (run[:size], run[size:])]
        given = double.call("step", tokens=np.stack([run] * 3), valid=np.full(3, 2 * size, np.int64))["outputs"]
        for lane in range(3):
            np.testing.assert_allclose(given[lane], np.concatenate(wanted), rtol=1e-4, atol=1e-5)
    for name, value in single.state.items():
        np.testing.assert_allclose(double.state[name][2], value[0], rtol=1e-4, atol=1e-5, err_msg=name)


# -- what is in the file ---------------------------------------------------------------------------------------------


def test_names_follow_the_architecture_and_sorted_inputs_pair_with_sorted_outputs(graph: Graph) -> None:
    roles = set()
    for entry in graph.spec.entries:
        proto, table = graph.proto(entry.name), graph.table(entry.name)
        inputs = [value.name for value in proto.graph.input]
        outputs = [value.name for value in proto.graph.output]
        assert inputs == [*(item.name for item in entry.inputs), *(row["past"] for row in table if row["past"])]
        assert outputs == [*(item.name for item in entry.outputs), *(row["present"] for row in table if row["present"])]
        assert {row["name"] for row in table if row["past"]} == set(entry.reads)
        assert {row["name"] for row in table if row["present"]} == set(entry.writes)
        for row in table:
            layer, role = row["name"].split(".")
            roles.add(role)
            window = role in ("key", "value")
            past, present = ("past_key_values", "present") if window else ("past_state", "present_state")
            assert row["past"] in (None, f"{past}.{layer}.{role}")
            assert row["present"] in (None, f"{present}.{layer}.{role}")
        both = [row for row in table if row["past"] and row["present"]]
        pairs = zip(sorted(row["past"] for row in both), sorted(row["present"] for row in both), strict=True)
        assert set(pairs) == {(row["past"], row["present"]) for row in both}
    assert {"bank", "mask", "key", "value", "offset"} <= roles


def test_valid_is_an_input_only_where_lanes_can_differ(graphs: dict[str, Graph]) -> None:
    inputs = {
        (name, entry): {value.name for value in graph.proto(entry).graph.input}
        for name, graph in graphs.items()
        for entry in ("step", "decode", "commit")
    }
    for (name, entry), found in inputs.items():
        assert ("valid" in found) == (name == "ids, three lanes, two chunks a call" and entry != "commit")
        assert ("tokens" in found) == (entry != "commit")


def test_sorted_names_pair_beyond_nine_layers(model_factory: Callable[..., SimpleNSM]) -> None:
    states = model_factory(num_layers=11).spec().states
    pairs = zip(sorted(s.past for s in states), sorted(s.present for s in states), strict=True)
    assert set(pairs) == {(s.past, s.present) for s in states}


def test_the_table_says_what_the_graph_takes_and_gives(graph: Graph) -> None:
    for entry in graph.spec.entries:
        proto, table = graph.proto(entry.name), graph.table(entry.name)
        assert [row["name"] for row in table] == list(graph.spec.state_names)
        values = {value.name: value.type.tensor_type for value in (*proto.graph.input, *proto.graph.output)}
        for row in table:
            assert set(row) == {"name", "past", "present", "shape", "dtype", "batch_axis", "append_axis", "init"}
            assert (row["batch_axis"], row["append_axis"]) == (0, None)
            assert row["shape"][0] == graph.spec.batch
            for name in (row["past"], row["present"]):
                if name is not None:
                    assert [dim.dim_value for dim in values[name].shape.dim] == row["shape"]
                    assert onnx.helper.tensor_dtype_to_np_dtype(values[name].elem_type) == np.dtype(row["dtype"])
            if row["init"] != "zeros":
                assert row["init"] == {"file": "../state_init.npz", "key": row["name"]}


def test_every_shape_is_static(graph: Graph) -> None:
    for entry in graph.spec.entries:
        proto = graph.proto(entry.name)
        for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
            dims = value.type.tensor_type.shape.dim
            assert all(dim.HasField("dim_value") for dim in dims), (entry.name, value.name)
        shapes = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in proto.graph.input}
        for item in entry.inputs:
            assert shapes[item.name] == item.shape


def test_it_uses_standard_operators_of_the_opset_that_was_asked_for(graph: Graph) -> None:
    for entry in graph.spec.entries:
        proto = graph.proto(entry.name)
        assert [(item.domain, item.version) for item in proto.opset_import] == [("", graph.opset)]
        assert {node.domain for node in nodes(proto.graph)} == {""}
        assert not proto.functions


def places(graph: Graph, entry: str) -> dict[tuple[int, int], str]:
    """(offset, length) in the file of weights -> name of the tensor."""
    found = {}
    for tensor in graph.proto(entry).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {pair.key: pair.value for pair in tensor.external_data}
            assert place["location"] == WEIGHTS
            found[int(place["offset"]), int(place["length"])] = tensor.name
    return found


def test_the_checker_passes_and_the_weights_lie_beside_the_graphs(graph: Graph) -> None:
    files = [f"{entry.name}.onnx" for entry in graph.spec.entries]
    for name in files:
        onnx.checker.check_model(str(graph.folder / name), full_check=True)
    assert sorted(path.name for path in graph.folder.iterdir()) == sorted([*files, WEIGHTS])


def test_no_tensor_of_a_kilobyte_is_in_a_graph(graph: Graph) -> None:
    for entry in graph.spec.entries:
        for node in nodes(graph.proto(entry.name).graph):
            for attribute in node.attribute:
                assert attribute.t.ByteSize() < MIN_BYTES, (node.name, attribute.name)
        for tensor in graph.proto(entry.name).graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                assert onnx.numpy_helper.to_array(tensor).nbytes < MIN_BYTES, tensor.name


def test_weights_are_on_the_disk_once(graph: Graph) -> None:
    content = (graph.folder / WEIGHTS).read_bytes()
    used = {place for entry in graph.spec.entries for place in places(graph, entry.name)}
    blocks = [content[offset : offset + length] for offset, length in sorted(used)]
    assert len(set(blocks)) == len(blocks) > 3
    assert all(len(block) >= MIN_BYTES for block in blocks)
    assert all(offset % 64 == 0 for offset, _ in used)
    end = 0
    for offset, length in sorted(used):  # no gaps but those of alignment, and no tensor inside another
        assert end <= offset < end + 64
        end = offset + length
    assert end == len(content)
    uses = Counter(place for entry in graph.spec.entries for place in places(graph, entry.name))
    assert sum(length for (_, length), count in uses.items() if count > 1) > 0.8 * len(content)
    weights = sum(value.numel() * value.element_size() for value in graph.model.parameters())
    assert len(content) < 1.5 * weights


# -- the passes ------------------------------------------------------------------------------------------------------


def test_what_depends_on_weights_alone_was_computed(graph: Graph) -> None:
    for entry in graph.spec.entries:
        proto = graph.proto(entry.name).graph
        known = {tensor.name for tensor in proto.initializer}
        for node in proto.node:
            if node.op_type == "Constant":
                known |= set(node.output)
                continue
            assert not set(node.input) - {""} <= known, f"{entry.name}: {node.op_type} {node.name} of constants alone"


def test_no_weight_is_left_that_nothing_reads(graph: Graph) -> None:
    for entry in graph.spec.entries:
        proto = graph.proto(entry.name).graph
        read = {name for node in nodes(proto) for name in node.input} | {value.name for value in proto.output}
        assert {tensor.name for tensor in proto.initializer} <= read


def test_the_passes_fold_constants_and_change_no_output() -> None:
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal((4, 4)).astype(np.float32) for name in ("a", "b")}
    make = onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [
            make("Transpose", ["a"], ["at"], perm=[1, 0]),
            make("Concat", ["at", "b"], ["joined"], axis=1),
            make("Identity", ["x"], ["same"]),
            make("MatMul", ["same", "joined"], ["y"]),
            make("Exp", ["x"], ["unused"]),
        ],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 4])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 8])],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    before = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    model = onnx_ir.serde.deserialize_model(before)
    optimise(model)
    after = onnx_ir.serde.serialize_model(model)
    assert [node.op_type for node in after.graph.node] == ["MatMul"]
    assert [value.name for value in after.graph.output] == ["y"]
    x = random.standard_normal((2, 4)).astype(np.float32)
    given, wanted = (ort.InferenceSession(item.SerializeToString()).run(None, {"x": x})[0] for item in (after, before))
    np.testing.assert_allclose(given, wanted, rtol=1e-6)
    np.testing.assert_allclose(given, x @ np.concatenate([weights["a"].T, weights["b"]], 1), rtol=1e-5)


def test_nothing_of_this_machine_is_in_the_file(graph: Graph) -> None:
    content = b"".join(path.read_bytes() for path in sorted(graph.folder.iterdir()))
    here = [str(Path.cwd()), str(Path(torch.__file__).parents[2]), str(Path.home()), str(graph.folder)]
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


def test_a_step_that_depends_on_the_data_is_unsupported(
    model_factory: Callable[..., SimpleNSM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_factory(num_layers=1)
    call = model.call

    def call_by_data(entry: str, inputs: dict[str, torch.Tensor], state: Any) -> Any:
        tokens = inputs["tokens"]
        return call(entry, {"tokens": tokens if bool(tokens.sum() > 3) else tokens + 1}, state)

    monkeypatch.setattr(model, "call", call_by_data)
    with pytest.raises(UnsupportedError, match=r"traced by torch\.export: .*test_exporter\.py:\d+, in call_by_data:\n"):
        export_onnx(model, model.spec(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_exporter_without_a_program_is_a_build_error(
    model: SimpleNSM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *_args, **_options: None)
    with pytest.raises(BuildError, match="returned no program for step"):
        export_onnx(model, model.spec(), tmp_path)


def _rename(proto: onnx.ModelProto) -> None:
    proto.graph.output[1].name = "getitem_17"


def _drop(proto: onnx.ModelProto) -> None:
    del proto.graph.input[3]


def _foreign(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].domain = "com.microsoft"


def _reshape(proto: onnx.ModelProto) -> None:
    (bank,) = (value for value in proto.graph.output if value.name == "present_state.0.bank")
    bank.type.tensor_type.shape.dim[1].dim_value = 99


def _invent(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].op_type = "Invented"


def _unchanged(proto: onnx.ModelProto) -> None:
    del proto


@pytest.fixture
def ready_program(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[onnx.ModelProto], None]], None]:
    """Spare the exporter: it gives the bundle's graph of `step`, after a change."""

    def with_change(change: Callable[[onnx.ModelProto], None]) -> None:
        proto = onnx.load(str(bundle.path / "graphs" / "step.onnx"))
        change(proto)
        monkeypatch.setattr(
            torch.onnx, "export", lambda *_args, **_options: SimpleNamespace(model=None, model_proto=proto)
        )
        for name in ("optimise", "exact_division"):
            monkeypatch.setattr(module, name, lambda _model: None)

    return with_change


@pytest.mark.parametrize(
    ("change", "batch", "opset", "message"),
    [
        (_rename, 2, 20, r"named the graph's values .*getitem_17.*declared are .*present_state\.lane\.offset"),
        (_drop, 2, 20, r"named the graph's values \['tokens', 'valid', 'past_state\.lane\.offset', 'past_state\.0"),
        (_reshape, 2, 20, r"bank has the shape \(2, 99, 6, 8\) in the graph; declared is \(2, 4, 6, 8\)"),
        (_unchanged, 3, 20, r"tokens has the shape \(2, 8\) in the graph; declared is \(3, 8\)"),
        (_foreign, 2, 20, r"outside the ONNX standard: the node model/Gather is com\.microsoft::Gather\."),
        (_unchanged, 2, 19, r"wrote the operator sets \[\('', 20\)\]; asked for was opset 19"),
    ],
)
def test_a_graph_that_is_not_as_declared_is_a_build_error(
    model: SimpleNSM,
    tmp_path: Path,
    ready_program: Callable[[Callable[[onnx.ModelProto], None]], None],
    change: Callable[[onnx.ModelProto], None],
    batch: int,
    opset: int,
    message: str,
) -> None:
    ready_program(change)
    with pytest.raises(BuildError, match=message):
        export_onnx(model, model.spec(batch), tmp_path, opset)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_is_not_valid_is_a_build_error(
    model: SimpleNSM, tmp_path: Path, ready_program: Callable[[Callable[[onnx.ModelProto], None]], None]
) -> None:
    ready_program(_invent)
    spec = model.spec(2)
    with pytest.raises(BuildError, match=r"The graph of step is not valid ONNX: .*Invented"):
        export_onnx(model, replace(spec, entries=spec.entries[:1]), tmp_path)


def test_a_state_of_another_name_is_refused(
    model: SimpleNSM, tmp_path: Path, ready_program: Callable[[Callable[[onnx.ModelProto], None]], None]
) -> None:
    ready_program(_unchanged)
    spec = model.spec(2)
    states = (replace(spec.states[0], past="past_state.elsewhere"), *spec.states[1:])
    with pytest.raises(BuildError, match=r"declared are .*past_state\.elsewhere"):
        export_onnx(model, replace(spec, states=states), tmp_path)


# -- states that are appended to -------------------------------------------------------------------------------------


def test_the_output_of_a_state_that_is_appended_to_holds_the_new_rows_only(tmp_path: Path) -> None:
    model = TransformerLM(20, d_model=8, num_layers=1, num_heads=2, context=10, chunk_size=4).eval()
    spec = model.spec(2)
    export_onnx(model, spec, tmp_path)
    graph = Graph(model, spec, tmp_path, 20)
    for entry, tokens in (("step", 4), ("decode", 1)):
        outputs = {value.name: value.type.tensor_type.shape.dim for value in graph.proto(entry).graph.output}
        rows = {row["name"]: row for row in graph.table(entry)}
        for name in ("0.key", "0.value"):
            assert (rows[name]["append_axis"], rows[name]["shape"]) == (2, [2, 2, 10, 4])
            assert [dim.dim_value for dim in outputs[rows[name]["present"]]] == [2, 2, tokens, 4]
        assert rows["lane.count"]["append_axis"] is None


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
