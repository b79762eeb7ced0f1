"""Recurrent operators with the streams first (`layout=1`), rewritten to the layout that every runtime has."""

from __future__ import annotations

import onnx
from onnx import helper

from nsm.export.graphs import graphs_of

_RECURRENT = ("RNN", "GRU", "LSTM")

# By the place of an input or output, its axes: from streams first to time or directions first, and back. The hidden
# states of all steps are [time, directions, streams, hidden] and [streams, time, directions, hidden].
_SWAP = (1, 0, 2)
_GIVEN: dict[int, tuple[int, ...]] = {0: _SWAP, 5: _SWAP, 6: _SWAP}
_TAKEN: dict[int, tuple[int, ...]] = {0: (2, 0, 1, 3), 1: _SWAP, 2: _SWAP}


def put_time_first(model: onnx.ModelProto) -> None:
    """Give recurrent operators `layout=0`, with a `Transpose` at each input and output that it concerns; in place.

    ONNX Runtime, OpenVINO and TensorRT have no kernels for `layout=1`, which operator set 14 brought.
    """
    for graph in graphs_of(model.graph):
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            layout = next((item for item in node.attribute if item.name == "layout"), None)
            before: list[onnx.NodeProto] = []
            after: list[onnx.NodeProto] = []
            if node.op_type in _RECURRENT and layout is not None and layout.i:
                node.attribute.remove(layout)
                before, after = _transposes(node)
            nodes += [*before, node, *after]
        if len(nodes) > len(graph.node):
            del graph.node[:]
            graph.node.extend(nodes)


def _transposes(node: onnx.NodeProto) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """The nodes before and after a recurrent operator, which takes and gives their values from then on."""
    before: list[onnx.NodeProto] = []
    after: list[onnx.NodeProto] = []
    stem = next(filter(None, node.output))
    for index, axes in _GIVEN.items():
        if index < len(node.input) and node.input[index]:
            name = f"{stem}/layout/given.{index}"
            before.append(helper.make_node("Transpose", [node.input[index]], [name], name, perm=axes))
            node.input[index] = name
    for index, axes in _TAKEN.items():
        if index < len(node.output) and node.output[index]:
            name = f"{stem}/layout/taken.{index}"
            after.append(helper.make_node("Transpose", [name], [node.output[index]], name, perm=axes))
            node.output[index] = name
    return before, after
