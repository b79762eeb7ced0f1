"""A step model of two linear ops made by hand, whose states can be told with a pencil.

    bank' = keep * bank + sum over the tokens of (tokens @ IN);   outputs = bank' @ OUT

Every call makes one more slot of the mask active, from none on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from nsm.runtimes.backends.onnxruntime import load
from nsm.runtimes.session.session import Session
from nsm.spec import EntrySpec, StateSpec, StepSpec, TensorSpec
from nsm.trace import Array
from tests.quantization.graphs import make_graph, product_node

LENGTH, DEPTH, WIDTH, OUTPUTS, SLOTS = 2, 3, 4, 5, 10

IN = np.concatenate([np.eye(DEPTH), np.ones((DEPTH, WIDTH - DEPTH))], 1).astype(np.float32)
OUT = np.random.default_rng(0).standard_normal((WIDTH, OUTPUTS)).astype(np.float32)


@dataclass(frozen=True)
class Toy:
    graph: Path
    spec: StepSpec

    def open(self) -> Session:
        initial = {state.name: np.zeros(state.shape, state.numpy_dtype) for state in self.spec.states}
        return Session(load({"step": self.graph}, self.spec, "cpu", 1), self.spec, initial, "f" * 64, "onnxruntime")


def make_toy(
    folder: Path,
    keep: float = 0.5,
    lanes: int = 2,
    first: Array = IN,
    linear_ops: bool = True,
    masks: bool = True,
) -> Toy:
    """Write the graph. `first` takes the place of IN; without `linear_ops` the bank is the answer, as it is."""
    weights = {
        "keep": np.array(keep, np.float32),
        "axes": np.array([1]),
        "active": np.ones((lanes, 1), bool),
        **({"IN": first, "OUT": OUT} if linear_ops else {}),
    }
    nodes = [
        product_node("embed/MatMul", "tokens", "IN", "embedded")
        if linear_ops
        else helper.make_node("Pad", ["tokens", "pads"], ["embedded"], "pad"),
        helper.make_node("ReduceSum", ["embedded", "axes"], ["added"], "sum", keepdims=0),
        helper.make_node("Mul", ["past_state.0.bank", "keep"], ["kept"], "fade"),
        helper.make_node("Add", ["kept", "added"], ["present_state.0.bank"], "write"),
        product_node("head/MatMul", "present_state.0.bank", "OUT", "answer")
        if linear_ops
        else helper.make_node("Identity", ["present_state.0.bank"], ["answer"], "head"),
        helper.make_node("Unsqueeze", ["answer", "axes"], ["one"], "unsqueeze"),
        helper.make_node("Concat", ["one"] * LENGTH, ["outputs"], "repeat", axis=1),
    ]
    if not linear_ops:
        weights["pads"] = np.array([0, 0, 0, 0, 0, WIDTH - DEPTH])
    states = [StateSpec("0.bank", (lanes, WIDTH), "float32")]
    if masks:
        states.append(StateSpec("0.mask", (lanes, SLOTS), "bool"))
        cut = {"from": np.array([0]), "to": np.array([SLOTS - 1])}
        weights |= cut
        nodes += [
            helper.make_node("Slice", ["past_state.0.mask", "from", "to", "axes"], ["before"], "slice"),
            helper.make_node("Concat", ["active", "before"], ["present_state.0.mask"], "activate", axis=1),
        ]
    read = [name for node in nodes for name in node.input]
    answers = OUTPUTS if linear_ops else WIDTH
    model = make_graph(
        nodes,
        {"tokens": [lanes, LENGTH, DEPTH], **{state.past: state.shape for state in states}},
        {"outputs": [lanes, LENGTH, answers], **{state.present: state.shape for state in states}},
        {name: value for name, value in weights.items() if name in read},
        ("past_state.0.mask", "present_state.0.mask"),
    )
    onnx.checker.check_model(model, full_check=True)
    path = folder / "step.onnx"
    onnx.save(model, str(path))
    names = tuple(state.name for state in states)
    entry = EntrySpec(
        "step",
        (TensorSpec("tokens", (lanes, LENGTH, DEPTH), "float32", 1),),
        (TensorSpec("outputs", (lanes, LENGTH, answers), "float32", 1),),
        names,
        names,
    )
    return Toy(path, StepSpec((entry,), tuple(states), LENGTH, lanes))
