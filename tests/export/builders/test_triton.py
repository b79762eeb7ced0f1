"""The model repository, read with Triton's own definition of config.pbtxt and run with ONNX Runtime alone."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from google.protobuf import text_format

import nsm
from nsm.baselines.transformer import TransformerLM
from nsm.bundle import Bundle
from nsm.errors import (
    BuildError,
    BundleDamagedError,
    InputError,
    MissingDependencyError,
    RunError,
    StreamError,
    UnsupportedError,
)
from nsm.export.builders import triton
from nsm.export.options import ExportOptions
from nsm.export.pipeline import export
from nsm.export.verify.another_target import add_target
from nsm.manifest import file_record
from nsm.models.simple import SimpleNSM
from nsm.runtimes.backends.triton import KINDS, as_paired, parse
from nsm.spec import EntrySpec, StateSpec, StepSpec, TensorSpec
from nsm.staging import write_manifest
from nsm.trace import Arrays
from tests.export.helpers import invoke, keep_only, refused, succeeded, the_json
from tests.small_models import CHUNK, make_sequences

CONFIG = "triton/nsm/config.pbtxt"


@pytest.fixture(scope="module")
def two_lanes(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not change it."""
    path = Path(shutil.copytree(exported, tmp_path_factory.mktemp("triton") / "two.nsm"))
    keep_only(path, "onnx")
    add_target(path, "triton")
    return path


