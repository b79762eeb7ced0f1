"""One table of operators for all calls of `torch.onnx.export` in a process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_tables: dict[tuple[int | None, bool], Any] = {}


@contextmanager
def shared_operator_table() -> Iterator[None]:
    """Let `torch.onnx.export` build its table of operators once, not in each call, where that took about 0.5 s.

    The class that builds it is private to torch (2.9 to 2.13). A version of torch without it builds the table in each
    call, as before.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        build, descriptor = ONNXRegistry.from_torchlib, vars(ONNXRegistry)["from_torchlib"]
    except (ImportError, AttributeError, KeyError):
        yield
        return

    def shared(opset_version: int | None = None) -> Any:
        # The table lists the operators of torchvision only if torchvision has been imported.
        key = opset_version, "torchvision" in sys.modules
        if key not in _tables:
            _tables[key] = build() if opset_version is None else build(opset_version=opset_version)
        return _tables[key]

    ONNXRegistry.from_torchlib = staticmethod(shared)  # type: ignore[method-assign]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = descriptor  # type: ignore[method-assign]
