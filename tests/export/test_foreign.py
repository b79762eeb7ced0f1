"""Foreign models through the whole path: modules from Python, programs of torch.export, and ONNX files."""

from __future__ import annotations

import io
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
from torch import nn

import nsm
from nsm.errors import CheckpointError, InputError, NsmError, UnsupportedError
from nsm.export.pt2 import check_archive
from nsm.export.state_names import find_states
from nsm.export.state_options import StateOption, parse_constants, parse_states
from nsm.export.torch_program import load_program
from tests.adapters.models import VoiceActivity
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


@pytest.mark.parametrize(
    ("kind", "inside"),
    [(nn.LSTM, ["module/LSTM"]), (nn.GRU, ["module/GRU/input", "module/GRU/recurrent"])],
)
def test_int8_reaches_the_inside_of_recurrent_layers(
    kind: type[nn.LSTM | nn.GRU], inside: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nsm.as_step(kind(96, 96), chunk_size=3)
    samples = np.random.default_rng(0).standard_normal((4, 48, 96)).astype(np.float32)
    exact = nsm.export_model(model, "onnxruntime", tmp_path / "fp32.nsm", samples, **SMALL)
    options = {"precision": "int8", "allow_slower": True, **SMALL}
    bundle = nsm.export_model(model, "onnxruntime", tmp_path / "int8.nsm", samples, **options)
    (artifact,) = bundle.manifest.artifacts
    assert artifact.quantization["low"] == inside
    assert artifact.quantization["float"] == {}
    assert 0 < artifact.parity["free_run_mean"] < 0.03
    sizes = [
        sum(file.size for file in item.manifest.artifacts[0].files if file.path.endswith(".bin"))
        for item in (exact, bundle)
    ]
    assert sizes[1] < 0.35 * sizes[0]
    given = tokens(model, 1, 10)
    with nsm.open(bundle) as session, nsm.reference(model, batch=1) as wanted:
        expected = wanted.feed(given)["outputs"]
        assert np.abs(session.feed(given)["outputs"] - expected).max() < 0.05 * np.abs(expected).max()


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
        (
            [],
            r"no state is named\. Name the states with --state INPUT=OUTPUT, where an output is also its place, 0 ",
        ),
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


@pytest.mark.parametrize("inside", [False, True])
def test_a_program_that_unpacks_to_more_than_it_has_is_refused(inside: bool, program: Path, tmp_path: Path) -> None:
    """The archive itself, or the one in it that holds the example inputs."""

    def packed(data: bytes) -> bytes:
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made := io.BytesIO(), "w", 8) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        return made.getvalue()

    path = tmp_path / "m.pt2"
    if inside:
        rewritten(program, path, lambda name, data: packed(data) if "sample_inputs" in name else data)
    else:
        path.write_bytes(packed(program.read_bytes()))
    with pytest.raises(
        CheckpointError, match=r"cannot be read as a program \(ValueError: \S+ in it is compressed; exp"
    ):
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


def test_constants_and_states_belong_to_foreign_models(checkpoint: Path, tmp_path: Path) -> None:
    result = invoke("export", checkpoint, "-t", "ort", "--state", "a=b", "-o", tmp_path / "m.nsm")
    refused(result, 2, "--state and --vocab-size belong to a foreign .pt2 or .onnx")
    result = invoke("export", checkpoint, "-t", "ort", "--constant", "a=b", "-o", tmp_path / "m.nsm")
    refused(result, 2, "--constant belongs to a foreign .onnx")


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
