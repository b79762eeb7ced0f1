"""The target onnxruntime-cuda: the graphs as they are, for a GPU."""

from __future__ import annotations

from dataclasses import replace

from nsm.export.builders import onnxruntime
from nsm.export.builders.base import Built, Request


def build(request: Request) -> Built:
    """Nothing is converted; ONNX Runtime chooses its kernels when it opens the graphs."""
    return replace(onnxruntime.build(request), device="cuda")
