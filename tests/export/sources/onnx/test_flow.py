"""What the flow of values in a foreign ONNX graph tells: states that nothing reads, decisions, restarts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

import nsm
from nsm.errors import InputError, UnsupportedError
from nsm.export.sources.onnx.file.reading import read_onnx
from nsm.export.sources.onnx.source import load_onnx
from nsm.export.sources.onnx.states.dependence import dependence_of
from nsm.export.sources.onnx.states.recurrent import restarts
from tests.export.foreign_graphs import FLOAT, HALF, PLAIN, Ports, leaky, write
from tests.export.helpers import invoke, refused, succeeded

BOOL = TensorProto.BOOL


def body(name: str, nodes: list[onnx.NodeProto], inputs: dict[str, int], outputs: dict[str, int]) -> onnx.GraphProto:
    """A branch, or the body of a loop."""
    given, made = ([helper.make_tensor_value_info(n, k, None) for n, k in ports.items()] for ports in (inputs, outputs))
    return helper.make_graph(nodes, name, given, made)


def branches(kinds: tuple[str, str] = ("Add", "Sub")) -> dict[str, onnx.GraphProto]:
    names = ("then_branch", "else_branch")
    return {
        name: body(name, [helper.make_node(kind, ["faded", "x"], [f"{name}.out"])], {}, {f"{name}.out": FLOAT})
        for name, kind in zip(names, kinds, strict=True)
    }


def deciding(path: Path, size: int | str = "batch") -> Path:
    """Loud frames are added to the state, others subtracted: one decision for all lanes, which 3 tokens seldom show."""
    nodes = [
        helper.make_node("Mul", ["h", "half"], ["faded"]),
        helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
        helper.make_node("Greater", ["mean", "loud"], ["decided"]),
        helper.make_node("If", ["decided"], ["hn"], "choose", **branches()),
        helper.make_node("Tanh", ["hn"], ["y"]),
    ]
    inputs: Ports = {"x": [size, 3], "h": [size, 3]}
    return write(path, nodes, inputs, {"y": [size, 3], "hn": [size, 3]}, {**HALF, "loud": np.float32(3)})


def test_a_graph_that_decides_by_its_data_has_one_stream_and_so_has_its_reference(tmp_path: Path) -> None:
    path, data = deciding(tmp_path / "m.onnx"), tmp_path / "x.npy"
    frames = np.random.default_rng(0).standard_normal((3, 40, 3)).astype(np.float32) * 4
    np.save(data, frames)
    assert (frames.mean(-1) > 3).any()
    options = ("-t", "ort", "-t", "ov", "--data", data, "--golden-steps", "40", "-o", tmp_path / "m.nsm")
    succeeded(invoke("export", path, *options))
    plain = ort.InferenceSession(str(path))
    for target in ("onnxruntime", "openvino"):
        with nsm.open(tmp_path / "m.nsm", target) as session:
            for stream in frames:
                session.reset()
                given, h = session.run(stream[None])["y"], np.zeros((1, 3), np.float32)
                for place in range(40):
                    wanted, h = plain.run(["y", "hn"], {"x": stream[None, place], "h": h})
                    np.testing.assert_allclose(given[:, place], wanted, rtol=1e-5, atol=1e-6)
    message = refused(invoke("export", path, *options, "--batch", "2", "--force"), 3, "Asked for are 2 lanes")
    assert "takes one stream at a time: its If node choose decides by values of the stream" in message
    with pytest.raises(UnsupportedError, match="takes 4 streams at a time, and its If node choose decides"):
        load_onnx(deciding(tmp_path / "four.onnx", 4))


def test_what_depends_on_a_shape_only_decides_nothing(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["h", "half"], ["faded"]),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["size"]),
        helper.make_node("Greater", ["size", "many"], ["decided"]),
        helper.make_node("If", ["decided"], ["hn"], **branches()),
        helper.make_node("Tanh", ["hn"], ["y"]),
    ]
    path = write(tmp_path / "m.onnx", nodes, *PLAIN, {**HALF, "zero": np.array(0), "many": np.array(9)})
    assert load_onnx(path).lanes is None


def loop(path: Path, ending: str, trips: str = "three") -> Path:
    """h' = h / 2 + x, then doubled a few times; the loop may end by `ending`, which is in its body."""
    inside = [
        helper.make_node("Add", ["held", "held"], ["doubled"]),
        helper.make_node("ReduceMax", ["doubled"], ["largest"], keepdims=0),
        helper.make_node("Less", ["largest", "nine"], ["small"]),
        helper.make_node("Identity", ["going"], ["always"]),
        helper.make_node("Less", ["number", "three"], ["early"]),
        helper.make_node("Identity", [ending], ["goes"]),
    ]
    graph = body(
        "body", inside, {"number": TensorProto.INT64, "going": BOOL, "held": FLOAT}, {"goes": BOOL, "doubled": FLOAT}
    )
    nodes = [
        *leaky()[:2],
        helper.make_node("ReduceMax", ["x"], ["peak"], keepdims=0),
        helper.make_node("Cast", ["peak"], ["many"], to=TensorProto.INT64),
        helper.make_node("Loop", [trips, "yes", "hn"], ["y"], "again", body=graph),
    ]
    constants = {**HALF, "three": np.array(3), "yes": np.array(True), "nine": np.float32(9)}
    return write(path, nodes, *PLAIN, constants)


