"""Operators that ONNX or a target does not have: named, with the node and the module that it came from; exit code 3."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.export import ExportedProgram

import nsm
from nsm.bundle import Bundle
from nsm.errors import BuildError, UnsupportedError
from nsm.export.builders import openvino
from nsm.export.builders.base import Request
from nsm.export.capture.program import DETAILS
from nsm.export.graphs.export_failure import failure
from nsm.runtimes.backends.onnxruntime import open_graph
from tests.export.foreign_graphs import HALF, Ports, leaky, write
from tests.export.helpers import invoke, refused, succeeded

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch says of its own deprecated parts


class Spread(nn.Module):
    """Singular values, which ONNX knows nothing of."""

    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = torch.linalg.svdvals(x.reshape(-1, 1, 3))
        return x * values


class Stack(nn.Module):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Tanh(), last)])

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = 0.5 * h + self.first(x)
        return self.blocks[0](h), h


LINE = inspect.getsourcelines(Spread)[1] + 4
TOLD = (
    f"blocks.0.1 (Spread), so that the graph step cannot be written: {__file__}:{LINE}, in forward:\n    values: Tensor"
)


def test_an_operator_that_onnx_lacks_is_named_with_its_module_and_line(tmp_path: Path) -> None:
    step = nsm.as_step(Stack(Spread()), [nsm.Carried("h", torch.zeros(1, 3))], token_shape=(3,))
    with pytest.raises(UnsupportedError) as caught:
        nsm.export_model(step, "onnx", tmp_path / "m.nsm")
    assert str(caught.value) == (
        f"ONNX has nothing for the operator aten._linalg_svd (of aten.linalg_svdvals) in the module {TOLD} = "
        "torch.linalg.svdvals(x.reshape(-1, 1, 3))\nCompute it from other operations of torch."
    )
    assert caught.value.exit_code == 3
    assert caught.value.__cause__ is not None
    assert list(tmp_path.iterdir()) == []


def test_the_module_and_line_of_a_program_are_named_too(tmp_path: Path) -> None:
    program = torch.export.export(Stack(Spread()), (torch.zeros(1, 3), torch.zeros(1, 3)))
    torch.export.save(program, tmp_path / "m.pt2")
    command = ("export", tmp_path / "m.pt2", "--state", "h=1", "-t", "onnx", "-o", tmp_path / "m.nsm")
    result = invoke(*command)
    refused(result, 3, f"aten._linalg_svd (of aten.linalg_svdvals) in the module {TOLD}")
    shown = invoke(*command, "--verbose")
    assert "Traceback" in shown.stderr
    assert "No ONNX function found" in shown.stderr


class Whole(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = torch.linalg.svdvals(x)
        return values


class Picked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.masked_select(x, x > 0).sum()


class Bare(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.model = part

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.model(x)
        return found


def program_of(part: nn.Module) -> ExportedProgram:
    return torch.export.export(Bare(part), (torch.zeros(2, 3),))


@pytest.mark.parametrize(
    ("part", "operator", "told", "fix"),
    [
        (
            Whole(),
            "<OpOverload(op='aten._linalg_svd', overload='default')>",
            "aten._linalg_svd (of aten.linalg_svdvals) in the module model (Whole), so",
            "Compute it from other",
        ),
        (Whole(), "<OpOverload(op='aten.frexp', overload='Tensor')>", "the operator aten.frexp.Tensor, so", "Compute"),
        (Whole(), "cond", "the operator cond, so", "Compute"),
        (
            Picked(),
            "<OpOverload(op='aten.masked_select', overload='default')>",
            "aten.masked_select in the module model (Picked), so",
            "Keep the full shape and mask with torch.where",
        ),
    ],
)
def test_what_torch_does_not_tell_is_left_out(part: nn.Module, operator: str, told: str, fix: str) -> None:
    """The exporter may take other operators than those that are found in the model."""
    inner = RuntimeError(f"No ONNX function found for {operator}. Failure message: none")
    outer = RuntimeError("It failed.")
    outer.__cause__ = inner
    found = failure(outer, program_of(part), "step")
    assert isinstance(found, UnsupportedError)
    with pytest.raises(UnsupportedError, match=re.escape(told)):
        raise found
    assert fix in str(found)


def test_a_failure_at_an_operator_is_told_with_its_line() -> None:
    inner = ValueError("rank 0\nis none")
    outer = RuntimeError(
        "Error when translating node %svd : call_function[target=torch.ops.aten.linalg_svdvals.default]"
    )
    outer.__cause__ = inner
    number = inspect.getsourcelines(Whole)[1] + 2
    found = failure(outer, program_of(Whole()), "step")
    assert isinstance(found, BuildError)
    assert str(found) == (
        "The ONNX exporter failed on the operator aten.linalg_svdvals in the module model (Whole) of step: "
        f"{__file__}:{number}, in forward:\n    values: Tensor = torch.linalg.svdvals(x)\nIt says: rank 0. {DETAILS}"
    )


def test_any_other_failure_is_told_in_the_exporters_words() -> None:
    found = failure(RuntimeError("\x1b[96mIt failed.\x1b[0m"), program_of(Whole()), "decode")
    assert isinstance(found, BuildError)
    assert str(found) == "The ONNX exporter failed on decode: It failed."


@pytest.fixture(scope="module")
def determinant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph with an operator of the standard that ONNX Runtime has, and others have not."""
    nodes = [
        *leaky()[:2],
        helper.make_node("Reshape", ["hn", "square"], ["matrix"]),
        helper.make_node("Det", ["matrix"], ["det"], "head/det"),
        helper.make_node("Mul", ["hn", "det"], ["y"]),
    ]
    inputs: Ports = {"x": [1, 4], "h": [1, 4]}
    path = tmp_path_factory.mktemp("determinant") / "m.onnx"
    return write(path, nodes, inputs, {"y": [1, 4], "hn": [1, 4]}, {**HALF, "square": np.array([2, 2])})