@pytest.fixture(scope="module")
def one_lane(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what there is to look inside. Do not change it."""
    output = tmp_path_factory.mktemp("triton") / "one.nsm"
    export(checkpoint, ExportOptions(["triton"], output=output, num_samples=2, golden_steps=8, debug_outputs=True))
    return output


@pytest.fixture(params=["one_lane", "two_lanes"])
def repository(request: pytest.FixtureRequest) -> Path:
    """The bundle of each."""
    path = request.getfixturevalue(request.param)
    assert isinstance(path, Path)
    return path


@pytest.fixture
def copied(two_lanes: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_lanes, tmp_path / "copied.nsm"))


@pytest.fixture(scope="module")
def definition() -> ModuleType:
    """Triton's own. It is a file by itself: its package wants an older protobuf for what else is in there."""
    found = importlib.util.find_spec("tritonclient")
    assert found is not None
    assert found.origin is not None
    path = Path(found.origin).parent / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rerecord(bundle: Path) -> None:
    """Let the manifest say what lies there."""
    manifest = Bundle(bundle).manifest
    changed = tuple(
        replace(item, files=tuple(file_record(bundle, record.path) for record in item.files))
        for item in manifest.artifacts
    )
    write_manifest(bundle, replace(manifest, artifacts=changed))


def change_config(bundle: Path, old: str, new: str) -> None:
    path = bundle / CONFIG
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    rerecord(bundle)


# -- what the server reads ---------------------------------------------------------------------------------------------


def test_config_is_what_triton_defines(repository: Path, definition: ModuleType) -> None:
    config = text_format.Parse((repository / CONFIG).read_text(encoding="utf-8"), definition.ModelConfig())
    spec = Bundle(repository).manifest.spec
    assert (config.backend, config.max_batch_size, config.name) == ("onnxruntime", 0, "")
    assert (
        not config.sequence_batching.control_input
    )  # the graph has no such inputs, and its states start by themselves
    assert config.sequence_batching.WhichOneof("strategy_choice") == "oldest"
    assert config.sequence_batching.oldest.max_candidate_sequences == triton.SEQUENCES
    assert config.sequence_batching.max_sequence_idle_microseconds == triton.IDLE_MICROSECONDS
    assert [group.kind for group in config.instance_group] == [definition.ModelInstanceGroup.KIND_CPU]
    assert len(config.output) == len(spec.entry("step").outputs)


def test_every_name_dtype_and_dim_is_the_graphs(repository: Path, definition: ModuleType) -> None:
    config = text_format.Parse((repository / CONFIG).read_text(encoding="utf-8"), definition.ModelConfig())
    graph = ort.InferenceSession(str(repository / "triton/nsm/1/model.onnx"), providers=["CPUExecutionProvider"])
    names = {kind.onnxruntime: kind.triton for kind in KINDS.values()}

    def sides(values: Any) -> dict[str, tuple[str, list[int]]]:
        return {value.name: (names[value.type], value.shape) for value in values}

    def told(item: Any) -> tuple[str, list[int]]:
        return definition.DataType.Name(item.data_type), list(item.dims)

    states = config.sequence_batching.state
    assert len(states) > 5
    inputs = {item.name: told(item) for item in config.input} | {item.input_name: told(item) for item in states}
    outputs = {item.name: told(item) for item in config.output} | {item.output_name: told(item) for item in states}
    assert inputs == sides(graph.get_inputs())
    assert outputs == sides(graph.get_outputs())
    # As many names as places: none stands for two.
    assert len(inputs) == len(config.input) + len(states)
    assert all(told(item.initial_state[0]) == told(item) for item in states)
    pairs = list(
        zip(sorted(item.input_name for item in states), sorted(item.output_name for item in states), strict=True)
    )
    assert sorted((item.input_name, item.output_name) for item in states) == pairs


def test_every_state_starts_as_the_bundle_says(repository: Path, definition: ModuleType) -> None:
    config = text_format.Parse((repository / CONFIG).read_text(encoding="utf-8"), definition.ModelConfig())
    initial = Bundle(repository).state_init()
    kinds = {kind.triton: name for name, kind in KINDS.items()}
    folder = repository / "triton/nsm/initial_state"
    from_files = set()
    for state in config.sequence_batching.state:
        (start,) = state.initial_state
        wanted = initial[start.name]
        assert kinds[definition.DataType.Name(state.data_type)] == str(wanted.dtype)
        if start.WhichOneof("state_data") == "zero_data":
            assert start.zero_data
            assert not wanted.any()
        else:
            assert (folder / start.data_file).read_bytes() == wanted.tobytes()
            from_files.add(start.data_file)
    assert {path.name for path in folder.iterdir()} == from_files
    assert {"0.bank", "0.mask"} <= from_files


def test_the_small_parser_reads_it_as_protobuf_does(repository: Path, definition: ModuleType) -> None:
    text = (repository / CONFIG).read_text(encoding="utf-8")
    config = text_format.Parse(text, definition.ModelConfig())
    read = parse(text)
    assert [item["name"][0] for item in read["input"]] == [item.name for item in config.input]
    assert [item["dims"] for item in read["output"]] == [list(item.dims) for item in config.output]
    (batching,) = read["sequence_batching"]
    assert [item["output_name"][0] for item in batching["state"]] == [
        item.output_name for item in config.sequence_batching.state
    ]


def test_the_repository_is_recorded_whole_and_holds_the_weights_of_step_once(two_lanes: Path) -> None:
    artifact = Bundle(two_lanes).artifact("triton")
    assert [record.path for record in artifact.files] == sorted(
        path.relative_to(two_lanes).as_posix() for path in (two_lanes / "triton").rglob("*") if path.is_file()
    )
    assert (two_lanes / "triton/nsm/1/weights.bin").stat().st_nlink == 1
    onnx.checker.check_model(str(two_lanes / "triton/nsm/1/model.onnx"), full_check=True)
    assert "the server was not run" in artifact.notes[0]
    assert "2 streams, which start and end together" in artifact.notes[1]


# -- what it would answer ----------------------------------------------------------------------------------------------


def test_parity_is_checked_on_it(repository: Path) -> None:
    artifact = Bundle(repository).artifact("triton")
    assert (artifact.parity.status, artifact.effective_precision, artifact.device) == ("passed", "fp32", "cpu")
    data = the_json(invoke("parity", repository, "-t", "triton", "--json"))
    assert data["passed"] is True
    assert data["results"][0]["one_step"]["max"] < 1e-5


@torch.no_grad()
def test_stock_onnx_runtime_fed_as_the_server_does_answers_like_the_model(
    two_lanes: Path, model: SimpleNSM, definition: ModuleType
) -> None:
    """The server's loop by hand, from what protobuf reads: nothing of the runtime under test is in it."""
    folder = two_lanes / "triton" / "nsm"
    config = text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), definition.ModelConfig())
    kinds = {kind.triton: name for name, kind in KINDS.items()}
    held: Arrays = {}
    for state in config.sequence_batching.state:
        (start,) = state.initial_state
        dtype = np.dtype(kinds[definition.DataType.Name(state.data_type)])
        held[state.input_name] = (
            np.zeros(state.dims, dtype)
            if start.zero_data
            else np.frombuffer((folder / "initial_state" / start.data_file).read_bytes(), dtype).reshape(state.dims)
        )
    graph = ort.InferenceSession(str(folder / "1" / "model.onnx"), providers=["CPUExecutionProvider"])
    pasts = sorted(state.input_name for state in config.sequence_batching.state)
    presents = sorted(state.output_name for state in config.sequence_batching.state)
    sequences = make_sequences(2, 12 * CHUNK, seed=3)
    wanted = model(torch.from_numpy(sequences)).numpy()
    for start in range(0, sequences.shape[1], CHUNK):
        request = {"tokens": sequences[:, start : start + CHUNK], "valid": np.full(2, CHUNK)}
        answer = dict(zip(["outputs", *presents], graph.run(["outputs", *presents], {**request, **held}), strict=True))
        np.testing.assert_allclose(answer["outputs"], wanted[:, start : start + CHUNK], rtol=1e-4, atol=1e-5)
        held = {past: answer[present] for past, present in zip(pasts, presents, strict=True)}


