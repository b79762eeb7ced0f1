"""ONNX files through the whole path: states found, the graph in normal form, and what is no step refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import nsm
from nsm.errors import InputError, NsmError, UnsupportedError
from nsm.export.options import ExportOptions
from nsm.export.pipeline import export
from nsm.export.sources.onnx import normalize
from nsm.export.sources.onnx import source as onnx_source
from nsm.export.sources.onnx.source import load_onnx
from nsm.export.sources.state_options import StateOption, parse_states
from nsm.models.simple import SimpleNSM
from tests.export.foreign_graphs import silero
from tests.export.helpers import invoke, refused, succeeded
from tests.nsm.adapters.models import Language
from tests.small_models import make_sequences


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


def test_our_own_graphs_are_foreign_graphs_too(model_factory: Callable[..., SimpleNSM], tmp_path: Path) -> None:
    """With the states and the initial values that the metadata names."""
    checkpoint = tmp_path / "m.pt"
    nsm.save(model_factory(), checkpoint, samples=make_sequences(8, 40))
    first = export(checkpoint, ExportOptions(["onnxruntime"], output=tmp_path / "m.nsm", golden_steps=4))
    graph = tmp_path / "m.nsm" / "graphs" / "step.onnx"
    source = load_onnx(graph)
    start = first.state_init()
    found = source.initial_arrays(1)
    assert "0.mask" not in found, "what is only read is a constant"
    assert found["0.bank"].any()
    for name, value in found.items():
        np.testing.assert_array_equal(value, start[name])
    # Its token is a whole chunk of ids; without data such are made up.
    again = export(graph, ExportOptions(["onnxruntime"], output=tmp_path / "again.nsm", golden_steps=4))
    ids = make_sequences(1, 40)
    with nsm.open(first, "onnxruntime") as ours, nsm.open(again, "onnxruntime") as foreign:
        wanted, given = ours.run(ids)["outputs"], foreign.run(ids.reshape(1, 5, 8))["outputs"]
    np.testing.assert_allclose(given.reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-6)
    (tmp_path / "m.nsm" / "state_init.npz").rename(tmp_path / "elsewhere.npz")
    with pytest.raises(InputError, match=r"cannot be read from .*state_init\.npz.*--state PAST=PRESENT:FILE"):
        load_onnx(graph)


def test_a_graph_with_two_inputs_of_ours_says_what_is_left(exported: Path) -> None:
    with pytest.raises(InputError, match="expected exactly one input, found 2: tokens, valid"):
        load_onnx(exported / "graphs" / "step.onnx")


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
        r"expected exactly one input, found 2: input, sr.*--constant sr=16000",
    ),
    "no such constant": (None, {"constants": {"rate": "1"}}, InputError, "there is no input 'rate'"),
    "no number": (None, {"constants": {"sr": "fast"}}, InputError, "takes int64.*expected a number"),
    "no such input": (None, {"states": ["stat=stateN"]}, InputError, "no input 'stat'.*Did you mean state"),
    "no such output": (None, {"states": ["state=statN"]}, InputError, "no output 'statN'.*Did you mean stateN"),
    "one output twice": (
        None,
        {"states": ["state=stateN", "input=1"]},
        InputError,
        "The output stateN is to become the states state and input",
    ),
    "mis-paired": (None, {"states": ["state=output"]}, UnsupportedError, "Are they paired rightly"),
    "only states": (None, {"states": ["state=stateN", "input=output"]}, InputError, "exactly one input, found 0"),
    "grows": (
        edit(state=port("state", FLOAT, [2, "batch", "past"])),
        {},
        UnsupportedError,
        "axes 1 and 2 are open.*a cache that grows",
    ),
    "open input": (
        edit(input=port("input", FLOAT, ["batch", "time", "width"])),
        {},
        UnsupportedError,
        "axis 2 is dynamic besides the streams",
    ),
    "half": (edit(state=port("state", TensorProto.FLOAT16, [2, "batch", 12])), {}, InputError, "keeps its dtype"),
    "foreign operator": (contrib, {}, UnsupportedError, r"com.microsoft::QuickGelu.*not in the ONNX standard"),
    "output in double": (double_head, {}, UnsupportedError, r"The output wide is float64\[1, 1\]; expected float32"),
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
    with pytest.raises(UnsupportedError, match="answers 32 tokens in one call differently than in calls of"):
        load_onnx(frozen(tmp_path / "m.onnx"))


# -- lanes -------------------------------------------------------------------------------------------------------------


def mixing(path: Path, size: int | str = "batch") -> Path:
    """Adds the mean over its lanes to its state."""
    nodes = [
        helper.make_node("ReduceMean", ["x", "zero"], ["mean"], keepdims=1),
        helper.make_node("Add", ["h", "mean"], ["hn"]),
        helper.make_node("Add", ["x", "h"], ["y"]),
    ]
    inputs, outputs = [port(name, FLOAT, [size, 3]) for name in "xh"], [port(n, FLOAT, [size, 3]) for n in ("y", "hn")]
    constants = [numpy_helper.from_array(np.array([0]), "zero")]
    graph = helper.make_graph(nodes, "mixing", inputs, outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    return path


@pytest.mark.parametrize("size", ["batch", 4])
def test_lanes_that_are_mixed_are_found_out(size: int | str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"it mixes its lanes\. .*one stream at a time: --shape x=1,"):
        load_onnx(mixing(tmp_path / "m.onnx", size))


def test_one_lane_cannot_be_mixed(tmp_path: Path) -> None:
    assert load_onnx(mixing(tmp_path / "m.onnx", 1)).lanes == 1


def two_streams(model: onnx.ModelProto) -> None:
    """A state [2, 2, 12], of which the second axis is that of the lanes, as only running it tells."""
    edit(input=port("input", FLOAT, [2, 64]), state=port("state", FLOAT, [2, 2, 12]))(model)
    edit(output=port("output", FLOAT, [2, 1]), stateN=port("stateN", FLOAT, [2, 2, 12]))(model)


def test_where_the_lanes_are_is_found_by_running_it(tmp_path: Path) -> None:
    initial = np.arange(24, dtype=np.float32).reshape(2, 1, 12) / 24
    np.save(tmp_path / "start.npy", initial)
    states = [StateOption("state", "stateN", str(tmp_path / "start.npy"))]
    source = load_onnx(silero(tmp_path / "m.onnx", two_streams), states, {"sr": "16000"})
    assert source.lanes == 2
    assert "lanes on axis 1" in source.messages[1].text
    np.testing.assert_array_equal(source.initial_arrays(2)["state"], np.stack([initial[:, 0]] * 2))


def test_a_state_without_lanes_takes_one_stream(tmp_path: Path) -> None:
    alone = edit(state=port("state", FLOAT, [2, 1, 12]), stateN=port("stateN", FLOAT, [2, 1, 12]))
    assert load_onnx(silero(tmp_path / "m.onnx", alone), [], {"sr": "16000"}).lanes == 1


def test_several_streams_with_one_state_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="none of its axes has the size of the 3 streams"):
        load_onnx(
            silero(
                tmp_path / "m.onnx", edit(input=port("input", FLOAT, [3, 64]), state=port("state", FLOAT, [2, 1, 12]))
            ),
            [],
            {"sr": "16000"},
        )


# -- constants ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["16000.5", "1e3", "nan", "inf", "9223372036854775808", "", "1,2", "0x10"])
def test_a_constant_is_never_rounded(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"--constant sr={text}: the input sr takes int64\[\]"):
        load_onnx(silero(tmp_path / "m.onnx"), [], {"sr": text})


def test_a_large_constant_keeps_all_its_digits(tmp_path: Path) -> None:
    from nsm.export.sources.onnx.file.reading import fix_inputs, read_onnx

    model = read_onnx(silero(tmp_path / "m.onnx"))
    fix_inputs(model, {"sr": "9007199254740993"})  # 2^53 + 1, which no float64 is
    assert numpy_helper.to_array(model.graph.initializer[-1]) == 9007199254740993


@pytest.mark.parametrize(("text", "wanted"), [("1", True), ("0", False), ("True", True), ("0.5", None), ("2", None)])
def test_a_constant_of_bool_is_0_or_1(text: str, wanted: bool | None, tmp_path: Path) -> None:
    from nsm.export.sources.onnx.file.reading import fix_inputs, read_onnx

    model = read_onnx(silero(tmp_path / "m.onnx"))
    model.graph.input.append(port("flag", TensorProto.BOOL, []))
    if wanted is None:
        with pytest.raises(InputError, match="is not one of 0, 1, false, true"):
            fix_inputs(model, {"flag": text})
        return
    fix_inputs(model, {"flag": text})
    assert bool(numpy_helper.to_array(model.graph.initializer[-1])) is wanted


# -- what lies inside a node -------------------------------------------------------------------------------------------


def with_branches(model: onnx.ModelProto, inner: Callable[[str], onnx.GraphProto]) -> None:
    """The last node's answer goes through an If."""
    model.graph.node[-1].output[0] = "answer"
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    branches = {"then_branch": inner("then"), "else_branch": inner("else")}
    model.graph.node.append(helper.make_node("If", ["always"], ["output"], **branches))


