"""Walk an ONNX graph, including the branches and loop bodies inside its nodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from nsm.errors import InputError


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph, and those inside its nodes."""
    yield graph
    for node in graph.node:
        for inner in graphs_in(node):
            yield from graphs_of(inner)


def nodes_of(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph or function, and those inside them."""
    for node in graph.node:
        yield node
        for inner in graphs_in(node):
            yield from nodes_of(inner)


def tensors_of(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """All tensors of a file: weights, and constants that nodes have as attributes."""
    for graph in graphs_of(model.graph):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for node in graph.node:
            for attribute in node.attribute:
                yield from (tensor for tensor in (attribute.t, *attribute.tensors) if tensor.data_type)


def node_name(node: onnx.NodeProto) -> str:
    """The name of a node for messages: its own, or that of its output."""
    return node.name or next(iter(node.output), "") or f"without a name of {node.op_type}"


def dtype_of(kind: int, what: str) -> np.dtype[Any]:
    """The numpy dtype of an element type.

    Args:
        kind: its number in the file.
        what: the tensor, for the message.

    Raises:
        InputError: ONNX has no such type.
    """
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))
    except KeyError as error:
        raise InputError(
            f"{what} has the element type {kind}, which ONNX does not know. Was the file damaged? Copy or export it "
            "again."
        ) from error


def graphs_in(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs that a node has as attributes: branches of an `If`, the body of a `Loop` or `Scan`."""
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            if inner.node or inner.initializer or inner.output:
                yield inner