def test_a_session_is_the_same_as_on_onnxruntime(two_lanes: Path, exported: Path) -> None:
    sequences = make_sequences(2, 5 * CHUNK, seed=4)
    with nsm.open(two_lanes, target="triton") as served, nsm.open(exported, target="ort") as other:
        np.testing.assert_allclose(served.run(sequences)["outputs"], other.run(sequences)["outputs"], atol=1e-5)
        snapshot = other.snapshot()
        served.reset()
        assert served.is_fresh()
        served.restore(snapshot)
        more = make_sequences(2, CHUNK, seed=5)
        np.testing.assert_allclose(served.step(more)["outputs"], other.step(more)["outputs"], atol=1e-5)
        served.reset(1)
        assert not served.is_fresh()


def test_the_end_of_a_stream_may_lie_inside_a_chunk_where_there_are_lanes(two_lanes: Path, exported: Path) -> None:
    sequences = make_sequences(2, 2 * CHUNK + 3, seed=6)
    with nsm.open(two_lanes, target="triton") as served, nsm.open(exported, target="ort") as other:
        np.testing.assert_allclose(served.run(sequences)["outputs"], other.run(sequences)["outputs"], atol=1e-5)
        assert served.offsets.tolist() == [3, 3]
        with pytest.raises(StreamError, match="no entry decode, so a partial chunk ends a stream"):
            served.run(sequences)


def test_one_lane_takes_whole_chunks_and_padding_changes_no_answer_before_it(one_lane: Path) -> None:
    sequence = make_sequences(1, 2 * CHUNK, seed=7)[0]
    with nsm.open(one_lane, target="triton") as served:
        with pytest.raises(InputError, match=f"Give a multiple of {CHUNK}"):
            served.run(sequence[:-3])
        whole = served.run(sequence)
        served.reset()
        padded = served.run(np.concatenate([sequence[:-3], [0, 0, 0]]))
        assert any(name.startswith("routing.") for name in whole)
        for name, value in whole.items():
            np.testing.assert_array_equal(padded[name][:-3], value[:-3], err_msg=name)


# -- what is refused ---------------------------------------------------------------------------------------------------


