"""The target onnxruntime-cuda: the portable graphs, unchanged, for a GPU."""

from __future__ import annotations

from dataclasses import replace

from nsm.export.builders import onnxruntime
from nsm.export.builders.base import Built, Request


def build(request: Request) -> Built:
    """Return the graphs as the artifact; ONNX Runtime chooses CUDA kernels when it opens them."""
    return replace(onnxruntime.build(request), device="cuda")
