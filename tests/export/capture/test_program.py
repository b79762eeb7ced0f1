"""What a person is told where torch.export fails: the line, a cause, and what to write instead."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nsm
from nsm.errors import NsmError, RunError, UnsupportedError
from nsm.export.capture.causes import CAUSES
from nsm.export.capture.program import DETAILS, capture
from nsm.export.capture.source_line import SourceLine
from tests.export import untraceable
from tests.export.untraceable import Autograd, Base, Derivative, Ternary

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch says of its own deprecated parts

EXAMPLES = (torch.zeros(1, 3), torch.zeros(1, 3))

TOLD = {
    "Branch": ("forward branches on the value of a tensor", "select with torch.where(condition, a, b)."),
    "Ternary": ("forward branches on the value of a tensor", "select with torch.where(condition, a, b)."),
    "Closure": ("forward branches on the value of a tensor", "select with torch.where(condition, a, b)."),
    "InAPart": ("forward branches on the value of a tensor", "select with torch.where(condition, a, b)."),
    "While": ("This loop runs until a tensor has a certain value", "Loop a fixed number of times"),
    "Rounds": ("forward takes a number out of a tensor", "torch.gather"),
    "Index": ("forward takes a number out of a tensor", "Index with the tensor itself"),
    "Size": ("forward takes a number out of a tensor", "keep a fixed size and mask"),
    "Equal": ("forward takes a Python result out of tensors", "operations that return tensors"),
    "Close": ("forward takes a Python result out of tensors", "torch.isclose"),
    "Library": ("forward takes a number out of a tensor (.item(), .tolist(), float())", "Keep the number as a"),
    "Numpy": ("forward computes with NumPy on a tensor", "the torch operations of the same name."),
    "Pointer": ("Code outside torch reads the values of a tensor", "Use torch operations;"),
    "Packed": (
        "Packed sequences need lengths that are known only at run time",
        "Pass the padded tensor to the layer itself",
    ),
    "Derivative": ("forward transforms functions with torch.func", "Write the derivative"),
    "Autograd": ("forward computes gradients with torch.autograd", "Write the derivative"),
    "Scripted": ("The module mix is TorchScript", "Replace it by the nn.Module that it was scripted from."),
    "Custom": ("forward calls a custom operator", "Compute it from torch operations."),
    "Nested": (
        "torch.export does not know the shape of this operator's result",
        "Compute it from other torch operations.",
    ),
    "Deep": ("forward calls itself more often than Python allows", "a loop with a fixed number of iterations."),
    "Broken": ("It says: ArithmeticError: the gain is missing. --verbose", ""),
}


def kind(name: str) -> type[nn.Module]:
    found: type[nn.Module] = getattr(untraceable, name)
    return found


def line(name: str) -> tuple[int, str]:
    """Number and code of the line of a module that is at fault."""
    made = untraceable.Gate if name == "InAPart" else kind(name)
    lines, start = inspect.getsourcelines(made)
    index = next(index for index, text in enumerate(lines) if text.rstrip().endswith("# here"))
    return start + index, lines[index].strip()


def failed(name: str) -> NsmError:
    with pytest.raises(NsmError) as caught:
        capture(kind(name)().eval(), EXAMPLES, "Model")
    return caught.value


@pytest.mark.parametrize("name", TOLD)
def test_the_line_the_cause_and_what_to_write_are_told(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    error = failed(name)
    cause, fix = TOLD[name]
    number, code = line(name)
    head, shown, told = str(error).split("\n")
    assert head.startswith(f"Model cannot be traced by torch.export: {untraceable.__file__}:{number}, in ")
    assert shown == f"    {code}"
    assert told.startswith(cause)
    assert fix in told
    assert told.endswith(DETAILS)
    assert error.exit_code == (4 if name == "Broken" else 3)
    assert error.__cause__ is not None  # in torch's own words
    assert str(error.__cause__) not in str(error) or name == "Deep"
    assert capfd.readouterr() == ("", "")


def test_every_row_of_the_table_and_every_module_is_tried() -> None:
    tried = [str(failed(name)) for name in TOLD]
    for row in CAUSES:
        assert any(row.cause in text and row.fix in text for text in tried), row
    modules = {name for name, item in vars(untraceable).items() if isinstance(item, type) and issubclass(item, Base)}
    assert modules - {"Base"} | {"Packed"} == set(TOLD)


def test_the_same_is_told_by_an_export(tmp_path: Path) -> None:
    step = nsm.as_step(Ternary(), [nsm.Carried("h", torch.zeros(1, 3), None)], token_shape=(3,))
    with pytest.raises(UnsupportedError) as caught:
        nsm.export_model(step, "onnx", tmp_path / "m.nsm")
    told = f"Ternary cannot be traced by torch.export: {untraceable.__file__}:{line('Ternary')[0]}, in change:"
    assert str(caught.value).startswith(told)
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_runs_but_not_as_a_reference_is_told_with_its_line(tmp_path: Path) -> None:
    step = nsm.as_step(Autograd(), [nsm.Carried("h", torch.zeros(1, 3), None)], token_shape=(3,))
    number, code = line("Autograd")
    with pytest.raises(RunError, match=r"PyTorch failed while it ran step: ") as caught:
        nsm.export_model(step, "onnx", tmp_path / "m.nsm")
    assert f"{untraceable.__file__}:{number}, in change:\n    {code}\nelement 0" in str(caught.value)


def test_without_a_line_the_cause_is_told_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that are made at run time have no source."""

    def built_in(kind: object) -> str:
        raise TypeError(f"{kind} is a built-in class")

    monkeypatch.setattr(inspect, "getfile", built_in)
    with pytest.raises(UnsupportedError) as caught:
        capture(Derivative().eval(), EXAMPLES, "Model")
    assert str(caught.value).startswith("Model cannot be traced by torch.export. forward transforms functions")


def test_a_module_in_a_generated_file_is_not_shown() -> None:
    space: dict[str, Any] = {"nn": nn}
    code = "class Made(nn.Module):\n    def forward(self, x, h):\n        return x if x.sum() > 0 else h, h\n"
    exec(compile(code, "<generated>", "exec"), space)
    with pytest.raises(UnsupportedError, match=r"^Model cannot be traced by torch\.export\. forward branches"):
        capture(space["Made"]().eval(), EXAMPLES, "Model")


def test_long_lines_are_cut() -> None:
    assert str(SourceLine("m.py", 3, "forward", "x" * 500)) == f"m.py:3, in forward:\n    {'x' * 120} ...\n"
