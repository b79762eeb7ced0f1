"""Recurrent operators of an ONNX graph: operators that are reset in every call, and states that others carry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import onnx

from nsm.export.graphs import node_name
from nsm.export.sources.onnx.file import where
from nsm.export.sources.onnx.states.dependence import Dependence

_FINAL = {"RNN": {5: 1}, "GRU": {5: 1}, "LSTM": {5: 1, 6: 2}}
"""Of each operator: the place of an initial state among its inputs, and that of the final one among its outputs."""

_LAYOUT = frozenset(
    (
        "Identity",
        "Squeeze",
        "Unsqueeze",
        "Reshape",
        "Flatten",
        "Transpose",
        "Slice",
        "Split",
        "Gather",
        "Concat",
        "Cast",
    )
)
"""Operators that move values and compute none."""

Place = tuple[str, int]
"""A recurrent operator, by its first output, and the place of an initial state among its inputs."""


def restarts(dependence: Dependence, states: Iterable[str], optional: bool = False) -> list[str]:
    """The recurrent operators whose initial state depends on none of the states, for people: `the GRU node memory`.

    Args:
        dependence: of the graph.
        states: the inputs that are states.
        optional: whether those count that lie in a branch which constants or shapes choose, and may never run.
    """
    carried = frozenset(states)
    return [
        f"the {start.node.op_type} node {node_name(start.node)}{where(start.node)}".rstrip(",")
        for start in dependence.starts
        if not start.sources & carried and (optional or not start.optional)
    ]


def wired(graph: onnx.GraphProto) -> dict[tuple[str, str], str]:
    """The inputs and outputs that are the initial and the final state of the same recurrent operators.

    Nothing but operators that move values lies between them and the graph's input and output.

    Returns:
        By input and output, the operator, for people.
    """
    made = {name: node for node in graph.node for name in node.output if name}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input if node.op_type == "Concat" else node.input[:1]:
            users.setdefault(name, []).append(node)
    inputs, outputs = ({value.name for value in values} for values in (graph.input, graph.output))
    starts: dict[str, set[Place]] = {}
    ends: dict[str, set[Place]] = {}
    shown: dict[Place, str] = {}
    for node in graph.node:
        for place, final in _FINAL.get(node.op_type, {}).items():
            if place >= len(node.input) or final >= len(node.output) or not node.output[final]:
                continue
            key = (node.output[final], place)
            shown[key] = f"the {node.op_type} node {node_name(node)}"
            for name in inputs.intersection(_before(node.input[place], made)):
                starts.setdefault(name, set()).add(key)
            for name in outputs.intersection(_after(node.output[final], users)):
                ends.setdefault(name, set()).add(key)
    return {
        (past, present): shown[min(first)]
        for past, first in starts.items()
        for present, last in ends.items()
        if first == last
    }


def _before(name: str, made: Mapping[str, onnx.NodeProto]) -> Iterator[str]:
    """Yield a value and the values that layout operators make it from."""

    def sources(value: str) -> Iterable[str]:
        node = made.get(value)
        if node is None or node.op_type not in _LAYOUT:
            return ()
        inputs: list[str] = list(node.input)
        return inputs if node.op_type == "Concat" else inputs[:1]

    return _reached(name, sources)


def _after(name: str, users: Mapping[str, list[onnx.NodeProto]]) -> Iterator[str]:
    """Yield a value and the values that layout operators make from it."""
    return _reached(
        name, lambda value: [out for node in users.get(value, []) if node.op_type in _LAYOUT for out in node.output]
    )


def _reached(name: str, following: Callable[[str], Iterable[str]]) -> Iterator[str]:
    """Yield a value and every value that follows from it, each once."""
    seen, waiting = set[str](), [name]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            yield name
            waiting += following(name)
