"""Writes at a position: scatters whose indices come from a state that grows, which some backends do not check."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import onnx

from nsm.errors import UnsupportedError
from nsm.export.graphs import node_name
from nsm.spec import StepSpec

_SCATTERS = ("ScatterND", "ScatterElements", "Scatter", "TensorScatter")

# Through these an index remains the number that it was, or moves with it.
_KEEP = (
    "Add",
    "Cast",
    "Concat",
    "Expand",
    "Flatten",
    "Identity",
    "Mul",
    "Range",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Sub",
    "Tile",
    "Transpose",
    "Unsqueeze",
)
# Behind one of these a number has an end.
_BOUND = ("ArgMax", "ArgMin", "BitwiseAnd", "Clip", "Min", "Mod")


class Write(NamedTuple):
    """A scatter whose place comes from a state: its node, and the state's name."""

    node: str
    state: str


def check_positions(graph: Path, spec: StepSpec, bounded: Collection[str]) -> None:
    """Raise `UnsupportedError` for a write at a position that nobody knows the end of.

    Args:
        graph: of `step`.
        spec: of the model, without a capacity.
        bounded: states that grow at first and were seen to turn, as the place in a ring.
    """
    writes = position_writes(onnx.load(str(graph), load_external_data=False), spec)
    write = next((write for write in writes if write.state not in bounded), None)
    if write is not None:
        raise UnsupportedError(
            f"The node {write.node} writes into a state at the position that the state {write.state} holds, and where "
            "that ends was not found: a backend that does not check it writes outside its memory. Say how many tokens "
            "a stream may have: capacity=N of as_step, or --capacity N."
        )


def position_writes(model: onnx.ModelProto, spec: StepSpec) -> Iterator[Write]:
    """Scatters whose indices come from an integer state, with nothing between that bounds them."""
    nodes = list(model.graph.node)
    made_by = {name: node for node in nodes for name in node.output}
    for state in spec.states:
        if state.numpy_dtype.kind not in "iu" or _bounded(state.present, made_by):
            continue
        reached = {state.past}
        for node in nodes:  # in an order in which values come before their uses
            if node.op_type in _SCATTERS and len(node.input) > 1 and node.input[1] in reached:
                yield Write(node_name(node), state.name)
            if node.op_type in _KEEP and reached.intersection(node.input):
                reached |= set(node.output)


def _bounded(present: str, made_by: dict[str, onnx.NodeProto]) -> bool:
    """Whether the next value of a state passes an operation that bounds it."""
    waiting, seen = [present], set[str]()
    while waiting:
        node = made_by.get(waiting.pop())
        if node is None or node.output[0] in seen:
            continue
        seen.add(node.output[0])
        if node.op_type in _BOUND:
            return True
        if node.op_type in (*_KEEP, "Where"):
            waiting += node.input
    return False
