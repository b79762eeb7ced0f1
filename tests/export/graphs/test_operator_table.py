"""torch.onnx.export builds its table of operators once a process."""

from __future__ import annotations

import pytest
import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry

from nsm.export.capture.program import quiet
from nsm.export.graphs import operator_table
from nsm.export.graphs.operator_table import shared_operator_table


def exported() -> list[tuple[str, ...]]:
    with quiet():
        program = torch.export.export(torch.nn.Linear(2, 3), (torch.zeros(1, 2),))
        written = torch.onnx.export(program, (torch.zeros(1, 2),), dynamo=True, verbose=False)
    assert written is not None
    return [(node.op_type, *node.input, *node.output) for node in written.model_proto.graph.node]


def test_the_table_is_built_once_and_the_graphs_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_table, "_tables", {})
    calls = 0
    build = ONNXRegistry.from_torchlib

    def counted(opset_version: int) -> ONNXRegistry:
        nonlocal calls
        calls += 1
        return build(opset_version=opset_version)

    monkeypatch.setattr(ONNXRegistry, "from_torchlib", staticmethod(counted))
    alone = exported()
    with shared_operator_table():
        for _ in range(2):
            assert exported() == alone
    assert calls == 2
    exported()
    assert calls == 3
