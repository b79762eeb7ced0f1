"""Writes at a position are found in a graph; those of a ring are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nsm.errors import UnsupportedError
from nsm.export.verify.positions import check_positions, position_writes
from nsm.spec import EntrySpec, StateSpec, StepSpec, TensorSpec

STATES = (StateSpec("table", (1, 8), "float32"), StateSpec("place", (1,), "int64"))
STEP = EntrySpec(
    "step",
    (TensorSpec("tokens", (1, 1), "float32", 1),),
    (TensorSpec("outputs", (1, 1, 8), "float32", 1),),
    ("table", "place"),
    ("table", "place"),
)
SPEC = StepSpec((STEP,), STATES, 1, 1)


def graph(index: str, after: str, scatter: str = "ScatterElements") -> onnx.ModelProto:
    """A table written at the place; `index` and `after` are operators on the place, beside the number 8."""
    node = helper.make_node
    nodes = [
        node(index, ["past_state.place", "eight"][: 1 if index == "Identity" else 2], ["index"], "index"),
        node("Unsqueeze", ["index", "axis"], ["places"], "places"),
        node(scatter, ["past_state.table", "places", "tokens"], ["present_state.table"], "write", axis=1),
        node("Add", ["past_state.place", "one"], ["next"], "next"),
        node(after, ["next", "eight"][: 1 if after == "Identity" else 2], ["present_state.place"], "after"),
        node("Unsqueeze", ["present_state.table", "axis"], ["outputs"], "outputs"),
    ]
    values = {"eight": 8, "one": 1, "axis": [1]}
    constants = [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in values.items()]
    made = [
        helper.make_graph(
            nodes,
            "step",
            [
                helper.make_tensor_value_info("tokens", TensorProto.FLOAT, [1, 1]),
                helper.make_tensor_value_info("past_state.table", TensorProto.FLOAT, [1, 8]),
                helper.make_tensor_value_info("past_state.place", TensorProto.INT64, [1]),
            ],
            [
                helper.make_tensor_value_info("outputs", TensorProto.FLOAT, [1, 1, 8]),
                helper.make_tensor_value_info("present_state.table", TensorProto.FLOAT, [1, 8]),
                helper.make_tensor_value_info("present_state.place", TensorProto.INT64, [1]),
            ],
            constants,
        )
    ]
    return helper.make_model(made[0], opset_imports=[helper.make_opsetid("", 20)])


@pytest.mark.parametrize(
    ("index", "after", "found"),
    [
        ("Identity", "Identity", True),
        ("Add", "Identity", True),
        ("Mod", "Identity", False),
        ("Min", "Identity", False),
        ("Identity", "Mod", False),
        ("Identity", "Min", False),
    ],
)
def test_a_write_is_found_where_nothing_bounds_its_place(index: str, after: str, found: bool) -> None:
    assert [write == ("write", "place") for write in position_writes(graph(index, after), SPEC)] == [True] * found


def test_a_write_without_a_known_end_is_refused(tmp_path: Path) -> None:
    onnx.save(graph("Identity", "Identity"), str(tmp_path / "step.onnx"))
    with pytest.raises(UnsupportedError, match=r"node write .* the state place.*capacity=N.*--capacity N"):
        check_positions(tmp_path / "step.onnx", SPEC, ())
    check_positions(tmp_path / "step.onnx", SPEC, {"place"})