def test_a_foreign_operator_inside_a_branch_is_named(tmp_path: Path) -> None:
    def inner(name: str) -> onnx.GraphProto:
        node = helper.make_node("QuickGelu", ["answer"], [f"{name}.out"], f"{name}.gelu", domain="com.microsoft")
        return helper.make_graph([node], name, [], [port(f"{name}.out", FLOAT, ["batch", 1])])

    def change(model: onnx.ModelProto) -> None:
        with_branches(model, inner)
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))

    with pytest.raises(UnsupportedError, match=r"the node (then|else)\.gelu is the operator com\.microsoft::QuickGelu"):
        load_onnx(silero(tmp_path / "m.onnx", change), [], {"sr": "16000"})


@pytest.mark.parametrize("where", ["weight", "attribute"])
def test_weights_outside_the_folder_are_refused_inside_a_branch(where: str, tmp_path: Path) -> None:
    def outside() -> TensorProto:
        tensor = numpy_helper.from_array(np.ones((1,), np.float32), "secret")
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", "../secret.bin"
        return tensor

    def inner(name: str) -> onnx.GraphProto:
        add = helper.make_node("Add", ["answer", "secret"], [f"{name}.out"])
        weights, nodes = ([outside()], [add]) if where == "weight" else ([], [add])
        if where == "attribute":
            nodes.insert(0, helper.make_node("Constant", [], ["secret"], value=outside()))
        return helper.make_graph(nodes, name, [], [port(f"{name}.out", FLOAT, ["batch", 1])], weights)

    (tmp_path / "inside").mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(4))
    with pytest.raises(InputError, match=r"'\.\./secret\.bin', which is outside the folder"):
        load_onnx(silero(tmp_path / "inside" / "m.onnx", lambda m: with_branches(m, inner)), [], {"sr": "16000"})


