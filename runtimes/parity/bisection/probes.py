"""Probes: a graph with its intermediate results as outputs, named as in the portable ONNX graph."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from nsm.bundle import WEIGHTS
from nsm.errors import MissingDependencyError
from nsm.trace import Arrays

Probe = Callable[[Arrays], Arrays]
"""(inputs by name, more than the graph takes perhaps) -> every tensor that the graph can show, by name."""


@dataclass(frozen=True)
class Node:
    """One operation of an ONNX graph, with the names of the tensors that it takes and gives."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_nodes(path: Path) -> tuple[Node, ...]:
    """The operations of an ONNX graph, in the order of the file, which is topological.

    Raises:
        MissingDependencyError: the package onnx is not installed.
    """
    _require_onnx()
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    return tuple(
        Node(node.name, node.op_type, tuple(node.input), tuple(name for name in node.output if name))
        for node in graph.node
    )


def onnx_probe(path: Path, optimise: bool) -> Probe:
    """An ONNX graph in ONNX Runtime, with every result as an output.

    Args:
        path: of the graph; its weights lie beside it.
        optimise: whether ONNX Runtime may optimize between the outputs.

    Raises:
        MissingDependencyError: the package onnx is not installed.
    """
    _require_onnx()
    import onnx
    import onnxruntime as ort

    model = onnx.load(str(path), load_external_data=False)
    given = {value.name for value in model.graph.output}
    results = [name for node in model.graph.node for name in node.output if name and name not in given]
    # ONNX Runtime infers their types and shapes.
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in results)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    taken = [value.name for value in session.get_inputs()]
    shown = [value.name for value in session.get_outputs()]
    return lambda feeds: dict(zip(shown, session.run(shown, {name: feeds[name] for name in taken}), strict=True))


def openvino_probe(
    path: Path, names: Collection[str], precision: str = "fp32", options: Mapping[str, str] = MappingProxyType({})
) -> Probe:
    """An OpenVINO IR with those of its tensors as outputs that still have one of these names.

    Args:
        path: of the `.xml` file; its weights lie beside it.
        names: to look for.
        precision: that OpenVINO computes in: fp32, fp16 or bf16; anything else is fp32.
        options: compile options of the artifact.
    """
    import openvino as ov
    from openvino import properties as props

    core = ov.Core()
    model = core.read_model(path, path.with_name(WEIGHTS))
    wanted, shown = set(names), {}
    given = {name for output in model.outputs for name in output.get_names()}
    for operation in model.get_ordered_ops():
        if operation.get_type_name() in ("Parameter", "Constant", "Result"):
            continue
        for output in operation.outputs():
            found = sorted(wanted & output.get_names())
            if not found:
                continue
            shown[found[0]] = found
            if not given & output.get_names():
                model.add_outputs(output)
    kinds = {"fp16": ov.Type.f16, "bf16": ov.Type.bf16}
    config = {props.hint.inference_precision(): kinds.get(precision, ov.Type.f32), **options}
    compiled = core.compile_model(model, "CPU", config)
    request = compiled.create_infer_request()
    taken = [value.get_any_name() for value in compiled.inputs]

    def probe(feeds: Arrays) -> Arrays:
        request.infer({name: feeds[name] for name in taken})
        values = {first: request.get_tensor(first).data.copy() for first in shown}
        return {name: values[first] for first, found in shown.items() for name in found}

    return probe


def _require_onnx() -> None:
    if importlib.util.find_spec("onnx") is None:
        raise MissingDependencyError(
            "Naming the operation at fault needs the package onnx, which is not installed. "
            'Install it with: pip install "nsm-toolkit[torch]", or onnx alone.'
        )
