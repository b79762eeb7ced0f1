"""Which outputs of a foreign ONNX graph are its states: shown by the graph, by feeding them back, or asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import nsm
from nsm.errors import InputError, RunError
from nsm.export.sources.onnx.file.reading import read_onnx
from nsm.export.sources.onnx.source import load_onnx
from nsm.export.sources.onnx.states.ambiguity import choices
from nsm.export.sources.onnx.states.pairing import Pairing, find_pairs
from nsm.export.sources.onnx.states.trial import Trial
from nsm.export.sources.state_options import parse_states
from tests.export.foreign_graphs import HALF, PLAIN, Ports, leaky, write
from tests.export.helpers import invoke, refused, succeeded, the_json


def found(path: Path, **options: Any) -> Pairing:
    return find_pairs(read_onnx(path), **options)


def states_of(pairing: Pairing) -> dict[str, str]:
    return {pair.past: pair.present for pair in pairing.states}


def canceller(path: Path, size: int = 6) -> Path:
    """An echo canceller: two signals come in, one goes out, and there is one state. Names pair the microphone too."""
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("Concat", ["mic_in", "ref"], ["both"], axis=1),
        helper.make_node("MatMul", ["both", "mixing"], ["heard"]),
        helper.make_node("Mul", ["state_in", "half"], ["faded"]),
        helper.make_node("Add", ["heard", "faded"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["state_out"]),
        helper.make_node("MatMul", ["state_out", "masking"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["mask"]),
        helper.make_node("Mul", ["mic_in", "mask"], ["mic_out"]),
        helper.make_node("MatMul", ["state_out", "speech"], ["vad"]),
    ]
    constants = {
        **HALF,
        "speech": np.ones((4, 1), np.float32),
        "mixing": random.standard_normal((2 * size, 4)).astype(np.float32),
        "masking": random.standard_normal((4, size)).astype(np.float32),
    }
    inputs: Ports = {"mic_in": [1, size], "ref": [1, size], "state_in": [1, 4]}
    return write(path, nodes, inputs, {"mic_out": [1, size], "vad": [1, 1], "state_out": [1, 4]}, constants)


def test_a_microphone_is_no_state_whatever_it_is_called(tmp_path: Path) -> None:
    path = canceller(tmp_path / "m.onnx")
    with pytest.raises(InputError) as caught:
        load_onnx(path)
    told = str(caught.value)
    assert told.startswith(f"It is ambiguous which inputs of {path} are states.")
    assert "inputs: mic_in float32[1, 6], ref float32[1, 6], state_in float32[1, 4]" in told
    assert "outputs: mic_out float32[1, 6], vad float32[1, 1], state_out float32[1, 4]" in told
    assert re.search(r"state_in -> state_out: a state, by its name; fed back, it changes later outputs by \d+%", told)
    assert "mic_in -> mic_out: data, by its name; fed back, it changes no later output" in told, "from zeros it stays"
    assert "If mic_in and ref are data: a step takes one input besides its states: join mic_in and ref" in told
    copied = f"nsm-export {path} --target onnxruntime --state state_in=state_out --state ref=mic_out"
    assert told.splitlines()[-1] == f"If mic_out is what ref takes in the next step: {copied}"
    result = invoke("export", path, "-t", "ort", "-o", tmp_path / "m.nsm")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: It is ambiguous")
    assert not (tmp_path / "m.nsm").exists()


def test_with_a_state_named_nothing_is_guessed_beside_it(tmp_path: Path) -> None:
    path = canceller(tmp_path / "m.onnx")
    with pytest.raises(InputError, match=r"Besides the states \(state_in\), .* found 2: mic_in, ref"):
        load_onnx(path, parse_states(["state_in=state_out"]))
    source = load_onnx(path, parse_states(["state_in=state_out", "ref=mic_out"]))
    assert source.config["states"] == {"state_in": ["state_in", "state_out"], "ref": ["ref", "mic_out"]}


def enhancer(path: Path, window: int, hop: int) -> Path:
    """`wav_in` and `wav_out`, and a cache that numbers tell apart: the input is windowed, the overlap is kept."""
    nodes = [
        helper.make_node("Slice", ["wav_in", "zero", "hop", "one"], ["head"]),
        helper.make_node("Mul", ["cache_in_0", "half"], ["faded"]),
        helper.make_node("Add", ["head", "faded"], ["cache_out_0"]),
        helper.make_node("Identity", ["cache_out_0"], ["kept"]),
        helper.make_node("Tanh", ["kept"], ["wav_out"]),
    ]
    constants = {**HALF, "zero": np.array([0]), "hop": np.array([hop]), "one": np.array([1])}
    inputs: Ports = {"wav_in": [1, window], "cache_in_0": [1, hop]}
    return write(path, nodes, inputs, {"wav_out": [1, hop], "cache_out_0": [1, hop]}, constants)


@pytest.mark.parametrize("window", [6, 4])
def test_the_input_that_is_left_is_the_data(window: int, tmp_path: Path) -> None:
    """With windows that overlap the shapes differ; where they are equal, one input must be left for the data."""
    path = enhancer(tmp_path / "m.onnx", window, 4)
    source = load_onnx(path)
    assert source.config["input"] == "wav_in"
    assert source.config["states"] == {"cache_in_0": ["cache_in_0", "cache_out_0"]}


def unnamed(nodes: Sequence[onnx.NodeProto], **names: str) -> list[onnx.NodeProto]:
    """The nodes with other names for their values, as exporters number them."""
    made = []
    for node in nodes:
        new = onnx.NodeProto()
        new.CopyFrom(node)
        for values in (new.input, new.output):
            values[:] = [names.get(value, value) for value in values]
        made.append(new)
    return made


def recurrent(path: Path, kind: str = "LSTM") -> Path:
    """One recurrent operator with numbers for names, whose states come out in the other order."""
    random = np.random.default_rng(0)
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    weights = {
        "W": random.standard_normal((1, gates * 5, 5)).astype(np.float32),
        "R": random.standard_normal((1, gates * 5, 5)).astype(np.float32),
    }
    starts, ends = (["i1", "i2"], ["o3", "o2"]) if kind == "LSTM" else (["i1"], ["o3"])
    nodes = [
        helper.make_node("Unsqueeze", ["i0", "axis"], ["sequence"]),
        helper.make_node(kind, ["sequence", "W", "R", "", "", *starts], ["Y", *ends], "memory", hidden_size=5),
        helper.make_node("Squeeze", ["Y", "axes"], ["o1"]),
    ]
    shape = [1, 1, 5]
    inputs: Ports = {"i0": [1, 5], **dict.fromkeys(starts, shape)}
    constants = {**weights, "axis": np.array([0]), "axes": np.array([0, 1])}
    return write(path, nodes, inputs, {"o1": [1, 5], **dict.fromkeys(sorted(ends), shape)}, constants)


@pytest.mark.parametrize(
    ("kind", "states"), [("LSTM", {"i1": "o3", "i2": "o2"}), ("GRU", {"i1": "o3"}), ("RNN", {"i1": "o3"})]
)
def test_a_recurrent_operator_shows_its_states(kind: str, states: dict[str, str], tmp_path: Path) -> None:
    path = recurrent(tmp_path / "m.onnx", kind)
    pairing = found(path)
    assert states_of(pairing) == states
    assert all(f"the {kind} node memory; fed back, it changes" in pair.found for pair in pairing.states)
    x = np.random.default_rng(1).standard_normal((1, 7, 5)).astype(np.float32)
    succeeded(
        invoke("export", path, "-t", "ort", "--num-samples", "2", "--golden-steps", "4", "-o", tmp_path / "m.nsm")
    )
    with nsm.open(tmp_path / "m.nsm") as session:
        given = session.run(x)["o1"]
    plain, held = ort.InferenceSession(str(path)), dict.fromkeys(states, np.zeros((1, 1, 5), np.float32))
    for place in range(7):
        outputs = dict(
            zip([o.name for o in plain.get_outputs()], plain.run(None, {"i0": x[:, place], **held}), strict=True)
        )
        held = {past: outputs[present] for past, present in states.items()}
        np.testing.assert_array_equal(given[:, place], outputs["o1"])


def test_a_graph_whose_names_contradict_it_is_wired_as_it_is(tmp_path: Path) -> None:
    """By their names h goes with hn and c with cn; the operator gives them the other way around."""
    path = recurrent(tmp_path / "m.onnx")
    model = onnx.load(str(path))
    names = {"i1": "h", "i2": "c", "o3": "cn", "o2": "hn"}
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
    nodes = unnamed(list(model.graph.node), **names)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, str(path))
    assert states_of(found(path)) == {"h": "cn", "c": "hn"}


def test_a_window_and_a_count_show_themselves(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Slice", ["a", "one", "end", "one"], ["kept"]),
        helper.make_node("Concat", ["kept", "x"], ["b"], axis=1),
        helper.make_node("ReduceMean", ["b", "one"], ["mean"]),
        helper.make_node("Add", ["n", "step"], ["m"]),
        helper.make_node("Add", ["k", "step"], ["l"]),
        helper.make_node("Add", ["m", "l"], ["both"]),
        helper.make_node("Cast", ["both"], ["age"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["mean", "age"], ["y"]),
    ]
    constants = {"one": np.array([1]), "end": np.array([4]), "step": np.array([1])}
    path = write(
        tmp_path / "m.onnx", nodes, {"x": [1, 1, 3], "a": [1, 4, 3]}, {"y": [1, 1, 3], "b": [1, 4, 3]}, constants
    )
    model = onnx.load(str(path))
    for name in "nk":
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, [1]))
    for name in "lm":
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.INT64, [1]))
    onnx.save(model, str(path))
    pairing = found(path)
    assert states_of(pairing) == {"a": "b", "n": "m", "k": "l"}
    assert [pair.proof for pair in pairing.states] == ["rows that move on", *["a count that goes on"] * 2]


def test_values_that_pass_through_are_no_window(tmp_path: Path) -> None:
    """A clipped signal has most of its numbers in the output, at the same places."""
    nodes = [
        *leaky()[:2],
        helper.make_node("Clip", ["x", "low"], ["passed"]),
        helper.make_node("Add", ["hn", "x"], ["y"]),
    ]
    path = write(
        tmp_path / "m.onnx", nodes, PLAIN[0], {**PLAIN[1], "passed": ["batch", 3]}, {**HALF, "low": np.float32(-9)}
    )
    assert states_of(found(path)) == {"h": "hn"}


def running_sum(path: Path) -> Path:
    """Any number of tokens [batch, time, 3], and the sum so far, with nothing in the names."""
    nodes = [
        helper.make_node("CumSum", ["a", "one"], ["summed"]),
        helper.make_node("Add", ["summed", "b"], ["c"]),
        helper.make_node("Slice", ["c", "last", "end", "one_"], ["d"]),
        helper.make_node("Slice", ["a", "last", "end", "one_"], ["e"]),
    ]
    constants = {"one": np.array(1), "one_": np.array([1]), "last": np.array([-1]), "end": np.array([2**31])}
    inputs: Ports = {"a": ["batch", "time", 3], "b": ["batch", 1, 3]}
    outputs: Ports = {"c": ["batch", "time", 3], "d": ["batch", 1, 3], "e": ["batch", 1, 3]}
    return write(path, nodes, inputs, outputs, constants)


def test_a_split_that_does_not_show_tells_the_states(tmp_path: Path) -> None:
    path = running_sum(tmp_path / "m.onnx")
    model = onnx.load(str(path))
    model.graph.node[2].CopyFrom(helper.make_node("Slice", ["c", "last", "end", "axis"], ["d"]))
    model.graph.node[3].CopyFrom(helper.make_node("Slice", ["a", "last", "end", "axis"], ["e"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axis"))
    del model.graph.output[2]  # an answer has a row for every token
    onnx.save(model, str(path))
    pairing = found(path)
    assert states_of(pairing) == {"b": "d"}
    assert pairing.states[0].proof == "one call, which gives what two calls give with it"
    assert load_onnx(path).config["states"] == {"b": ["b", "d"]}


def twins(path: Path) -> Path:
    """Two inputs that nothing tells apart, and one output of their shape."""
    nodes = [
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("Mul", ["sum", "half"], ["c"]),
        helper.make_node("ReduceSum", ["c"], ["d"], keepdims=0),
        helper.make_node("Reshape", ["d", "shape"], ["e"]),
    ]
    constants = {**HALF, "shape": np.array([1, 1])}
    return write(path, nodes, {"a": [1, 3], "b": [1, 3]}, {"c": [1, 3], "e": [1, 1]}, constants)


def test_two_inputs_that_the_experiment_cannot_tell_apart_are_asked_for(tmp_path: Path) -> None:
    path = twins(tmp_path / "m.onnx")
    pairing = found(path)
    assert not pairing.states
    assert [
        (choice.condition, choice.advice.split(" --target onnxruntime ")[1]) for choice in choices(path, pairing)
    ] == [
        ("c is what b takes in the next step", "--state b=c"),
        ("c is what a takes in the next step", "--state a=c"),
    ]
    with pytest.raises(InputError, match="It is ambiguous"):
        load_onnx(path)
    assert load_onnx(path, parse_states(["b=c"])).config["input"] == "a"
    with pytest.raises(InputError, match="It is ambiguous"):
        load_onnx(path, data_input="a")  # whether b is a state is still not seen
    with pytest.raises(InputError, match="No states were found among"):
        load_onnx(path, constants={"b": "1"})


def test_more_ways_than_a_person_reads_are_cut(tmp_path: Path) -> None:
    names = [f"i{place}" for place in range(5)]
    nodes = [helper.make_node("Sum", names, ["sum"])]
    nodes += [helper.make_node("Mul", ["sum", f"f{place}"], [f"o{place}"]) for place in range(5)]
    inputs: Ports = {name: [1, 3] for name in names}
    outputs: Ports = {f"o{place}": [1, 3] for place in range(5)}
    factors = {f"f{place}": np.float32(0.1 + place / 10) for place in range(5)}
    path = write(tmp_path / "m.onnx", nodes, inputs, outputs, factors)
    assert len(choices(path, found(path))) == 8


@pytest.mark.parametrize(("factor", "told"), [(100.0, "does not stay in range"), (0.0, "changes no later output")])
def test_a_name_is_not_believed_against_the_experiment(factor: float, told: str, tmp_path: Path) -> None:
    """`state_in` and `state_out`; but fed back, it grows without end, or is read and changes nothing."""
    nodes = [
        helper.make_node("Mul", ["state_in", "factor"], ["grown"]),
        helper.make_node("Add", ["grown", "x"], ["state_out"]),
        helper.make_node("Add", ["state_out", "x"], ["y"]),
    ]
    inputs: Ports = {"x": [1, 3], "state_in": [1, 3]}
    outputs: Ports = {"y": [1, 3], "state_out": [1, 3]}
    path = write(tmp_path / "m.onnx", nodes, inputs, outputs, {"factor": np.float32(factor)})
    with pytest.raises(InputError, match=rf"state_in -> state_out: data, by its name; fed back, it {told}"):
        load_onnx(path)


def test_a_graph_in_which_all_inputs_are_called_like_states_is_asked_about(tmp_path: Path) -> None:
    """An observation is a state too, in another sense."""
    nodes = [
        helper.make_node("Mul", ["hidden", "half"], ["faded"]),
        helper.make_node("Add", ["faded", "state"], ["hidden_out"]),
        helper.make_node("Sub", ["state", "hidden_out"], ["state_out"]),
        helper.make_node("ReduceSum", ["state_out"], ["sum"], keepdims=0),
        helper.make_node("Reshape", ["sum", "shape"], ["y"]),
    ]
    inputs: Ports = {"state": [1, 3], "hidden": [1, 3]}
    outputs: Ports = {"state_out": [1, 3], "hidden_out": [1, 3], "y": [1, 1]}
    path = write(tmp_path / "m.onnx", nodes, inputs, outputs, {**HALF, "shape": np.array([1, 1])})
    with pytest.raises(InputError, match="It is ambiguous"):
        load_onnx(path)
    source = load_onnx(path, data_input="state")
    assert source.config["states"] == {"hidden": ["hidden", "hidden_out"]}
    data = invoke("export", path, "-t", "ort", "--input", "state", "-o", tmp_path / "m.nsm", "--dry-run")
    succeeded(data)


def test_an_output_that_is_called_like_a_state_may_be_none(tmp_path: Path) -> None:
    nodes = [*leaky(), helper.make_node("Mul", ["hn", "half"], ["cn"])]
    path = write(tmp_path / "m.onnx", nodes, PLAIN[0], {**PLAIN[1], "cn": ["batch", 3]}, HALF)
    refused(invoke("export", path, "-t", "ort", "-o", tmp_path / "m.nsm"), 2, "gives cn", "--no-state cn")
    options = ("--no-state", "cn", "--num-samples", "2", "--golden-steps", "4")
    succeeded(invoke("export", path, "-t", "ort", "-o", tmp_path / "m.nsm", *options))
    assert load_onnx(path, no_states=["cn"]).config["outputs"] == ["y", "cn"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_input": "z"}, "The graph has no input 'z'"),
        ({"no_states": ["z"]}, "The graph has no output 'z'"),
        ({"states": ["h=hn"], "data_input": "h"}, "--input h contradicts --state h=hn"),
        ({"states": ["h=hn"], "no_states": ["hn"]}, "--no-state hn contradicts --state h=hn"),
    ],
)
def test_what_is_said_must_fit_the_graph(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", leaky(), *PLAIN, HALF)
    with pytest.raises(InputError, match=message):
        load_onnx(path, parse_states(options.pop("states", [])), **options)


@pytest.mark.parametrize("option", ["--input", "--no-state"])
def test_these_options_belong_to_onnx(option: str, checkpoint: Path) -> None:
    refused(invoke("export", checkpoint, "-t", "ort", option, "x"), 2, f"{option} applies to foreign .onnx")


# -- the experiment ----------------------------------------------------------------------------------------------------


def test_the_experiment_measures_what_a_plain_loop_does(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", leaky(), {"x": [1, 3], "h": [1, 3]}, {"y": [1, 3], "hn": [1, 3]}, HALF)
    trial = Trial(read_onnx(path))
    h: np.ndarray = np.zeros((1, 3), np.float32)
    for step in range(8):
        h = h / 2 + trial.made_up(step, known=["h"])["x"]
    last = trial.made_up(8, known=["h"])["x"]
    whole, without = h / 2 + last, last
    wanted = float(np.abs(whole - without).max() / np.abs(whole).max())
    assert trial.effects({"h": "hn"}) == {"h": pytest.approx(wanted, rel=1e-5)}
    assert trial.effects({}) == {}


def test_an_experiment_starts_from_the_default_value(tmp_path: Path) -> None:
    """A state that divides by itself cannot start from zeros."""
    nodes = [
        helper.make_node("Div", ["x", "h"], ["ratio"]),
        helper.make_node("Abs", ["ratio"], ["size"]),
        helper.make_node("Add", ["size", "half"], ["more"]),
        helper.make_node("Min", ["more", "two"], ["hn"]),
        helper.make_node("Identity", ["ratio"], ["y"]),
    ]
    constants = {**HALF, "two": np.float32(2), "h": np.ones((1, 3), np.float32)}
    path = write(tmp_path / "m.onnx", nodes, {"x": [1, 3], "h": [1, 3]}, {"y": [1, 3], "hn": [1, 3]}, constants)
    source = load_onnx(path)
    np.testing.assert_array_equal(source.initial_arrays(1)["h"], np.ones((1, 3)))
    assert "fed back, it changes later outputs by" in source.messages[1].text


def test_a_graph_that_does_not_run_on_made_up_inputs_says_so(tmp_path: Path) -> None:
    nodes = [helper.make_node("Pad", ["x", "pads"], ["wide"], mode="reflect"), *leaky()[:2]]
    nodes.append(helper.make_node("Identity", ["wide"], ["y"]))
    constants = {**HALF, "pads": np.array([0, 3, 0, 3])}
    path = write(
        tmp_path / "m.onnx", nodes, {"x": [1, "width"], "h": [1, "width"]}, {"y": [1, None], "hn": [1, None]}, constants
    )
    with pytest.raises(RunError, match="ONNX Runtime failed on made-up inputs"):
        Trial(read_onnx(path)).moved()
    pairing = found(path)
    assert states_of(pairing) == {"h": "hn"}
    assert pairing.states[0].found == "its name"
    assert pairing.trouble
    result = invoke("inspect", path)
    succeeded(result)
    assert "The graph could not be run with dynamic axes of size 1. ONNX Runtime failed" in " ".join(
        result.stdout.split()
    )
    assert "--shape x=1,SIZE --state h=hn" in result.stdout


# -- nsm inspect -------------------------------------------------------------------------------------------------------


def test_inspect_shows_pairs_and_the_command_to_copy(tmp_path: Path) -> None:
    path = recurrent(tmp_path / "m.onnx")
    result = invoke("inspect", path)
    told = " ".join(succeeded(result).split())
    assert "input i0 float32 [1, 5]" in told
    assert "i1 o3 a state the LSTM node memory; fed back, it changes later outputs by" in told
    command = next(line.strip() for line in result.stdout.splitlines() if "nsm-export" in line)
    assert command == f"nsm-export {path} --target onnxruntime --state i1=o3 --state i2=o2"
    data = the_json(invoke("inspect", path, "--json"))
    assert data["data"] == ["i0"]
    assert [(item["past"], item["present"]) for item in data["states"]] == [("i1", "o3"), ("i2", "o2")]
    assert data["choices"] == [{"condition": "", "advice": command}]
    again: list[str | Path] = [
        "export",
        *command.split()[1:],
        "--num-samples",
        "2",
        "--golden-steps",
        "4",
        "-o",
        tmp_path / "m.nsm",
    ]
    succeeded(invoke(*again))


def test_inspect_shows_what_is_ambiguous_and_what_has_no_state(tmp_path: Path) -> None:
    told = " ".join(succeeded(invoke("inspect", canceller(tmp_path / "m.onnx"))).split())
    assert "mic_in mic_out data its name" in told
    assert "ref mic_out a state or data its shape and dtype" in told
    assert "If mic_in and ref are data: a step takes one input besides its states" in told
    path = write(tmp_path / "n.onnx", [helper.make_node("Add", ["x", "x"], ["y"])], {"x": [1, 3]}, {"y": [1, 3]})
    assert "No states were found." in succeeded(invoke("inspect", path))
    assert the_json(invoke("inspect", path, "--json"))["choices"] == []
    refused(invoke("inspect", tmp_path / "absent.onnx"), 2, "There is no file")


def test_inspect_knows_our_own_graphs(exported: Path) -> None:
    told = " ".join(succeeded(invoke("inspect", exported / "graphs" / "decode.onnx")).split())
    assert "the metadata nsm.states" in told
    assert "takes one input besides its states: join tokens and valid" in told


def test_inspect_asks_for_constants_and_sizes(tmp_path: Path) -> None:
    """Defaults are no settings: an input that has one is asked for as any other."""
    nodes = [*leaky(), helper.make_node("Mul", ["y", "gain"], ["z"])]
    inputs: Ports = {"x": ["batch", 3, "width"], "h": ["batch", 3, 1], "gain": []}
    outputs: Ports = {"z": ["batch", 3, None], "hn": ["batch", 3, None]}
    path = write(tmp_path / "m.onnx", nodes, inputs, outputs, {**HALF, "gain": np.float32(2)})
    told = succeeded(invoke("inspect", path))
    assert "--shape x=batch,3,SIZE --constant gain=VALUE --state h=hn" in told
