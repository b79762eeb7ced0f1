"""A counter is wrapped where its graph proves that it makes no difference, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from nsm.export.graphs.bounded_counters import LARGEST, wrap_counters
from nsm.runtimes.limits.counters import Counters
from nsm.spec import EntrySpec, StateSpec, StepSpec, TensorSpec
from nsm.trace import Array

GROWTH = 441
CONSTANTS = {
    "k0": 0,
    "k1": 1,
    "k2": 2,
    "k7": 7,
    "k16": 16,
    "k99": 99,
    "k441": GROWTH,
    "k1000": 1000,
    "k1023": 1023,
    "k100000": 100_000,
    "many": 7_000_000,
    "less": -1000,
    "two": [3, 4],
    "axis": [0],
}


def spec_of(lanes: int = 1) -> StepSpec:
    step = EntrySpec(
        "step",
        (TensorSpec("tokens", (lanes, 1), "float32", 1),),
        (TensorSpec("outputs", (lanes, 1), "float32", 1),),
        ("n",),
        ("n",),
    )
    return StepSpec((step,), (StateSpec("n", (lanes,), "int64"),), 1, lanes)


def counters_of(spec: StepSpec, growth: int = GROWTH) -> Counters:
    states = {"n": np.full(spec.batch, growth)}
    return Counters(1, states, {"n": np.full(spec.batch, growth)}, frozenset({"n"}), 1)


def graph_of(uses: str, spec: StepSpec) -> onnx.ModelProto:
    """A counter n, and what `uses` makes of it: lines like "y = Mod n k7; z = Less y k2 fmod=1", the last of which is
    the output; and n + 441, or the value called `next`.
    """
    nodes = []
    for line in filter(None, (part.strip() for part in uses.split(";"))):
        out, _, call = line.partition(" = ")
        kind, *given = call.split()
        attributes: dict[str, Any] = {
            key: int(value) for key, _, value in (item.partition("=") for item in given if "=" in item)
        }
        names = ["" if item == "-" else item for item in given if "=" not in item]
        names = ["past_state.n" if item == "n" else item for item in names]
        nodes.append(helper.make_node(kind, names, [out], out, **attributes))
    last = nodes[-1].output[0]
    if "next = " in uses:
        last = nodes[-2].output[0] if nodes[-1].output[0] == "next" else last
    else:
        nodes.append(helper.make_node("Add", ["past_state.n", "k441"], ["next"], "next"))
    nodes += [
        helper.make_node("Cast", [last], ["number"], "number", to=TensorProto.FLOAT),
        helper.make_node("Add", ["tokens", "number"], ["outputs"], "outputs"),
        helper.make_node("Identity", ["next"], ["present_state.n"], "present"),
    ]
    lanes = spec.batch
    graph = helper.make_graph(
        nodes,
        "step",
        [
            helper.make_tensor_value_info("tokens", TensorProto.FLOAT, [lanes, 1]),
            helper.make_tensor_value_info("past_state.n", TensorProto.INT64, [lanes]),
        ],
        [
            helper.make_tensor_value_info("outputs", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("present_state.n", TensorProto.INT64, [lanes]),
        ],
        [
            numpy_helper.from_array(np.array(value, np.int64), name)
            for name, value in CONSTANTS.items()
            if any(name in node.input for node in nodes)
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def wrapped(model: onnx.ModelProto, folder: Path, spec: StepSpec, steps: int = 64, growth: int = GROWTH) -> StateSpec:
    onnx.save(model, str(folder / "step.onnx"))
    return wrap_counters(folder, spec, counters_of(spec, growth), steps).states[0]


def run(path: Path, n: Array) -> tuple[Array, Array]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    tokens = np.zeros((len(n), 1), np.float32)
    outputs, after = session.run(["outputs", "present_state.n"], {"tokens": tokens, "past_state.n": n})
    return outputs, after


PROVEN = {
    "remainder": "y = Mod n k1000",
    "remainder towards zero": "y = Mod n k1000 fmod=1",
    "power of two": "y = BitwiseAnd n k1023",
    "frames": "q = Div n k441; y = Mod q k16",
    "frames rounded down": "r = Mod n k441; s = Sub n r; q = Div s k441; y = Mod q k7",
    "scaled": "p = Mul k7 n; y = Mod p k1000",
    "shifted": "a = Add n k99; y = Mod a k7",
    "taken from": "a = Sub k99 n; y = Mod a k7",
    "two remainders": "a = Mod n k7; b = Mod n k16; y = Add a b",
    "remainder of a remainder": "a = Mod n k1000; y = Mod a k7",
    "filled": "y = Less n k100000",
    "filled from the other side": "y = GreaterOrEqual k100000 n",
    "is it the first": "y = Equal n k0",
    "clamped": "y = Min n k99",
    "clamped below": "m = Max n k99; y = Mod m k7",
    "clipped": "y = Clip n k0 k99",
    "clipped above": "y = Clip n - k99",
    "unclipped": "c = Clip n k0; y = Mod c k7",
    "shapes": "u = Unsqueeze n axis; i = Identity u; s = Squeeze i axis; y = Mod s k7",
    "cast": "c = Cast n to=7; y = Mod c k1000",
    "joined": "m = Add n k1; j = Concat n m axis=0; r = Mod j k7; y = ReduceSum r",
    "difference": "m = Add n k7; d = Sub m n; y = Mul d k2",
    "compared with itself": "m = Add n k7; y = Less n m",
    "chosen": "r = Mod n k7; b = Greater r k2; m = Add n k7; next = Add n k441; w = Where b n m; y = Mod w k16",
}


@pytest.mark.parametrize("uses", PROVEN.values(), ids=PROVEN)
def test_a_wrapped_counter_gives_the_same_for_ever(uses: str, tmp_path: Path) -> None:
    spec = spec_of()
    model = graph_of(uses, spec)
    onnx.save(model, str(tmp_path / "whole.onnx"))
    state = wrapped(model, tmp_path, spec)
    base, period = state.wrap
    end = base + period
    assert 0 <= base < end <= LARGEST
    rng = np.random.default_rng(0)
    starts = (0, 1, base, end - 3, end, end + base, 2**31, 2**40 + 12345)
    for n in {int(start + more) for start in starts for more in (0, 1, *rng.integers(0, 10**6, 3))}:
        far = np.array([n])
        wanted, after = run(tmp_path / "whole.onnx", far)
        given, kept = run(tmp_path / "step.onnx", state.wrapped(far))
        np.testing.assert_array_equal(given, wanted, err_msg=f"n = {n}")
        np.testing.assert_array_equal(kept, state.wrapped(after), err_msg=f"n = {n}")
        assert kept[0] < end


@pytest.mark.parametrize(
    "uses",
    [
        "y = Cast n to=1",
        "c = Cast n to=1; y = Sin c",
        "y = Identity n",
        "c = Cast n to=6; d = Cast c to=7; y = Mod d k1000",
        "y = Div n k441",
        "y = Mul n k2",
        "y = Mod n less",
        "y = Mod n two",
        "y = Mod k1000 n",
        "y = BitwiseAnd n k99",
        "y = Less n many",
        "y = Mul n n",
        "y = Max n k99",
        "q = Div n k441; y = Less q n; z = Less y y; next = Mul n k2",
        "next = Min n k99; y = Mod n k7",
        "d = Sub k99 n; y = Div d k7",
        "r = Mod n k7; b = Less r k2; y = Where b n k7",
        "j = Concat n k0 axis=0; y = Mod j k7",
        "d = Sub n tokens_as_number; y = Less d k7",
    ],
)
def test_what_is_not_proven_is_left_as_it_is(uses: str, tmp_path: Path) -> None:
    spec = spec_of()
    if "tokens_as_number" in uses:  # of which no bound is known
        model = graph_of(uses, spec)
        cast = helper.make_node("Cast", ["tokens"], ["tokens_as_number"], "tokens_as_number", to=TensorProto.INT64)
        model.graph.node.insert(0, cast)
    else:
        model = graph_of(uses, spec)
    before = model.SerializeToString()
    assert wrapped(model, tmp_path, spec).wrap == ()
    assert (tmp_path / "step.onnx").read_bytes() == before


def test_lanes_are_wrapped_each_by_itself_where_they_do_not_meet(tmp_path: Path) -> None:
    spec = spec_of(lanes=2)
    model = graph_of("r = Mod n k1000; y = Unsqueeze r one", spec)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "one"))
    state = wrapped(model, tmp_path, spec)
    end = sum(state.wrap)
    _, after = run(tmp_path / "step.onnx", np.array([5, end - 1]))
    assert after.tolist() == [5 + GROWTH, GROWTH - 1]
    meeting = graph_of("m = Add n k7; y = Less n m", spec)
    assert wrapped(meeting, tmp_path, spec).wrap == ()


@pytest.mark.parametrize(("steps", "growth"), [(20_000, GROWTH), (64, 2**23)])
def test_a_counter_that_would_be_wrapped_within_the_golden_trace_is_left(
    steps: int, growth: int, tmp_path: Path
) -> None:
    spec = spec_of()
    assert wrapped(graph_of("y = Mod n k7", spec), tmp_path, spec, steps, growth).wrap == ()


def test_a_graph_with_branches_is_left(tmp_path: Path) -> None:
    spec = spec_of()
    model = graph_of("y = Mod n k7", spec)
    branch = helper.make_graph(
        [helper.make_node("Identity", ["past_state.n"], ["b"])],
        "branch",
        [],
        [helper.make_tensor_value_info("b", TensorProto.INT64, [1])],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.insert(
        0, helper.make_node("If", ["yes"], ["unused"], "if", then_branch=branch, else_branch=branch)
    )
    assert wrapped(model, tmp_path, spec).wrap == ()