def spec_of(
    *states: StateSpec, reads: tuple[str, ...] | None = None, writes: tuple[str, ...] | None = None
) -> StepSpec:
    names = tuple(state.name for state in states)
    entry = EntrySpec(
        "step",
        (TensorSpec("tokens", (1, 2), "float32", 1),),
        (TensorSpec("outputs", (1, 2), "float32", 1),),
        names if reads is None else reads,
        names if writes is None else writes,
    )
    return StepSpec((entry,), states, 2, 1)


def test_rings_are_refused_with_the_way_out() -> None:
    model = TransformerLM(vocab_size=20, d_model=16, num_layers=1, num_heads=2, context=16, chunk_size=4)
    with pytest.raises(
        UnsupportedError, match=r"for 0\.key, 0\.value the graph outputs only the new rows.*another target"
    ):
        triton.check_states(model.spec(1).states)


@pytest.mark.parametrize(
    ("states", "part"),
    [
        ([StateSpec("0.odd", (1, 2), "complex64")], r"0\.odd \(complex64 \[1, 2\]\)"),
        (
            [
                StateSpec("a", (1,), "float32", past="a", present="z"),
                StateSpec("b", (1,), "float32", past="b", present="y"),
            ],
            "would feed the output y back as the input a",
        ),
    ],
)
def test_states_that_the_server_cannot_carry_are_refused(states: list[StateSpec], part: str) -> None:
    with pytest.raises(UnsupportedError, match=part):
        triton.check_states(states)


def test_the_servers_order_of_names_is_that_of_bytes() -> None:
    pairs = [("é", "2"), ("z", "1"), ("Z", "0")]
    assert as_paired(pairs) == [("Z", "0"), ("z", "1"), ("é", "2")]


def test_low_precision_is_refused(two_lanes: Path) -> None:
    refused(invoke("build", two_lanes, "-t", "triton", "-p", "int8"), 3, "The target triton is not built in int8")


def test_without_onnx_the_extra_is_named(copied: Path, hide: Callable[..., None]) -> None:
    hide("onnx")
    with pytest.raises(MissingDependencyError, match=r'pip install "nsm-toolkit\[triton\]"'):
        add_target(copied, "triton", force=True)


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ('name: "tokens"', 'name: "ids"', "the input ids is .* there and absent in the graph"),
        ('input_name: "past_state.0.tail"', 'input_name: "past_state.0.fin"', "absent in the graph"),
        ("data_type: TYPE_INT64", "data_type: TYPE_INT32", r"input tokens is \('TYPE_INT32', \(2, 8\)\) there"),
        ("dims: [2, 8, 5]", "dims: [2, 8, 6]", "output outputs is .*8, 6"),
        ('output_name: "present_state.0.bank"', 'output_name: "present_state.1.bank"', "do not pair|not named"),
    ],
)
def test_a_config_that_does_not_fit_the_graph_is_refused(copied: Path, old: str, new: str, part: str) -> None:
    change_config(copied, old, new)
    with pytest.raises(BuildError, match=f"config.pbtxt does not fit model.onnx.*{part}"):
        nsm.open(copied, target="triton")


