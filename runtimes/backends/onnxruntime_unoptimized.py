"""Reference runtime: ONNX Runtime on the portable graph, without graph optimization."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nsm.runtimes.backends import onnxruntime
from nsm.runtimes.base import Runtime
from nsm.spec import StepSpec


def load(
    files: Mapping[str, Path], spec: StepSpec, device: str, threads: int | None, precision: str = "fp32"
) -> Runtime:
    """See `nsm.runtimes.backends.onnxruntime.load`."""
    return onnxruntime.load(files, spec, device, threads, precision, optimise=False)
