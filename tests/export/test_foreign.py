"""Foreign models through the whole path: modules from Python, programs of torch.export, and ONNX files."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import nsm
from nsm.bundle import Bundle
from nsm.errors import BuildError, CheckpointError, InputError, NsmError, UnsupportedError
from nsm.export.onnx_source import load_onnx
from nsm.export.pt2 import check_archive
from nsm.export.state_options import StateOption, find_states, parse_constants, parse_states
from nsm.export.torch_program import load_program
from tests.adapters.models import Language, VoiceActivity
from tests.adapters.test_as_step import MODELS, tokens
from tests.export.helpers import invoke, refused, succeeded

SMALL: dict[str, Any] = {"num_samples": 2, "golden_steps": 6}


# -- modules from Python -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["voice", "language", "window", "decay", "lstm", "gru"])
def test_a_module_becomes_a_verified_bundle(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    samples = tokens(model, 4, 40)
    bundle = nsm.export_model(model, ["onnxruntime", "openvino"], tmp_path / "m.nsm", samples, batch=2, **SMALL)
    assert [item.parity["status"] for item in bundle.manifest.artifacts] == ["passed", "passed"]
    assert bundle.manifest.model["class"] == type(model.module).__name__
    assert bundle.trace().source == "recorded"
    given = tokens(model, 2, 9, seed=3)
    with nsm.open(bundle, "openvino") as session, nsm.reference(model, batch=2) as wanted:
        counts = [9, 4]
        np.testing.assert_allclose(
            session.feed(given, counts)["outputs"], wanted.feed(given, counts)["outputs"], rtol=1e-4, atol=1e-5
        )
        wanted.restore(session.snapshot(1), 0)
        first = session.spec.state_names[0]
        np.testing.assert_array_equal(wanted.read_state()[first][0], session.read_state()[first][1])


# -- programs of torch.export ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("program") / "voice.pt2"
    batch = torch.export.Dim("batch")
    arguments, shapes = (torch.zeros(2, 64), torch.zeros(2, 12)), ({0: batch}, {0: batch})
    torch.export.save(torch.export.export(VoiceActivity(), arguments, dynamic_shapes=shapes), path)
    return path


@pytest.mark.filterwarnings("ignore")
def test_a_program_becomes_a_verified_bundle(program: Path, tmp_path: Path) -> None:
    data, output = tmp_path / "frames.npy", tmp_path / "voice.nsm"
    np.save(data, np.random.default_rng(0).standard_normal((3, 20, 64)).astype(np.float32))
    options = ("-t", "ov", "--batch", "2", "--golden-steps", "5", "--data", data, "-o", output)
    result = invoke("export", program, "--state", "hidden=1", *options)
    succeeded(result)
    assert "state hidden: input hidden, output gru_cell, [1, 12], starts from zeros; found by --state" in " ".join(
        result.stderr.split()
    )
    torch.manual_seed(0)
    module = VoiceActivity()
    frames = np.load(data)[:2]
    with nsm.open(output) as session, torch.no_grad():
        given = session.feed(frames)["outputs"]
        hidden = torch.zeros(2, 12)
        for step in range(20):
            wanted, hidden = module(torch.from_numpy(frames[:, step]), hidden)
            np.testing.assert_allclose(given[:, step], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([], "no states were found by their names"),
        (["hiden=1"], "has no input 'hiden'.*Did you mean hidden"),
        (["hidden=5"], "has no output '5'"),
        (["hidden=0"], r"answers|shape"),
        (["hidden=1", "frame=0"], "one input is to be left .* \\[\\] are"),
        (["hidden=1", "frame=gru_cell"], r"one input is to be left"),
    ],
)
def test_states_that_do_not_fit_a_program_are_refused(program: Path, states: list[str], message: str) -> None:
    with pytest.raises(NsmError, match=message):
        load_program(program, parse_states(states))


@pytest.mark.filterwarnings("ignore")
def test_a_program_that_changes_its_buffers_is_refused(tmp_path: Path) -> None:
    class Counting(torch.nn.Module):
        count: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            self.count.add_(1)
            return x + self.count, h + x

    arguments = (torch.zeros(1, 3), torch.zeros(1, 3))
    torch.export.save(torch.export.export(Counting(), arguments), tmp_path / "m.pt2")
    with pytest.raises(UnsupportedError, match=r"keeps its tensors \['program.count'\].*Make it a state"):
        load_program(tmp_path / "m.pt2", parse_states(["h=1"]))


@pytest.mark.filterwarnings("ignore")
def test_a_program_over_ids_is_asked_how_many_there_are(tmp_path: Path) -> None:
    class Ids(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(9, 3)

        def forward(self, ids: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            h = 0.5 * h + self.embed(ids)
            return h, h * 1

    torch.export.save(
        torch.export.export(Ids(), (torch.zeros(1, dtype=torch.long), torch.zeros(1, 3))), tmp_path / "m.pt2"
    )
    with pytest.raises(InputError, match="--vocab-size N"):
        load_program(tmp_path / "m.pt2", parse_states(["h=1"]))
    checkpoint, _ = load_program(tmp_path / "m.pt2", parse_states(["h=1"]), 9)
    assert checkpoint.model.token_spec.maximum == 8
    assert checkpoint.model.lanes == 1


@pytest.mark.filterwarnings("ignore")
def test_a_program_may_nest_its_states_and_its_outputs(tmp_path: Path) -> None:
    class Nested(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = torch.nn.LSTMCell(3, 4)

        def forward(self, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> Any:
            hidden, cell = self.memory(x, state)
            return {"main": hidden * 2}, [hidden, cell]

    torch.manual_seed(0)
    module, path = Nested(), tmp_path / "m.pt2"
    one, two = torch.zeros(1, 4), torch.zeros(1, 4)
    torch.export.save(torch.export.export(module, (torch.zeros(1, 3), (one, one))), path)
    with pytest.raises(InputError, match=r"never reads its states \['state_0'\].*a tensor of its own for each"):
        load_program(path, parse_states(["state_0=1", "state_1=2"]))
    torch.export.save(torch.export.export(module, (torch.zeros(1, 3), (one, two))), path)
    # Places of outputs: the answer, hidden, cell. The names are those of torch.export.
    data = np.random.default_rng(0).standard_normal((2, 6, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", data)
    output = tmp_path / "m.nsm"
    options = ("-t", "ort", "--golden-steps", "5", "--data", tmp_path / "x.npy", "-o", output)
    succeeded(invoke("export", path, "--state", "state_0=1", "--state", "state_1=2", *options))
    with nsm.open(output) as session, torch.no_grad():
        given, state = session.feed(data[:1])["outputs"], (one, two)
        for step in range(6):
            wanted, state = module(torch.from_numpy(data[:1, step]), tuple(state))
            np.testing.assert_allclose(given[:, step], wanted["main"], rtol=1e-4, atol=1e-5)


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def rewritten(program: Path, path: Path, change: Callable[[str, bytes], bytes]) -> Path:
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))
    return path


def hostile_changes(made: Path) -> dict[str, tuple[Callable[[str, bytes], bytes], str]]:
    run = pickle.dumps(Touch(made))

    def json_change(name: str, edit: Callable[[Any], None]) -> Callable[[str, bytes], bytes]:
        def change(found: str, data: bytes) -> bytes:
            if not found.endswith(name):
                return data
            parsed = json.loads(data)
            edit(parsed)
            return json.dumps(parsed).encode()

        return change

    def pickled(parsed: Any) -> None:
        next(iter(parsed["config"].values()))["use_pickle"] = True

    def custom(parsed: Any) -> None:
        parsed["config"]["x"] = {"path_name": "custom_obj_0", "use_pickle": False}

    def calling(parsed: Any) -> None:
        parsed["graph_module"]["graph"]["nodes"][0]["target"] = "torch.hub.load"

    def sized(parsed: Any) -> None:
        text = "__import__('pathlib').Path('x').touch()"
        parsed["graph_module"]["graph"]["tensor_values"]["x"] = {"sizes": [{"as_expr": {"expr_str": text}}]}

    def adding(**node: Any) -> Callable[[str, bytes], bytes]:
        def add(parsed: Any) -> None:
            extra: dict[str, Any] = {
                "inputs": [],
                "outputs": [],
                "metadata": {},
                "is_hop_single_tensor_return": None,
                "name": "x",
            }
            parsed["graph_module"]["graph"]["nodes"].append(extra | node)

        return json_change("models/model.json", add)

    def passing(parsed: Any) -> None:
        parsed["graph_module"]["graph"]["nodes"][0]["inputs"][0]["arg"] = {"as_operator": "torch.hub.load"}

    def nesting(kind: str, context: object) -> Callable[[str, bytes], bytes]:
        def nest(parsed: Any) -> None:
            spec = json.dumps([1, {"type": kind, "context": context, "children_spec": []}])
            parsed["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = spec

        return json_change("models/model.json", nest)

    importing = {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": []}
    enumeration = json.dumps([{"__enum__": True, "fqn": "antigravity:x", "name": "x"}])
    return {
        "library function": (adding(target="_operator.attrgetter"), r"it calls _operator.attrgetter"),
        "file that is written": (adding(target="torch.ops.aten.save.default"), "it calls torch.ops.aten.save.default"),
        "file that is mapped": (adding(target="torch.ops.aten.from_file.default"), "it calls .*from_file.default"),
        "no operator": (adding(target="torch.ops.aten.__class__.mro"), "it calls torch.ops.aten.__class__.mro"),
        "printing": (adding(target="torch.ops.higher_order.print"), "it calls torch.ops.higher_order.print"),
        "function as argument": (json_change("models/model.json", passing), "it calls torch.hub.load"),
        "module in the nesting": (nesting("collections.defaultdict", importing), "in_spec nests arguments"),
        "enumeration in the nesting": (nesting("builtins.dict", enumeration), "in_spec nests arguments"),
        "pickled weight": (json_change("weights_config.json", pickled), "is a pickle"),
        "object": (json_change("constants_config.json", custom), "has the object custom_obj_0"),
        "call": (json_change("models/model.json", calling), "it calls torch.hub.load"),
        "expression": (json_change("models/model.json", sized), "a size is the expression"),
        "example inputs": (lambda name, data: run if "sample_inputs" in name else data, "holds Python objects"),
    }


@pytest.mark.parametrize("kind", hostile_changes(Path()))
def test_nothing_in_a_program_is_executed(kind: str, program: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    change, message = hostile_changes(made)[kind]
    hostile = rewritten(program, tmp_path / "hostile.pt2", change)
    with pytest.raises(CheckpointError, match=f"was refused.*{message}"):
        load_program(hostile, parse_states(["hidden=1"]))
    assert not made.exists()


@pytest.mark.parametrize(
    "name",
    [
        "voice/data/aotinductor/model/model.so",  # a library
        "voice/models/other.JSON",  # a program, under whatever name
        "voice/data/weights/model.pt",  # where weights were before: a pickle
        "voice/data/constants/model.pt",
        "voice/models/model.json\0",
        "version",  # of the format of 2.7, all of pickles
        "voice/version/../models/model.json",
        "voice/byteorder",  # twice
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_files_that_no_plain_program_has_are_refused(name: str, program: Path, tmp_path: Path) -> None:
    made, path = tmp_path / "made", tmp_path / "hostile.pt2"
    rewritten(program, path, lambda _, data: data)
    info = zipfile.ZipInfo("x")
    info.filename = info.orig_filename = name  # the class itself would cut it at the zero byte
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, pickle.dumps(Touch(made)))
    with pytest.raises(CheckpointError, match=r"was refused: it holds .*the files of torch.export.save"):
        load_program(path, parse_states(["hidden=1"]))
    assert not made.exists()


def test_of_two_archives_in_one_file_neither_is_believed(program: Path, tmp_path: Path) -> None:
    def renamed(old: str, new: str) -> bytes:
        with zipfile.ZipFile(program) as source, zipfile.ZipFile(tmp_path / "part", "w") as part:
            for info in source.infolist():
                part.writestr(info.filename.replace(old, new), source.read(info))
        return (tmp_path / "part").read_bytes()

    path = tmp_path / "glued.pt2"
    path.write_bytes(renamed("weight_0", "weight_9") + renamed("", ""))
    with zipfile.ZipFile(path) as archive:
        seen = archive.namelist()
    assert any(name.endswith("weight_0") for name in seen)
    assert "data/weights/weight_9" in torch._C.PyTorchFileReader(str(path)).get_all_records()
    with pytest.raises(CheckpointError, match="was refused: it has two tables of contents"):
        load_program(path, parse_states(["hidden=1"]))


@pytest.mark.parametrize("data", [b"", b"not a zip", pickle.dumps({"a": 1})])
def test_what_is_no_program_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_bytes(data)
    with pytest.raises(CheckpointError, match="cannot be read as a program"):
        check_archive(tmp_path / "m.pt2")
    with pytest.raises(CheckpointError, match="There is no file"):
        check_archive(tmp_path / "absent.pt2")
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        archive.writestr("m/readme", "hello")
    with pytest.raises(CheckpointError, match="holds no models"):
        check_archive(tmp_path / "other.pt2")


# -- the options -------------------------------------------------------------------------------------------------------


def test_states_are_parsed() -> None:
    found = parse_states(["a=b", "c=d:zeros", "e=f:0", "g=h:start.npy"])
    assert found == [
        StateOption("a", "b"),
        StateOption("c", "d", "zeros"),
        StateOption("e", "f:0"),
        StateOption("g", "h", "start.npy"),
    ]
    for text in ("a", "=b", "a="):
        with pytest.raises(InputError, match="expected is PAST=PRESENT"):
            parse_states([text])
    with pytest.raises(InputError, match="names the input a twice"):
        parse_states(["a=b", "a=c"])
    with pytest.raises(InputError, match="names the output b twice"):
        parse_states(["a=b", "c=b"])
    assert parse_constants(["sr=16000"]) == {"sr": "16000"}
    for texts in (["sr"], ["=1"], ["sr="], ["sr=1", "sr=2"]):
        with pytest.raises(InputError, match="expected is NAME=VALUE"):
            parse_constants(texts)


@pytest.mark.parametrize(
    ("past", "present"),
    [
        ("past_state.0.bank", "present_state.0.bank"),
        ("past_key_values.0.key", "present.0.key"),
        ("cache_last_channel", "new_cache_last_channel"),
        ("cached_avg_0", "new_cached_avg_0"),
        ("h_in", "h_out"),
        ("state", "stateN"),
        ("h0", "hn"),
        ("c_0", "cn"),
        ("h", "h_n"),
        ("conv_cache", "conv_cache_out"),
    ],
)
def test_states_are_found_by_the_names_that_others_give(past: str, present: str) -> None:
    (found,) = find_states(["x", past], ["y", present])
    assert (found.past, found.present, found.found) == (past, present, "its name")
    assert find_states(["x", past], ["y"]) == []


def test_an_initial_value_is_read_or_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "start.npy", np.arange(3, dtype=np.float32)[None])
    option = StateOption("h", "hn", str(tmp_path / "start.npy"))
    np.testing.assert_array_equal(option.initial((1, 3), "float32"), [[0, 1, 2]])
    for shape, dtype in (((1, 4), "float32"), ((1, 3), "int64")):
        with pytest.raises(InputError, match="expected are finite numbers"):
            option.initial(shape, dtype)
    with pytest.raises(InputError, match=r"cannot be read from .*absent.npy"):
        StateOption("h", "hn", str(tmp_path / "absent.npy")).initial((1,), "float32")


# -- ONNX files --------------------------------------------------------------------------------------------------------


def silero(path: Path, change: Callable[[onnx.ModelProto], None] | None = None) -> Path:
    """A voice activity detector as they are passed around: frames [B, 64], state [2, B, 12], a sample rate."""
    random = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array((random.standard_normal(shape) * 0.2).astype(np.float32), name)

    nodes = [
        helper.make_node("Cast", ["sr"], ["rate"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["rate", "base"], ["gain"]),
        helper.make_node("Mul", ["input", "gain"], ["scaled"]),
        helper.make_node("Unsqueeze", ["scaled", "zero"], ["sequence"]),
        helper.make_node("Split", ["state"], ["h", "c"], axis=0, num_outputs=2),
        helper.make_node("LSTM", ["sequence", "W", "R", "", "", "h", "c"], ["Y", "h1", "c1"], "lstm", hidden_size=12),
        helper.make_node("Concat", ["h1", "c1"], ["stateN"], axis=0),
        helper.make_node("Squeeze", ["h1", "zero"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "head"], ["logit"], "head"),
        helper.make_node("Sigmoid", ["logit"], ["output"]),
    ]
    inputs = [
        helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 64]),
        helper.make_tensor_value_info("state", TensorProto.FLOAT, [2, "batch", 12]),
        helper.make_tensor_value_info("sr", TensorProto.INT64, []),
    ]
    outputs = [
        helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 1]),
        helper.make_tensor_value_info("stateN", TensorProto.FLOAT, [2, "batch", 12]),
    ]
    constants = [
        numpy_helper.from_array(np.array(16000, np.float32), "base"),
        numpy_helper.from_array(np.array([0]), "zero"),
    ]
    constants += [weight("W", 1, 48, 64), weight("R", 1, 48, 12), weight("head", 12, 1)]
    graph = helper.make_graph(nodes, "vad", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    if change is not None:
        change(model)
    onnx.save(model, str(path))
    return path


def language_onnx(path: Path) -> Path:
    """Ids [batch, time] and two states [2, batch, 10], by torch's older exporter."""

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Language()

        def forward(self, ids: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y, (h, c) = self.model(ids, (h0, c0))
            return y, h, c

    torch.manual_seed(0)
    axes = {"ids": {0: "batch", 1: "time"}, "h0": {1: "batch"}, "c0": {1: "batch"}}
    axes |= {"logits": {0: "batch", 1: "time"}, "hn": {1: "batch"}, "cn": {1: "batch"}}
    arguments = (torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 2, 10), torch.zeros(2, 2, 10))
    names: dict[str, Any] = {"input_names": ["ids", "h0", "c0"], "output_names": ["logits", "hn", "cn"]}
    torch.onnx.export(Flat(), arguments, str(path), dynamic_axes=axes, dynamo=False, **names)
    return path