def test_states_wired_crosswise_are_refused(copied: Path) -> None:
    """Of equal shape, so that nothing but the order of the names gives them away."""
    change_config(copied, 'output_name: "present_state.0.bank"', 'output_name: "?"')
    change_config(copied, 'output_name: "present_state.1.bank"', 'output_name: "present_state.0.bank"')
    change_config(copied, 'output_name: "?"', 'output_name: "present_state.1.bank"')
    with pytest.raises(BuildError, match="do not pair when sorted by name"):
        nsm.open(copied, target="triton")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sequence_batching {", "sequence {"),
        ("backend:", "} backend:"),
        ("instance_group {", "instance_group {{"),
        ('data_file: "0.bank"', 'data_file: "absent"'),
        ('data_file: "0.bank"', 'data_file: "0.mask"'),
        ("data_type: TYPE_BOOL", "data_type: TYPE_FP32"),
        ("data_type: TYPE_FP32", "data_type: TYPE_FP8"),
        ('data_file: "0.bank"', 'data_file: "/etc/hostname"'),
        ('data_file: "0.bank"', 'data_file: "../../../golden.npz"'),
        ('data_file: "0.bank"', 'data_file: "."'),
        ('data_file: "0.bank"', "data_file: 3"),
        ("input {", "input: word input {"),
        ("input {", "input { dims: word } input {"),
        ("sequence_batching {", "sequence_batching: 3 sequence {"),
        ("initial_state {", "initial_state: 3 initial {"),
        ('name: "tokens"', "name: []"),
        ('name: "tokens"', "name { }"),
        ('name: "tokens"', r'name: "\ud800"'),
        ("dims: [2, 8]", 'dims: [2, "8"]'),
        ('name: "0.tail"', 'name: "1.tail"'),
        ("backend:", "deep {" * 100_000 + "}" * 100_000 + "backend:"),
    ],
)
def test_a_config_that_the_server_cannot_read_is_damage(copied: Path, old: str, new: str) -> None:
    if new.endswith("FP8"):  # a state and what it starts from, so that they are alike
        path = copied / CONFIG
        path.write_text(path.read_text(encoding="utf-8").replace("TYPE_FP32", "TYPE_FP8"), encoding="utf-8")
        rerecord(copied)
    else:
        change_config(copied, old, new)
    with pytest.raises(BundleDamagedError, match=r"config\.pbtxt is no valid Triton configuration"):
        nsm.open(copied, target="triton")


@pytest.mark.parametrize("size", [10**15, 10**30])
def test_a_state_of_absurd_size_is_damage(copied: Path, size: int) -> None:
    path = copied / CONFIG
    path.write_text(path.read_text(encoding="utf-8").replace("dims: [2]", f"dims: [{size}, 4]"), encoding="utf-8")
    rerecord(copied)
    with pytest.raises(BundleDamagedError, match=r"config\.pbtxt is no valid Triton configuration"):
        nsm.open(copied, target="triton")


@pytest.mark.parametrize("name", [CONFIG, "triton/nsm/initial_state/0.bank"])
@pytest.mark.parametrize("kind", ["link out", "pipe"])
def test_files_of_the_model_that_are_none_or_lie_elsewhere_are_not_read(
    copied: Path, tmp_path: Path, name: str, kind: str
) -> None:
    manifest, (artifact,) = Bundle(copied).manifest, [Bundle(copied).artifact("triton")]
    kept = replace(artifact, files=tuple(record for record in artifact.files if record.path != name))
    write_manifest(copied, replace(manifest, artifacts=(kept,)))
    if kind == "pipe":
        (copied / name).unlink()
        os.mkfifo(copied / name)
    else:
        shutil.move(copied / name, tmp_path / "outside")
        (copied / name).symlink_to(tmp_path / "outside")
    with pytest.raises(BundleDamagedError, match="not a file" if kind == "pipe" else "is outside the model's folder"):
        nsm.open(copied, target="triton")


def test_a_graph_outside_a_model_is_damage(copied: Path) -> None:
    shutil.copy2(copied / "triton/nsm/1/model.onnx", copied)
    manifest, artifact = Bundle(copied).manifest, Bundle(copied).artifact("triton")
    moved = replace(artifact, files=(file_record(copied, "model.onnx"),))
    write_manifest(copied, replace(manifest, artifacts=(moved,)))
    with pytest.raises(BundleDamagedError, match=r"model\.onnx is not in a model's version folder"):
        nsm.open(copied, target="triton")


def test_a_state_that_the_bundle_has_not_is_damage(copied: Path) -> None:
    change_config(copied, 'name: "0.tail"', 'name: "9.tail"')
    with pytest.raises(BundleDamagedError, match=r"has states that the bundle lacks: \['9\.tail'\]"):
        nsm.open(copied, target="triton")


def test_another_start_than_the_bundles_is_damage(copied: Path) -> None:
    path = copied / "triton/nsm/initial_state/0.bank"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    rerecord(copied)
    with pytest.raises(BundleDamagedError, match=r"initial values of 0\.bank"):
        nsm.open(copied, target="triton")