@pytest.mark.parametrize(
    ("ending", "trips", "decides"),
    [("always", "three", False), ("early", "three", False), ("small", "three", True), ("always", "many", True)],
)
def test_a_loop_decides_by_its_number_of_rounds_or_by_its_end(
    ending: str, trips: str, decides: bool, tmp_path: Path
) -> None:
    model = read_onnx(loop(tmp_path / "m.onnx", ending, trips))
    node = dependence_of(model.graph).decided_by(["x", "h"])
    assert (node is not None and node.name == "again") is decides


# -- states ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["Shape", "unused"])
def test_a_state_of_which_no_value_is_read_is_refused(reader: str, tmp_path: Path) -> None:
    """Its shape may be read, or something may be made of it that goes nowhere."""
    nodes = [
        helper.make_node("Shape", ["h"], ["shape"]),
        helper.make_node("Neg", ["h"], ["nowhere"]),
        helper.make_node("Expand", ["half", "shape" if reader == "Shape" else "fixed"], ["halves"]),
        helper.make_node("Add", ["halves", "x"], ["hn"]),
        helper.make_node("Identity", ["hn"], ["y"]),
    ]
    path = write(
        tmp_path / "m.onnx",
        nodes,
        {"x": [1, 3], "h": [1, 3]},
        {"y": [1, 3], "hn": [1, 3]},
        {**HALF, "fixed": np.array([1, 3])},
    )
    with pytest.raises(InputError, match=r"never reads its states h\."):
        load_onnx(path)


def test_a_state_that_no_output_ever_depends_on_is_told(tmp_path: Path) -> None:
    """Two states that go into each other, beside one that matters."""
    nodes = [
        *leaky(),
        helper.make_node("Add", ["cell", "x"], ["hidden_out"]),
        helper.make_node("Mul", ["hidden", "half"], ["cell_out"]),
    ]
    shape: Sequence[int | str | None] = ["batch", 3]
    inputs: Ports = {**PLAIN[0], "hidden": shape, "cell": shape}
    path = write(tmp_path / "m.onnx", nodes, inputs, {**PLAIN[1], "hidden_out": shape, "cell_out": shape}, HALF)
    warnings = [item.text for item in load_onnx(path).messages if item.severity == "warning"]
    assert [line.split(", in")[0] for line in warnings] == [
        "no output depends on the state hidden",
        "no output depends on the state cell",
    ]
    nodes[2] = helper.make_node("Add", ["hn", "hidden_out"], ["y"])
    write(path, nodes, inputs, {**PLAIN[1], "hidden_out": shape, "cell_out": shape}, HALF)
    assert not any(item.severity == "warning" for item in load_onnx(path).messages), "cell does, hidden a step later"


def scalar(path: Path) -> Path:
    nodes = [
        helper.make_node("Cast", ["count"], ["age"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "age"], ["y"]),
        helper.make_node("Add", ["count", "one"], ["new_count"]),
    ]
    write(path, nodes, {"x": [1, 4]}, {"y": [1, 4]}, {"one": np.array(1)})
    model = onnx.load(str(path))
    model.graph.input.append(helper.make_tensor_value_info("count", TensorProto.INT64, []))
    model.graph.output.append(helper.make_tensor_value_info("new_count", TensorProto.INT64, []))
    onnx.save(model, str(path))
    return path


def test_a_state_may_be_a_single_number(tmp_path: Path) -> None:
    path = scalar(tmp_path / "m.onnx")
    options = ("-t", "ort", "-t", "ov", "--num-samples", "2", "--golden-steps", "4", "-o", tmp_path / "m.nsm")
    result = invoke("export", path, *options)
    succeeded(result)
    assert "int64[], no lanes, starts from zeros; found by a count that goes on" in " ".join(result.stderr.split())
    x = np.random.default_rng(0).standard_normal((1, 5, 4)).astype(np.float32)
    for target in ("onnxruntime", "openvino"):
        with nsm.open(tmp_path / "m.nsm", target) as session:
            given = session.run(x)["y"]
            np.testing.assert_array_equal(given, x + np.arange(5, dtype=np.float32)[None, :, None])
            assert session.read_state()["count"].tolist() == [5]


# -- recurrences that are reset ---------------------------------------------------------------------------------------


