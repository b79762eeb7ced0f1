"""Recurrent operators as linear ops: the same numbers, outputs and states, as the operator itself gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from nsm.quantization import rewrite
from nsm.quantization.linear_ops import linear_ops_of
from nsm.quantization.policy import LONGEST, SAFE_SUM
from nsm.quantization.unroll_rnn import unroll
from nsm.trace import Array, Arrays
from tests.quantization.graphs import largest_pair

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
LANES, WIDTH, SIZE = 2, 5, 3


def recurrent(
    kind: str,
    length: int = 3,
    *,
    bias: bool = True,
    outputs: tuple[bool, bool, bool] = (True, True, True),
    opset: int = 20,
    inputs: Mapping[int, str] = {},
    **attributes: Any,
) -> onnx.ModelProto:
    """One operator of `length` steps; `inputs` gives names to what is usually left out."""
    generator = np.random.default_rng(0)
    gates, directions = GATES[kind], 2 if attributes.get("direction") == "bidirectional" else 1
    arrays: dict[str, Array] = {
        "w": generator.standard_normal((directions, gates * SIZE, WIDTH), np.float32),
        "r": generator.standard_normal((directions, gates * SIZE, SIZE), np.float32),
        "b": generator.standard_normal((directions, 2 * gates * SIZE), np.float32),
        "lengths": np.full(LANES, length, np.int32),
    }
    states = ("h", "c") if kind == "LSTM" else ("h",)
    names = dict(enumerate(["x", "w", "r", "b" if bias else "", "", *states])) | dict(inputs)
    given = [names.get(index, "") for index in range(max(names) + 1)]
    made = [name if wanted else "" for name, wanted in zip(("y", "y_h", "y_c"), outputs, strict=True)]
    made = made[: 1 + len(states)]
    node = helper.make_node(kind, given, made, f"memory/{kind}", hidden_size=SIZE, **attributes)
    state = (directions, LANES, SIZE)
    shapes = {"x": (length, LANES, WIDTH), "y": (length, directions, LANES, SIZE), "h": state, "c": state}
    shapes |= {"y_h": state, "y_c": state}
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in given if name in shapes],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in made if name],
        [numpy_helper.from_array(value, name) for name, value in arrays.items() if name in given],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def run(model: onnx.ModelProto, seed: int = 1) -> Arrays:
    generator = np.random.default_rng(seed)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {item.name: generator.standard_normal(item.shape, np.float32) for item in session.get_inputs()}
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def kinds(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["GRU", "GRU, reset first", "RNN", "RNN, relu"]),
    length=st.integers(1, 4),
    bias=st.booleans(),
    outputs=st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(lambda kept: any(kept[:2])),
    opset=st.sampled_from([13, 20, 22]),
)
def test_the_products_give_what_the_operator_gives(
    kind: str, length: int, bias: bool, outputs: tuple[bool, bool, bool], opset: int
) -> None:
    attributes: dict[str, Any] = {}
    if kind.startswith("GRU"):
        attributes["linear_before_reset"] = int(kind == "GRU")
    if kind == "RNN, relu":
        attributes["activations"] = ["Relu"]
    model = recurrent(kind.partition(",")[0], length, bias=bias, outputs=outputs, opset=opset, **attributes)
    expected = run(model)
    unroll(model)
    onnx.checker.check_model(model, full_check=True)
    assert not kinds(model) & set(GATES)
    found = run(model)
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_low_precision_finds_the_products_by_the_name_of_the_operator() -> None:
    """One matrix for all steps."""
    model = recurrent("GRU", 3, linear_before_reset=1)
    unroll(model)
    names = [linear_op.node for linear_op in linear_ops_of(model)]
    assert names == ["memory/GRU/input", *(f"memory/GRU/recurrent{step}" for step in ("", ".1", ".2"))]
    assert [linear_op.shape for linear_op in linear_ops_of(model)] == [(WIDTH, 3 * SIZE), *[(SIZE, 3 * SIZE)] * 3]
    assert len({linear_op.key for linear_op in linear_ops_of(model)}) == 2
    held = [tensor.name for tensor in model.graph.initializer]
    assert len(held) == len(set(held))
    assert not {"w", "r", "b"} & set(held)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("LSTM", {}),
        ("GRU", {"direction": "bidirectional"}),
        ("GRU", {"direction": "reverse"}),
        ("GRU", {"clip": 1.0}),
        ("GRU", {"activations": ["Sigmoid", "Relu"]}),
        ("GRU", {"inputs": {4: "lengths"}}),
        ("GRU", {"inputs": {5: ""}}),
        ("RNN", {"activations": ["Affine"], "activation_alpha": [1.0], "activation_beta": [0.0]}),
        ("GRU", {"length": LONGEST + 1}),
        ("GRU", {"opset": 11}),
    ],
)
def test_what_is_out_of_the_ordinary_stays(kind: str, changes: dict[str, Any]) -> None:
    model = recurrent(kind, **changes)
    before = model.SerializeToString(deterministic=True)
    unroll(model)
    assert model.SerializeToString(deterministic=True) == before


def test_a_length_that_is_open_stays() -> None:
    model = recurrent("GRU")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "time"
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "time"
    unroll(model)
    assert kinds(model) == {"GRU"}


def test_the_other_nodes_and_their_order_stay() -> None:
    model = recurrent("GRU", outputs=(True, False, False))
    model.graph.node.append(helper.make_node("Neg", ["y"], ["negative"], "after"))
    model.graph.output.append(helper.make_tensor_value_info("negative", TensorProto.FLOAT, (3, 1, LANES, SIZE)))
    expected = run(model)
    unroll(model)
    found = run(model)
    assert model.graph.node[-1].name == "after"
    np.testing.assert_allclose(found["negative"], expected["negative"], rtol=1e-5, atol=1e-6)


# -- in ONNX Runtime's own operator ------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("length", [1, 3, LONGEST + 5])
def test_an_lstm_in_int8_is_the_lstm_to_int8s_rounding(direction: str, length: int) -> None:
    inputs = {4: "lengths"} if direction == "reverse" else {}
    model = recurrent("LSTM", length, direction=direction, layout=0, inputs=inputs)
    unroll(model)
    (linear_op,) = linear_ops_of(model, ("LSTM",))
    directions = 2 if direction == "bidirectional" else 1
    assert (linear_op.node, linear_op.activation, linear_op.weight, linear_op.operator) == (
        "memory/LSTM",
        "x",
        "w",
        "LSTM",
    )
    assert linear_op.shape == (WIDTH + SIZE, directions * 4 * SIZE)
    low = rewrite.dynamic(model, [linear_op], saturation_safe=True)
    assert kinds(low) == {"DynamicQuantizeLSTM"}
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in low.graph.initializer}
    assert {name for name in ("w", "r") if name in held} == set()
    for name in ("w.int8", "r.int8"):
        assert held[name].dtype == np.int8
        for matrix in held[name]:  # [D, N]
            assert largest_pair(matrix) <= SAFE_SUM
            assert np.abs(matrix).max() > 64  # a number alone may be larger
    expected, found = run(model), run(low)
    for name, value in expected.items():
        difference = np.abs(found[name] - value).max() / np.abs(value).max()
        assert 0 < difference < 0.05, name


def test_an_lstm_is_a_product_for_who_asks_and_only_where_its_operator_takes_it() -> None:
    model = recurrent("LSTM")
    assert linear_ops_of(model) == []
    assert linear_ops_of(recurrent("GRU"), ("LSTM",)) == []
    node = model.graph.node[0]
    node.attribute.append(helper.make_attribute("layout", 1))
    assert linear_ops_of(model, ("LSTM",)) == []
    del node.attribute[-1], model.graph.initializer[:]
    assert linear_ops_of(model, ("LSTM",)) == []


def test_the_products_of_an_lstm_are_known_by_both_matrices() -> None:
    model, other = recurrent("LSTM"), recurrent("LSTM")
    (r,) = (tensor for tensor in other.graph.initializer if tensor.name == "r")
    r.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(r) * 2, "r"))
    (first,), (again,), (second,) = (linear_ops_of(item, ("LSTM",)) for item in (model, recurrent("LSTM", 1), other))
    assert first.key == again.key != second.key