def test_a_wrong_graph_fails_its_parity(copied: Path) -> None:
    path = copied / "triton/nsm/1/weights.bin"
    weights = np.frombuffer(path.read_bytes(), np.float32)
    path.write_bytes((weights * np.float32(1.01)).tobytes())
    rerecord(copied)
    assert invoke("parity", copied, "-t", "triton").exit_code == 5


def test_a_graph_that_onnx_runtime_refuses_is_a_build_error(copied: Path) -> None:
    (copied / "triton/nsm/1/model.onnx").write_bytes(b"rubbish")
    rerecord(copied)
    with pytest.raises(BuildError, match="ONNX Runtime cannot open"):
        nsm.open(copied, target="triton")


def test_what_fails_while_it_runs_is_a_run_error_and_a_closed_session_says_so(two_lanes: Path) -> None:
    with nsm.open(two_lanes, target="triton", threads=1) as session:
        runtime = session.runtime
        state = runtime.load_state(session.read_state())
        with pytest.raises(RunError, match="ONNX Runtime failed while it ran step"):
            runtime.call("step", {"tokens": np.zeros((1, 1), np.int64)}, state)
    with pytest.raises(StreamError, match="closed"):
        runtime.call("step", {}, state)
    for look in (session.read_state, session.snapshot, session.reset, session.is_fresh):
        with pytest.raises(StreamError, match="The session is closed"):
            look()
    with pytest.raises(StreamError, match="The session is closed"):
        runtime.finite(state)


# -- graphs that lack a side of a state --------------------------------------------------------------------------------


@pytest.mark.parametrize(("reads", "writes"), [(("0.s",), ()), ((), ("0.s",)), (("0.s",), ("0.s",))])
def test_a_state_gets_the_side_that_the_graph_lacks(reads: tuple[str, ...], writes: tuple[str, ...]) -> None:
    spec = spec_of(StateSpec("0.s", (1, 3), "float32"), reads=reads, writes=writes)
    value = onnx.helper.make_tensor_value_info
    inputs = [value("past_state.0.s", 1, (1, 3))] if reads else []
    outputs = [value("present_state.0.s", 1, (1, 3))] if writes else []
    nodes = [onnx.helper.make_node("Identity", ["past_state.0.s"], ["present_state.0.s"])] if reads and writes else []
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs)
    triton.complete(graph, spec.entry("step"), spec.states)
    assert [item.name for item in graph.input] == ["past_state.0.s"]
    assert [item.name for item in graph.output] == ["present_state.0.s"]
    assert len(graph.node) == bool(reads)


def test_build_from_the_command_line_replaces_its_own_files_only(copied: Path) -> None:
    (copied / "triton/nsm/initial_state/stale").write_bytes(b"old")
    text = succeeded(invoke("build", copied, "-t", "triton", "--force"))
    assert f"nsm parity {copied} --target triton" in text
    assert (copied / "triton/nsm/initial_state/stale").read_bytes() == b"old"
    Bundle(copied).verify()


def test_names_that_need_quoting_survive(definition: ModuleType) -> None:
    odd = 'enc/h "0" \\ é'
    spec = spec_of(StateSpec(odd, (1, 3), "float32"))
    initial: Mapping[str, Any] = {odd: np.ones((1, 3), np.float32)}
    text = triton.configuration(spec.entry("step"), spec.states, dict(initial))
    (state,) = text_format.Parse(text, definition.ModelConfig()).sequence_batching.state
    assert (state.initial_state[0].name, state.input_name) == (odd, f"past_state.{odd}")
    assert "/" not in state.initial_state[0].data_file
    assert parse(text)["sequence_batching"][0]["state"][0]["input_name"] == [f"past_state.{odd}"]


def test_comments_in_a_configuration_are_skipped() -> None:
    text = 'name: "a # b"  # a comment with "quotes" and {\n# a whole line\nmax_batch_size: 0 # the last'
    assert parse(text) == {"name": ["a # b"], "max_batch_size": [0]}
