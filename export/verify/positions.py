"""Find scatters whose indices come from a growing state; some backends do not check such indices."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import onnx

from nsm.errors import UnsupportedError
from nsm.export.graphs import node_name
from nsm.spec import StepSpec

_SCATTERS = ("ScatterND", "ScatterElements", "Scatter", "TensorScatter")

# Operators that pass an index on, or shift it.
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
# Operators whose results are bounded.
_BOUND = ("ArgMax", "ArgMin", "BitwiseAnd", "Clip", "Min", "Mod")


class Write(NamedTuple):
    """A scatter whose indices come from a state: names of the node and of the state."""

    node: str
    state: str


def check_positions(graph: Path, spec: StepSpec, bounded: Collection[str]) -> None:
    """Raise `UnsupportedError` for a write at a position without a known bound.

    Args:
        graph: path of the graph of `step`.
        spec: the spec of the model, without a capacity.
        bounded: states that grow at first and then wrap around, such as the position in a ring buffer.

    Raises:
        UnsupportedError: a scatter writes at the position of an unbounded state.
    """
    writes = position_writes(onnx.load(str(graph), load_external_data=False), spec)
    write = next((write for write in writes if write.state not in bounded), None)
    if write is not None:
        raise UnsupportedError(
            f"The node {write.node} writes into a state at the position in the state {write.state}, which grows "
            "without a known limit: a backend that does not check the position writes outside its memory. Give the "
            "most tokens of a stream: capacity=N of as_step, or --capacity N."
        )


def position_writes(model: onnx.ModelProto, spec: StepSpec) -> Iterator[Write]:
    """Yield scatters whose indices come from an integer state without an operator that bounds them."""
    nodes = list(model.graph.node)
    made_by = {name: node for node in nodes for name in node.output}
    for state in spec.states:
        if state.numpy_dtype.kind not in "iu" or _bounded(state.present, made_by):
            continue
        reached = {state.past}
        for node in nodes:  # ONNX nodes are in topological order
            if node.op_type in _SCATTERS and len(node.input) > 1 and node.input[1] in reached:
                yield Write(node_name(node), state.name)
            if node.op_type in _KEEP and reached.intersection(node.input):
                reached |= set(node.output)


def _bounded(present: str, made_by: dict[str, onnx.NodeProto]) -> bool:
    """Whether an operator bounds the next value of a state."""
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
