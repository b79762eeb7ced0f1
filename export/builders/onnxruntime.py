"""The targets onnx and onnxruntime: the portable graphs themselves, unchanged."""

from __future__ import annotations

from nsm.export.builders.base import Built, Request


def build(request: Request) -> Built:
    """Return the graphs and their weights as the artifact; convert nothing."""
    files = sorted(path for path in request.graphs.iterdir() if path.is_file())
    return Built(tuple(path.relative_to(request.directory).as_posix() for path in files), request.device or "cpu")