@pytest.mark.parametrize("batch", [1, 2])
def test_an_onnx_file_becomes_a_verified_bundle(batch: int, tmp_path: Path) -> None:
    data, output = tmp_path / "frames.npy", tmp_path / "vad.nsm"
    frames = np.random.default_rng(0).standard_normal((4, 20, 64)).astype(np.float32)
    np.save(data, frames)
    options = ("-t", "ov", "-t", "ort", "--batch", str(batch), "--golden-steps", "5", "--data", data, "-o", output)
    result = invoke("export", silero(tmp_path / "vad.onnx"), "--constant", "sr=8000", *options)
    succeeded(result)
    assert "state state: input state, output stateN, float32[2, 1, 12], lanes on axis 1" in " ".join(
        result.stderr.split()
    )
    import onnxruntime as ort

    plain = ort.InferenceSession(str(tmp_path / "vad.onnx"))
    state = np.zeros((2, batch, 12), np.float32)
    wanted = []
    for step in range(20):
        feed = {"input": frames[:batch, step], "state": state, "sr": np.array(8000)}
        answer, state = plain.run(None, feed)
        wanted.append(answer)
    for target in ("openvino", "onnxruntime"):
        with nsm.open(output, target) as session:
            given = session.feed(frames[:batch])["output"]
            np.testing.assert_allclose(given, np.stack(wanted, 1), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(session.read_state()["state"], np.moveaxis(state, 1, 0), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_graph_over_any_number_of_ids_is_stepped_in_any_pieces(tmp_path: Path) -> None:
    source = load_onnx(language_onnx(tmp_path / "lm.onnx"))
    assert source.token_spec.maximum == 10, "read off the embedding"
    assert source.lanes is None
    spec = source.spec(2, 4)
    assert [(entry.name, entry.inputs[0].shape) for entry in spec.entries] == [("step", (2, 4)), ("decode", (2, 1))]
    torch.manual_seed(0)
    module = Language()
    ids = np.random.default_rng(0).integers(0, 11, (2, 23))
    session = source.reference(spec)
    assert session is not None
    with session, torch.no_grad():
        wanted, (hidden, _) = module(torch.from_numpy(ids), (torch.zeros(2, 2, 10), torch.zeros(2, 2, 10)))
        parts = [session.feed(part)["logits"] for part in np.split(ids, [3, 4, 15], 1)]
        np.testing.assert_allclose(np.concatenate(parts, 1), wanted, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(session.read_state()["h0"], hidden.movedim(1, 0), rtol=1e-4, atol=1e-5)
        session.reset()
        lanes = session.feed(ids, [7, 0])["logits"]
        np.testing.assert_allclose(lanes[0, :7], wanted[0, :7], rtol=1e-4, atol=1e-5)
        assert not session.read_state()["h0"][1].any(), "a lane with nothing to do stays as it was"
    with pytest.raises(InputError, match=r"Token ids must lie in 0 \.\. 10; given 0 \.\. 11"):
        source.check_sequence(np.array([0, 11]))
    with pytest.raises(InputError, match="at least one token"):
        source.check_sequence(np.empty(0, np.int64))


def test_our_own_graphs_are_foreign_graphs_too(exported: Path) -> None:
    """With the states that the metadata names; what is only read or only written is not one."""
    with pytest.raises(InputError, match="one is to be left"):
        load_onnx(Bundle(exported).path / "graphs" / "step.onnx")


def edit(**changes: Any) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for name, value in changes.items():
            for port in (*model.graph.input, *model.graph.output):
                if port.name == name:
                    port.CopyFrom(value)

    return change


def port(name: str, kind: int, shape: list[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def contrib(model: onnx.ModelProto) -> None:
    model.graph.node[-1].domain, model.graph.node[-1].op_type = "com.microsoft", "QuickGelu"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def double_head(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Cast", ["output"], ["wide"], to=TensorProto.DOUBLE))
    model.graph.output[0].CopyFrom(port("wide", TensorProto.DOUBLE, ["batch", 1]))


FLOAT = TensorProto.FLOAT
REFUSED: dict[str, tuple[Callable[[onnx.ModelProto], None] | None, dict[str, Any], type[NsmError], str]] = {
    "two inputs": (
        None,
        {"constants": {}},
        InputError,
        r"but 2 are: input, sr.*--constant sr=16000",
    ),
    "no such constant": (None, {"constants": {"rate": "1"}}, InputError, "there is no input 'rate'"),
    "no number": (None, {"constants": {"sr": "fast"}}, InputError, "takes int64.*expected are a number"),
    "no such input": (None, {"states": ["stat=stateN"]}, InputError, "no input 'stat'.*Did you mean state"),
    "no such output": (None, {"states": ["state=statN"]}, InputError, "no output 'statN'.*Did you mean stateN"),
    "one output twice": (
        None,
        {"states": ["state=stateN", "input=1"]},
        InputError,
        "The output stateN is to become the states state and input",
    ),
    "mis-paired": (None, {"states": ["state=output"]}, UnsupportedError, "Are they paired rightly"),
    "only states": (None, {"states": ["state=stateN", "input=output"]}, InputError, "one is to be left, but 0"),
    "grows": (
        edit(state=port("state", FLOAT, [2, "batch", "past"])),
        {},
        UnsupportedError,
        "axis 2 is dynamic besides the streams.*a cache that grows",
    ),
    "open input": (
        edit(input=port("input", FLOAT, ["batch", "time", "width"])),
        {},
        UnsupportedError,
        "axis 2 is dynamic besides the streams",
    ),
    "half": (edit(state=port("state", TensorProto.FLOAT16, [2, "batch", 12])), {}, InputError, "keeps its dtype"),
    "foreign operator": (contrib, {}, UnsupportedError, r"com.microsoft::QuickGelu.*not in the ONNX standard"),
    "output in double": (double_head, {}, UnsupportedError, r"The output wide is float64\[1, 1\]; expected is float32"),
    "many lanes": (
        edit(input=port("input", FLOAT, [3, 64]), state=port("state", FLOAT, [2, 3, 12])),
        {"batch": 1},
        UnsupportedError,
        "takes 3 streams at a time; asked for are 1 lanes",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_graph_that_is_no_step_is_refused(kind: str, tmp_path: Path) -> None:
    change, options, error, message = REFUSED[kind]
    path = silero(tmp_path / "m.onnx", change)
    states, constants = parse_states(options.get("states", [])), options.get("constants", {"sr": "16000"})

    def use() -> None:
        load_onnx(path, states, constants).spec(options.get("batch", 1))

    with pytest.raises(error, match=message):
        use()


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no file"):
        load_onnx(tmp_path / "absent.onnx")
    for data in (b"", b"rubbish"):
        (tmp_path / "m.onnx").write_bytes(data)
        with pytest.raises(InputError, match="cannot be read as an ONNX model"):
            load_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/passwd", "a/../../weights.bin"])
def test_weights_outside_the_folder_are_refused(location: str, tmp_path: Path) -> None:
    def outside(model: onnx.ModelProto) -> None:
        tensor = next(item for item in model.graph.initializer if item.name == "W")
        (tmp_path / "weights.bin").write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", location

    (tmp_path / "inside").mkdir()
    with pytest.raises(InputError, match="which is outside the folder"):
        load_onnx(silero(tmp_path / "inside" / "m.onnx", outside), [], {"sr": "16000"})


def test_weights_beside_the_file_are_read_and_missing_ones_named(tmp_path: Path) -> None:
    path = silero(tmp_path / "m.onnx")
    model = onnx.load(str(path))
    onnx.save(model, str(path), save_as_external_data=True, location="w.bin", size_threshold=64)
    assert load_onnx(path, [], {"sr": "16000"}).parameters == 1 + 1 + 48 * 64 + 48 * 12 + 12 + 1
    (tmp_path / "w.bin").unlink()
    with pytest.raises(InputError, match=r"cannot be read from 'w\.bin'"):
        load_onnx(path, [], {"sr": "16000"})


def test_more_than_two_gigabytes_are_refused_before_they_are_read(tmp_path: Path) -> None:
    def huge(model: onnx.ModelProto) -> None:
        tensor = next(item for item in model.graph.initializer if item.name == "W")
        tensor.ClearField("raw_data")
        tensor.dims[:] = [30_000, 30_000]
        tensor.data_location = TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", "absent.bin"

    with pytest.raises(UnsupportedError, match=r"has 3\.6 GB of weights; .* up to 2 GB"):
        load_onnx(silero(tmp_path / "m.onnx", huge), [], {"sr": "16000"})


def frozen(path: Path) -> Path:
    """Says it takes any number of tokens, and uses the first of them for all."""
    nodes = [
        helper.make_node("Slice", ["x", "zero", "one", "one"], ["first"]),
        helper.make_node("Mul", ["x", "nothing"], ["no"]),
        helper.make_node("Add", ["no", "first"], ["y"]),
        helper.make_node("ReduceSum", ["x", "one"], ["sum"], keepdims=0),
        helper.make_node("Add", ["h", "sum"], ["hn"]),
    ]
    constants = [numpy_helper.from_array(np.array([v]), n) for n, v in (("zero", 0), ("one", 1))]
    constants.append(numpy_helper.from_array(np.array(0, np.float32), "nothing"))
    inputs = [port("x", FLOAT, ["batch", "time", 3]), port("h", FLOAT, ["batch", 3])]
    outputs = [port("y", FLOAT, ["batch", "time", 3]), port("hn", FLOAT, ["batch", 3])]
    nodes[0] = helper.make_node("Slice", ["x", "zero", "one", "one"], ["first"])
    graph = helper.make_graph(nodes, "frozen", inputs, outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    return path


def test_a_length_that_is_built_in_is_found_out(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="answers 32 tokens in one call differently than in calls of 16"):
        load_onnx(frozen(tmp_path / "m.onnx"))


def test_a_rewriting_that_answers_differently_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form that is exported is held against the file itself."""
    from nsm.export import onnx_normal, onnx_source

    honest = onnx_normal.normal_graph

    def spoiled(*arguments: Any) -> onnx.ModelProto:
        model = honest(*arguments)
        weight = next(item for item in model.graph.initializer if "head" in item.name)
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.1), weight.name))
        return model

    path = silero(tmp_path / "m.onnx")
    load_onnx(path, [], {"sr": "16000"})
    monkeypatch.setattr(onnx_source, "normal_graph", spoiled)
    with pytest.raises(BuildError, match="answers differently in the form that nsm gives it"):
        load_onnx(path, [], {"sr": "16000"})


def test_constants_and_states_belong_to_foreign_models(checkpoint: Path, tmp_path: Path) -> None:
    result = invoke("export", checkpoint, "-t", "ort", "--state", "a=b", "-o", tmp_path / "m.nsm")
    refused(result, 2, "--state and --vocab-size belong to a foreign .pt2 or .onnx")
    result = invoke("export", checkpoint, "-t", "ort", "--constant", "a=b", "-o", tmp_path / "m.nsm")
    refused(result, 2, "--constant belongs to a foreign .onnx")
    result = invoke("export", silero(tmp_path / "vad.onnx"), "-t", "ort", "--constant", "sr=1", "--compact")
    refused(result, 3, "--compact removes slots of a bank")


def test_a_gru_with_the_other_reset_gate_does_not_pass(tmp_path: Path) -> None:
    """The exporter's fault that parity has to catch: `linear_before_reset` flipped, with states that are not zero."""
    model = MODELS["gru"]()
    bundle = nsm.export_model(model, "onnx", tmp_path / "m.nsm", tokens(model, 4, 40), **SMALL)
    graph = bundle.path / "graphs" / "step.onnx"
    proto = onnx.load(str(graph), load_external_data=False)
    (node,) = (item for item in proto.graph.node if item.op_type == "GRU")
    (flag,) = (item for item in node.attribute if item.name == "linear_before_reset")
    assert flag.i == 1
    flag.i = 0
    onnx.save(proto, str(graph))
    from nsm.export.build import build_target, check_artifact
    from nsm.runtimes.targets import find_target

    artifact = build_target(bundle.path, bundle.manifest.spec, find_target("onnx"), None)
    _, report = check_artifact(bundle, artifact, bundle.trace())
    assert report is not None
    assert not report.passed
