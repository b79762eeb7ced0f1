"""The order of a graph's nodes: each after those whose results it takes, as ONNX demands and not all converters do."""

from __future__ import annotations

import onnx

from nsm.export.graphs.walk import graphs_in, graphs_of, nodes_of


def sort_nodes(model: onnx.ModelProto) -> None:
    """Put the nodes of all graphs in order, in place; those that are in order stay as they are.

    Nodes that depend on each other in a circle are left out of the order and come last: a runtime refuses them.
    """
    for graph in graphs_of(model.graph):
        made = {name: place for place, node in enumerate(graph.node) for name in node.output if name}
        needs = [{made[name] for name in _taken(node) if name in made} for node in graph.node]
        if all(max(places, default=-1) < place for place, places in enumerate(needs)):
            continue
        order = _sorted(needs)
        nodes = [graph.node[place] for place in order]
        del graph.node[:]
        graph.node.extend(nodes)


def _taken(node: onnx.NodeProto) -> list[str]:
    """The values that a node takes, and those that the graphs inside it use."""
    inner = [name for graph in graphs_in(node) for one in nodes_of(graph) for name in one.input]
    results = [value.name for graph in graphs_in(node) for value in graph.output]
    return [*node.input, *inner, *results]


def _sorted(needs: list[set[int]]) -> list[int]:
    """Places in an order in which each comes after those that it needs; otherwise as they were."""
    users: dict[int, list[int]] = {}
    for place, places in enumerate(needs):
        for other in places:
            users.setdefault(other, []).append(place)
    left = [len(places) for places in needs]
    waiting = [place for place in reversed(range(len(needs))) if not left[place]]
    order = []
    while waiting:
        place = waiting.pop()
        order.append(place)
        for user in reversed(users.get(place, [])):
            left[user] -= 1
            if not left[user]:
                waiting.append(user)
    return [*order, *(place for place in range(len(needs)) if left[place])]
