"""Which inputs the values of an ONNX graph depend on: through its nodes, their branches and their loops."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field

import onnx

from nsm.export.graphs import graphs_in, nodes_of

Sources = frozenset[str]
"""Inputs of the main graph that a value depends on."""

_NOTHING: Sources = frozenset()

_OF_SHAPE = ("Shape", "Size")
"""Operators whose result depends on the shape of their input only, which is static in a step."""

_RECURRENT = {"RNN": (5,), "GRU": (5,), "LSTM": (5, 6)}
"""Recurrent operators: places of the inputs that are their initial states."""


@dataclass(frozen=True)
class Start:
    """A recurrent operator, `Loop` or `Scan`, and the inputs that its initial states depend on.

    Args:
        node: the operator.
        sources: of its initial states; empty where these are constants or absent.
        optional: whether it lies in a branch that constants or shapes choose, so that it may never run.
    """

    node: onnx.NodeProto
    sources: Sources
    optional: bool


@dataclass
class Dependence:
    """Dependencies between the values of a graph.

    Args:
        values: for each value of the main graph, the inputs that it depends on.
        decisions: the inputs that an `If` or the end of a `Loop` depends on, by the node.
        starts: recurrent operators.
    """

    values: dict[str, Sources] = field(default_factory=dict)
    decisions: list[tuple[onnx.NodeProto, Sources]] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)

    def decided_by(self, inputs: Iterable[str]) -> onnx.NodeProto | None:
        """The first node that decides by the values of any of these inputs."""
        wanted = frozenset(inputs)
        return next((node for node, sources in self.decisions if sources & wanted), None)

    def reached(self, carried: Mapping[str, str], outputs: Iterable[str]) -> set[str]:
        """The states that outputs depend on, in this step or in a later one.

        Args:
            carried: by a state's input, the output that the next step takes for it.
            outputs: names of the outputs that are no states.
        """
        found: set[str] = set()
        waiting = list(outputs)
        while waiting:
            new = (self.values.get(waiting.pop(), _NOTHING) & set(carried)) - found
            found |= new
            waiting += [carried[name] for name in new]
        return found


def dependence_of(graph: onnx.GraphProto) -> Dependence:
    """Follow the inputs of a graph to all its values. A value that depends on a shape only has no dependencies."""
    found = Dependence()
    weights = {tensor.name for tensor in graph.initializer}
    found.values |= {value.name: frozenset([value.name]) for value in graph.input if value.name not in weights}
    _follow(graph, found.values, found, False)
    return found


def _follow(graph: onnx.GraphProto, known: MutableMapping[str, Sources], found: Dependence, optional: bool) -> None:
    """Add the values of a graph to the known ones; note its decisions and recurrent operators."""
    for node in graph.node:
        given = [known.get(name, _NOTHING) for name in node.input]
        sources = _NOTHING if node.op_type in _OF_SHAPE else _NOTHING.union(*given)
        bodies = list(graphs_in(node))
        if bodies:
            sources |= _follow_bodies(node, bodies, given, known, found, optional)
        elif node.op_type in _RECURRENT:
            starts = [given[place] for place in _RECURRENT[node.op_type] if place < len(given)]
            found.starts.append(Start(node, _NOTHING.union(*starts), optional))
        known.update(dict.fromkeys(filter(None, node.output), sources))


def _follow_bodies(
    node: onnx.NodeProto,
    bodies: list[onnx.GraphProto],
    given: list[Sources],
    known: MutableMapping[str, Sources],
    found: Dependence,
    optional: bool,
) -> Sources:
    """The inputs that the results of a node with graphs inside depend on."""
    used = [known[name] for body in bodies for inner in nodes_of(body) for name in inner.input if name in known]
    # Outputs of a loop body are inputs of its next iteration: a value may depend on all inputs.
    everything = _NOTHING.union(*given, *used)
    results = []
    for body in bodies:
        scope = ChainMap({value.name: everything for value in body.input}, known)
        if node.op_type == "Loop":
            number, condition = (value.name for value in body.input[:2])
            scope.update({number: _NOTHING, condition: given[1]})
        _follow(body, scope, found, optional or (node.op_type == "If" and not given[0]))
        results += [scope.get(value.name, _NOTHING) for value in body.output]
    if node.op_type == "If":
        found.decisions.append((node, given[0]))
        return given[0].union(*results)
    if node.op_type == "Loop":
        found.decisions.append((node, given[0].union(given[1], results[0])))
        starts = given[2:]
    else:
        starts = given[: len(given) - next((a.i for a in node.attribute if a.name == "num_scan_inputs"), 0)]
    if starts and everything:
        found.starts.append(Start(node, _NOTHING.union(*starts), optional))
    return everything
