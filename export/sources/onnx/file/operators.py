"""Which operators of a foreign ONNX graph cannot be a step's, by name, with the node and the module it came from."""

from __future__ import annotations

import ast
from collections.abc import Collection
from pathlib import Path

import onnx
from onnx import TensorProto, numpy_helper

from nsm.errors import UnsupportedError
from nsm.export.graphs import graphs_of, node_name, nodes_of

RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")

_SCOPES = "pkg.torch.onnx.name_scopes"


def check_operators(path: Path, model: onnx.ModelProto) -> None:
    """Refuse operators that no other backend has, those that draw random numbers, and those in training mode.

    Raises:
        UnsupportedError: names the node, and the module that it comes from where the file says so.
    """
    off = _never_true(model)
    for node in nodes_of(model.graph):
        what = f"{path}: the node {node_name(node)}{where(node)} is "
        if node.domain not in ("", "ai.onnx"):
            raise UnsupportedError(
                f"{what}the operator {node.domain}::{node.op_type}, which is not in the ONNX standard, so that no "
                "other backend has it. Export without it: for graphs that ONNX Runtime has optimised, take the one "
                "from before."
            )
        if node.op_type in RANDOM:
            raise UnsupportedError(
                f"{what}{node.op_type}, which draws random numbers: with each call others, and on every backend others "
                "again, so that nothing could be compared. Export the model without noise."
            )
        if node.op_type == "BatchNormalization" and _in_training(node):
            raise UnsupportedError(
                f"{what}a BatchNormalization in training mode, which normalises by the statistics of the call itself "
                "and not by those of the training data: a stream is answered differently when another one is beside "
                "it. Export the model in eval mode (model.eval()). If the layer keeps no running statistics "
                "(track_running_stats=False), train it with them."
            )
        if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2] and node.input[2] not in off:
            raise UnsupportedError(
                f"{what}a Dropout that is, or may be, in training mode, and so draws random numbers with each call. "
                "Export the model in eval mode."
            )


def _in_training(node: onnx.NodeProto) -> bool:
    """Whether a BatchNormalization says so, or, before operator set 14, gives the statistics of a batch as well."""
    return any(item.name == "training_mode" and item.i for item in node.attribute) or any(node.output[1:])


def where(node: onnx.NodeProto) -> str:
    """`, of the module layers.0.linear,` where torch's exporter wrote it down; else nothing."""
    text = next((item.value for item in node.metadata_props if item.key == _SCOPES), "[]")
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # it was not torch that wrote it
        return ""
    # From the whole model to the operation itself, which is no module.
    names = [str(scope) for scope in scopes[:-1] if scope] if isinstance(scopes, list) else []
    return f", of the module {names[-1]}," if names else ""


def _never_true(model: onnx.ModelProto) -> Collection[str]:
    """Names of constants that are false."""
    found = {t.name for graph in graphs_of(model.graph) for t in graph.initializer if _is_false(t)}
    for node in nodes_of(model.graph):
        if node.op_type == "Constant" and any(item.name == "value" and _is_false(item.t) for item in node.attribute):
            found.add(node.output[0])
    # An initializer that is also an input may be overridden.
    return found - {value.name for value in model.graph.input}


def _is_false(tensor: TensorProto) -> bool:
    return tensor.data_type == TensorProto.BOOL and not numpy_helper.to_array(tensor).any()