@pytest.mark.parametrize(
    ("target", "name", "reason"), [("ov", "OpenVINO", "No conversion rule"), ("trt", "TensorRT", "UNSUPPORTED_NODE")]
)
def test_an_operator_that_a_target_lacks_is_named_with_its_node(
    target: str, name: str, reason: str, determinant: Path, tmp_path: Path
) -> None:
    options = ("--num-samples", "1", "--golden-steps", "3", "-o", tmp_path / "m.nsm")
    result = invoke("export", determinant, "-t", target, *options)
    told = f"{name} does not support these operators of step.onnx: Det (the node model/head/det). Build"
    refused(result, 3, told, "for instance onnxruntime", reason)


def test_an_operator_is_named_where_nothing_reads_the_graph(
    determinant: Path, tmp_path: Path, hide: Callable[..., None]
) -> None:
    """On a device there is no package onnx."""
    bundle = tmp_path / "m.nsm"
    succeeded(invoke("export", determinant, "-t", "ort", "--num-samples", "1", "--golden-steps", "3", "-o", bundle))
    hide("onnx")
    request = Request(bundle, tmp_path / "openvino", Bundle(bundle).manifest.spec, None)
    # In this process: a command builds in another one, which finds the package again.
    with pytest.raises(UnsupportedError, match=r"of step\.onnx: Det\. Build another target"):
        openvino.build(request)


def test_an_operator_that_onnx_runtime_lacks_is_unsupported(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Det", ["a"], ["b"], "head/det")],
        "graph",
        [helper.make_tensor_value_info("a", TensorProto.DOUBLE, [2, 2])],
        [helper.make_tensor_value_info("b", TensorProto.DOUBLE, [])],
    )
    model: Any = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    (tmp_path / "step.onnx").write_bytes(model.SerializeToString())
    options = ort.SessionOptions()
    options.log_severity_level = 4
    with pytest.raises(UnsupportedError, match=r"an operator of step\.onnx: .*Det\(\d+\) node with name 'head/det'"):
        open_graph(tmp_path / "step.onnx", options)
    (tmp_path / "step.onnx").write_bytes(b"rubbish")
    with pytest.raises(BuildError, match="ONNX Runtime cannot open"):
        open_graph(tmp_path / "step.onnx", options)
