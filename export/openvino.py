"""The target openvino: the graphs as OpenVINO IR, over one file of fp32 weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from xml.etree import ElementTree

import openvino as ov

from nsm.errors import BuildError
from nsm.export.build import Built, Request
from nsm.runtimes.openvino import WEIGHTS


def build(request: Request) -> Built:
    """Convert every entry; the files are what `openvino.Core().read_model("step.xml", "weights.bin")` reads.

    Raises:
        BuildError: OpenVINO refuses the graph.
    """
    request.folder.mkdir(exist_ok=True)
    graphs = []
    for entry in request.spec.entries:
        path = request.folder / f"{entry.name}.xml"
        try:
            model = ov.convert_model(str(request.graph(entry.name)))
            ov.save_model(model, str(path), compress_to_fp16=False)
        except Exception as error:  # the binding raises bare RuntimeErrors
            raise BuildError(f"OpenVINO cannot convert {entry.name}.onnx: {error}") from error
        graphs.append(path)
    share_weights(graphs, request.folder / WEIGHTS)
    files = [*graphs, request.folder / WEIGHTS]
    return Built(tuple(path.relative_to(request.directory).as_posix() for path in files), request.device or "cpu")


def share_weights(graphs: list[Path], weights: Path) -> None:
    """Replace each graph's own `.bin` by one file for all; equal constants are stored once.

    A constant of the IR names the place of its numbers in the file, so only these places change.
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
