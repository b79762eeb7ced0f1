"""Whole numbers that torch divides are divided exactly in the graph, far out and below zero too."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from nsm.export.graphs.exact_division import exact_division
from nsm.export.graphs.passes import optimise

NUMBERS = np.concatenate([sign * (base + np.arange(-3, 1000)) for base in (0, 2**24, 2**31, 2**52) for sign in (1, -1)])


class Divide(nn.Module):
    def __init__(self, by: float, mode: str) -> None:
        super().__init__()
        self.by, self.mode = by, mode

    def forward(self, n: Tensor) -> Tensor:
        return torch.div(n, self.by, rounding_mode=self.mode)


def exported(module: nn.Module, example: Tensor, path: Path) -> tuple[onnxruntime.InferenceSession, list[str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module, (example,), dynamo=True, input_names=["n"], output_names=["q"], verbose=False, optimize=False
        )
    assert program is not None
    optimise(program.model)
    exact_division(program.model)
    onnx_ir.save(program.model, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session, [node.op_type for node in program.model.graph]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("mode", ["floor", "trunc"])
@pytest.mark.parametrize("by", [441, 7, -3])
def test_a_quotient_is_what_torch_says(by: int, mode: str, dtype: torch.dtype, tmp_path: Path) -> None:
    numbers = torch.from_numpy(NUMBERS if dtype == torch.int64 else NUMBERS[np.abs(NUMBERS) < 2**30]).to(dtype)
    module = Divide(by, mode)
    session, kinds = exported(module, numbers, tmp_path / "m.onnx")
    assert "Cast" not in kinds
    np.testing.assert_array_equal(session.run(None, {"n": numbers.numpy()})[0], module(numbers).numpy())


@pytest.mark.parametrize("module", [Divide(2.5, "floor"), Divide(2.5, "trunc")])
def test_a_division_by_no_whole_number_stays(module: Divide, tmp_path: Path) -> None:
    numbers = torch.arange(-9, 9)
    session, kinds = exported(module, numbers, tmp_path / "m.onnx")
    assert "Floor" in kinds
    np.testing.assert_array_equal(session.run(None, {"n": numbers.numpy()})[0], module(numbers).numpy())


class Seconds(nn.Module):
    """Floats that are rounded on purpose, in forms that are nearly those of a division."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, n: Tensor) -> Tensor:
        x = n.float()
        values = {
            "product": (torch.floor(x * 0.5)).long(),
            "sine": (torch.floor(torch.sin(x))).long(),
            "float": torch.floor(x / 2 + 0.5).long(),
            "other": (torch.floor(torch.abs(x / 2)) * torch.sign(x)).long(),
            "real": torch.floor(x / 3).long().float(),
        }
        return values[self.kind]


@pytest.mark.parametrize("kind", ["product", "sine", "float", "other", "real"])
def test_what_is_nearly_a_division_gives_the_same_as_before(kind: str, tmp_path: Path) -> None:
    numbers = torch.arange(-9, 9)
    session, _ = exported(Seconds(kind), numbers, tmp_path / "m.onnx")
    np.testing.assert_array_equal(session.run(None, {"n": numbers.numpy()})[0], Seconds(kind)(numbers).numpy())