def test_slots_are_removed_from_our_models_only(tmp_path: Path) -> None:
    result = invoke("export", silero(tmp_path / "vad.onnx"), "-t", "ort", "--constant", "sr=1", "--compact")
    refused(result, 3, "--compact removes slots of a bank")


# -- what it is compared with ------------------------------------------------------------------------------------------


def test_a_rewriting_that_answers_differently_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Artifacts are compared with the original file, so a fault of the rewritten graph shows."""
    honest = normalize.normal_graph

    def spoiled(*arguments: Any) -> onnx.ModelProto:
        model = honest(*arguments)
        weight = next(item for item in model.graph.initializer if "head" in item.name)
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.1), weight.name))
        return model

    data = tmp_path / "frames.npy"
    np.save(data, np.random.default_rng(0).standard_normal((4, 20, 64)).astype(np.float32))
    options = ("--constant", "sr=16000", "-t", "ort", "--golden-steps", "5", "--data", data, "-o", tmp_path / "m.nsm")
    path = silero(tmp_path / "m.onnx")
    succeeded(invoke("export", path, *options))
    monkeypatch.setattr(onnx_source, "normal_graph", spoiled)
    refused(invoke("export", path, *options, "--force"), 5, "onnxruntime")


# -- examined ----------------------------------------------------------------------------------------------------------


def test_a_scalar_state_is_a_state(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["count"], ["number"], to=FLOAT),
        helper.make_node("Add", ["x", "number"], ["y"]),
        helper.make_node("Add", ["count", "one"], ["new_count"]),
    ]
    inputs = [port("x", FLOAT, [1, 4]), helper.make_tensor_value_info("count", TensorProto.INT64, [])]
    outputs = [port("y", FLOAT, [1, 4]), helper.make_tensor_value_info("new_count", TensorProto.INT64, [])]
    one = numpy_helper.from_array(np.array(1), "one")
    graph = helper.make_graph(nodes, "scalar", inputs, outputs, [one])
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    bundle = export(path, ExportOptions(["onnxruntime"], output=tmp_path / "m.nsm", num_samples=1, golden_steps=4))
    with nsm.open(bundle.path) as session:
        given = session.run(np.zeros((1, 5, 4), np.float32))["y"]
    np.testing.assert_array_equal(given[0, :, 0], np.arange(5))


def test_a_normalisation_in_training_mode_is_named(tmp_path: Path) -> None:
    names = ["scale", "bias", "mean", "var"]
    nodes = [
        helper.make_node("BatchNormalization", ["x", *names], ["n", "m1", "v1"], "norm", training_mode=1),
        helper.make_node("Add", ["h", "n"], ["hn"]),
        helper.make_node("Identity", ["hn"], ["y"]),
    ]
    constants = [numpy_helper.from_array(np.ones(3, np.float32), name) for name in names]
    inputs, outputs = [port(n, FLOAT, ["batch", 3]) for n in "xh"], [port(n, FLOAT, ["batch", 3]) for n in ("y", "hn")]
    graph = helper.make_graph(nodes, "norm", inputs, outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(tmp_path / "m"))
    (tmp_path / "m").rename(tmp_path / "m.onnx")
    with pytest.raises(
        UnsupportedError,
        match="the node norm is a BatchNormalization in training mode, which normalises by the statistics of the call",
    ):
        load_onnx(tmp_path / "m.onnx")


def counting(path: Path, first: bool) -> Path:
    """The output has a row of a table at the count: of the first stream's, or of each its own."""
    nodes = [
        helper.make_node("Mod", ["count", "five"], ["at"]),
        helper.make_node("Slice", ["at", "zero", "one"], ["of_first"]),
        helper.make_node("Gather", ["table", "of_first" if first else "at"], ["row"]),
        helper.make_node("Add", ["x", "row"], ["y"]),
        helper.make_node("Add", ["count", "one"], ["new_count"]),
    ]
    table = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    values = {"zero": np.array([0]), "one": np.array([1]), "five": np.array([5]), "table": table}
    constants = [numpy_helper.from_array(value, name) for name, value in values.items()]
    inputs = [port("x", FLOAT, ["batch", 3]), port("count", TensorProto.INT64, ["batch"])]
    outputs = [port("y", FLOAT, ["batch", 3]), port("new_count", TensorProto.INT64, ["batch"])]
    graph = helper.make_graph(nodes, "counting", inputs, outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    return path


def test_streams_of_other_ages_are_told_apart(tmp_path: Path) -> None:
    assert load_onnx(counting(tmp_path / "right.onnx", first=False)).lanes is None
    with pytest.raises(UnsupportedError, match=r"it mixes its lanes\. Does it take the counter or state of one stream"):
        load_onnx(counting(tmp_path / "wrong.onnx", first=True))


@pytest.mark.parametrize(
    ("size", "state", "to", "message"),
    [
        ("batch", ["batch", 3], [1, 3], r"takes any number of streams by its shapes, and one by experiment: with 3 it"),
        (2, [2, 2, 3], [1, 3], r"(?s)The graph does not run with 2 streams: .*Fix the sizes"),
        (
            2,
            [2, 3],
            [1, 3],
            r"(?s)does not run with calls of 1 tokens on 2 streams: .*Fix those that are said to be open",
        ),
    ],
)
def test_a_number_of_streams_that_is_built_in_is_found(
    size: int | str, state: list[int | str], to: list[int], message: str, tmp_path: Path
) -> None:
    nodes = [helper.make_node("Reshape", ["x", "to"], ["flat"]), helper.make_node("Add", ["flat", "h"], ["hn"])]
    nodes.append(helper.make_node("Add", ["x", "flat"], ["y"]))
    inputs, outputs = [port("x", FLOAT, [size, 3]), port("h", FLOAT, state)], [port("y", FLOAT, [size, 3])]
    outputs.append(port("hn", FLOAT, state))
    graph = helper.make_graph(nodes, "one", inputs, outputs, [numpy_helper.from_array(np.array(to), "to")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(tmp_path / "m"))
    (tmp_path / "m").rename(tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError, match=message):
        load_onnx(tmp_path / "m.onnx")