def inside(path: Path, kind: str = "GRU", start: str = "", with_state: bool = True) -> Path:
    """A recurrent operator over the rows of a frame [batch, 4, 3], and beside it a state that is carried."""
    random = np.random.default_rng(0)
    gates = {"GRU": 3, "LSTM": 4, "RNN": 1}[kind]
    starts = [start, start] if kind == "LSTM" else [start]
    nodes = [
        helper.make_node("Transpose", ["x"], ["rows"], perm=[1, 0, 2]),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Slice", ["shape", "zero", "one"], ["size"]),
        helper.make_node("Concat", ["one", "size", "five"], ["wanted"], axis=0),
        helper.make_node("ConstantOfShape", ["wanted"], ["zeros"]),
        helper.make_node("Unsqueeze", ["h", "zero"], ["carried"]),
        helper.make_node(kind, ["rows", "W", "R", "", "", *starts], ["Y", "last"], "memory", hidden_size=5),
        helper.make_node("Squeeze", ["last", "zero"], ["seen"]),
        helper.make_node("Mul", ["h", "half"], ["faded"]),
        helper.make_node("Add", ["faded", "seen"], ["hn"]),
        helper.make_node("Tanh", ["hn"], ["y"]),
    ]
    constants = {
        **HALF,
        "W": random.standard_normal((1, gates * 5, 3)).astype(np.float32),
        "R": random.standard_normal((1, gates * 5, 5)).astype(np.float32),
        "zero": np.array([0]),
        "one": np.array([1]),
        "five": np.array([5]),
    }
    if not with_state:
        constants["h"] = np.zeros((1, 5), np.float32)
    inputs: Ports = {"x": ["batch", 4, 3], **({"h": ["batch", 5]} if with_state else {})}
    return write(path, nodes, inputs, {"y": ["batch", 5], **({"hn": ["batch", 5]} if with_state else {})}, constants)


@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
@pytest.mark.parametrize(("start", "anew"), [("", True), ("zeros", True), ("carried", False)])
def test_a_recurrence_that_is_reset_in_every_call_is_told(kind: str, start: str, anew: bool, tmp_path: Path) -> None:
    """Absent, or zeros of a size that the graph works out; not where a state goes into it."""
    path = inside(tmp_path / "m.onnx", kind, start)
    warnings = [item.text for item in load_onnx(path).messages if item.severity == "warning"]
    assert len(warnings) == anew
    for line in warnings:
        assert line.startswith(f"the {kind} node memory is reset in every call: no state reaches its")
        assert "right over a frequency axis" in line
    told = succeeded(invoke("inspect", path))
    assert (f"The {kind} node memory is reset in every call" in told) is anew


def test_it_is_the_reason_why_there_are_no_states(tmp_path: Path) -> None:
    path = inside(tmp_path / "m.onnx", with_state=False)
    with pytest.raises(InputError, match=r"No states were found: .*the GRU node memory is reset in every call, so no"):
        load_onnx(path)


def test_a_scan_that_starts_from_zeros_is_told(tmp_path: Path) -> None:
    add = [helper.make_node("Add", ["held", "row"], ["sum"]), helper.make_node("Identity", ["sum"], ["shown"])]
    graph = body("body", add, {"held": FLOAT, "row": FLOAT}, {"sum": FLOAT, "shown": FLOAT})
    for start, anew in (("nothing", ["the Scan node sums"]), ("h", [])):
        nodes = [
            helper.make_node("Scan", [start, "x"], ["all", "sums"], "sums", body=graph, num_scan_inputs=1),
            helper.make_node("Add", ["h", "all"], ["hn"]),
            helper.make_node("Identity", ["sums"], ["y"]),
        ]
        inputs: Ports = {"x": [4, 3], "h": [3]}
        outputs: Ports = {"y": [4, 3], "hn": [3]}
        path = write(tmp_path / "m.onnx", nodes, inputs, outputs, {"nothing": np.zeros(3, np.float32)})
        assert restarts(dependence_of(read_onnx(path).graph), ["h"]) == anew


def test_a_recurrence_in_a_branch_that_never_runs_is_not_told(tmp_path: Path) -> None:
    """Exporters leave both ways in: with a state and without. Which one runs, constants and shapes choose."""
    path = inside(tmp_path / "m.onnx", "GRU", "carried")
    for threshold, anew in ((9, 0), (0, 1)):
        model = onnx.load(str(path))
        place = next(i for i, node in enumerate(model.graph.node) if node.op_type == "GRU")
        node = onnx.NodeProto()
        node.CopyFrom(model.graph.node[place])
        ways = {}
        for name, start in (("then_branch", ""), ("else_branch", "carried")):
            way = onnx.NodeProto()
            way.CopyFrom(node)
            way.name, way.input[5] = f"memory.{name}", start
            way.output[:] = [f"{name}.Y", f"{name}.last"]
            ways[name] = body(name, [way], {}, {f"{name}.last": FLOAT})
        test = [
            helper.make_node("Gather", ["shape", "two"], ["width"]),
            helper.make_node("Greater", ["width", "threshold"], ["wide"]),
            helper.make_node("If", ["wide"], ["last"], **ways),
        ]
        nodes = [*model.graph.node[:place], *test, *model.graph.node[place + 1 :]]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        constants = {"two": np.array(2), "threshold": np.array(threshold)}
        model.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in constants.items())
        onnx.save(model, str(tmp_path / "branch.onnx"))
        found = [item.text for item in load_onnx(tmp_path / "branch.onnx").messages]
        assert sum("memory.then_branch is reset" in line for line in found) == anew
