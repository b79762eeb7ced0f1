"""The target openvino: the graphs as OpenVINO IR, weights in fp32."""

from __future__ import annotations

import openvino as ov

from nsm.errors import BuildError
from nsm.export.build import Built, Request


def build(request: Request) -> Built:
    """Convert every entry; the files are what `openvino.Core().read_model` reads.

    Raises:
        BuildError: OpenVINO refuses the graph.
    """
    request.folder.mkdir(exist_ok=True)
    files = []
    for entry in request.spec.entries:
        path = request.folder / f"{entry.name}.xml"
        try:
            model = ov.convert_model(str(request.graph(entry.name)))
            ov.save_model(model, str(path), compress_to_fp16=False)
        except Exception as error:  # the binding raises bare RuntimeErrors
            raise BuildError(f"OpenVINO cannot convert {entry.name}.onnx: {error}") from error
        files += [path, path.with_suffix(".bin")]
    return Built(tuple(path.relative_to(request.directory).as_posix() for path in files), "cpu")
