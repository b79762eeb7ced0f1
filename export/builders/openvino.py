"""The target openvino: the graphs as OpenVINO IR, with one shared file of fp32 weights."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import openvino as ov

from nsm.bundle import WEIGHTS
from nsm.errors import BuildError
from nsm.export.builders.base import Built, Request, lacking

_LACKING = re.compile(r"No conversion rule found for operations: (.+)")


def build(request: Request) -> Built:
    """Convert every entry to files for `openvino.Core().read_model("step.xml", "weights.bin")`.

    Raises:
        UnsupportedError: OpenVINO lacks an operator; the message names the nodes.
        BuildError: OpenVINO rejects the graph for another reason.
    """
    request.folder.mkdir(exist_ok=True)
    graphs = []
    for entry in request.spec.entries:
        path = request.folder / f"{entry.name}.xml"
        try:
            model = ov.convert_model(str(request.graph(entry.name)))
            ov.save_model(model, str(path), compress_to_fp16=False)
        except Exception as error:  # the binding raises bare RuntimeErrors
            operators = _LACKING.search(str(error))
            if operators:
                names = [re.sub(r"-\d+$", "", name.strip()).rsplit(".", 1)[-1] for name in operators[1].split(",")]
                nodes = _nodes_of(request.graph(entry.name), names)
                raise lacking("OpenVINO", request.graph(entry.name), nodes, operators[0]) from error
            raise BuildError(f"OpenVINO cannot convert {entry.name}.onnx: {error}") from error
        graphs.append(path)
    share_weights(graphs, request.folder / WEIGHTS)
    files = [*graphs, request.folder / WEIGHTS]
    return Built(tuple(path.relative_to(request.directory).as_posix() for path in files), request.device or "cpu")


def _nodes_of(graph: Path, operators: Sequence[str]) -> list[tuple[str, str]]:
    """Return (operator, node name) of these operators; the names are "" if onnx is not installed."""
    if importlib.util.find_spec("onnx") is None:
        return [(operator, "") for operator in operators]
    import onnx

    from nsm.export.graphs import node_name, nodes_of

    model = onnx.load(str(graph), load_external_data=False)
    return [(node.op_type, node_name(node)) for node in nodes_of(model.graph) if node.op_type in operators]


def share_weights(graphs: list[Path], weights: Path) -> None:
    """Replace the `.bin` of each graph by one shared file that stores equal constants once.

    A constant of the IR refers to its data by offset, so only the offsets change.
    """
    places: dict[bytes, int] = {}
    with weights.open("wb") as file:
        for graph in graphs:
            own = graph.with_suffix(".bin")
            numbers = own.read_bytes()
            tree = ElementTree.parse(graph)
            for layer in tree.iter("layer"):
                data = layer.find("data")
                if layer.get("type") != "Const" or data is None:
                    continue
                start, size = int(data.attrib["offset"]), int(data.attrib["size"])
                content = numbers[start : start + size]
                digest = hashlib.sha256(content).digest()
                if digest not in places:
                    file.write(bytes(-file.tell() % 64))
                    places[digest] = file.tell()
                    file.write(content)
                data.set("offset", str(places[digest]))
            tree.write(graph, encoding="utf-8", xml_declaration=True)
            own.unlink()
