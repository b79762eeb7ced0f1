"""Known causes of torch.export failures, with the code to write instead: one row per cause."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """A reason why a module cannot be traced.

    Args:
        error: pattern of `{type}: {message}` of torch's error.
        cause, fix: one sentence each, for users.
        code: pattern of the line of the user's code in the traceback.
        read: pattern of torch's error in strict mode, which reads the code instead of running it.
        source: pattern that finds the line in the module's classes, if the error has no line.
    """

    error: str
    cause: str
    fix: str
    code: str = ""
    read: str = ""
    source: str = ""

    def matches(self, error: str, code: str, read: str) -> bool:
        given = ((self.error, error), (self.code, code), (self.read, read))
        return all(re.search(pattern, text) for pattern, text in given)


_GUARD = r"Could not guard on data-dependent"
_SIZE = r"Could not extract specialized integer"
_NUMBER = (
    "forward takes a number out of a tensor and uses it as a size, an index or a count; a graph has fixed ones.",
    "Index with the tensor itself (table[index], torch.gather), or keep a fixed size and mask with torch.where.",
)
_ONE_PATH = "a graph has one path for all values"

CAUSES = (
    Cause(
        _GUARD + "|" + _SIZE,
        "Packed sequences need lengths that are known only at run time.",
        "Pass the padded tensor to the layer itself; a session masks lanes that have no token.",
        read="pack_padded_sequence",
    ),
    Cause(
        _GUARD,
        "This loop runs until a tensor has a certain value; a graph has a fixed number of operations.",
        "Loop a fixed number of times, and select values with torch.where(condition, new, old).",
        code=r"^while\b",
    ),
    Cause(_GUARD, *_NUMBER, code=r"^(?!.*\b(if|and|or|not|assert)\b).*\b(int|float|round|item)\("),
    Cause(
        _GUARD,
        f"forward branches on the value of a tensor; {_ONE_PATH}.",
        "Compute both sides and select with torch.where(condition, a, b).",
    ),
    Cause(
        r"DataDependentOutputException",
        f"forward takes a Python result out of tensors; {_ONE_PATH}.",
        "Compare with operations that return tensors, such as ==, torch.isclose and .all(); select with torch.where.",
    ),
    Cause(_SIZE, *_NUMBER),
    Cause(
        r"\bSym(Float|Int|Bool)\b",
        "forward takes a number out of a tensor (.item(), .tolist(), float()), which has no value in a graph.",
        "Keep the number as a tensor, and move code that does not compute with torch out of forward.",
    ),
    Cause(
        r"\.?numpy\(?\)?.* is not supported for tensor subclasses|numpy\(\) on",
        "forward computes with NumPy on a tensor; a graph contains torch operations only.",
        "Use the torch operations of the same name.",
    ),
    Cause(
        r"functorch|functional_call|vmap",
        "forward transforms functions with torch.func, which torch.export cannot trace.",
        "Write the derivative or the batched function with torch operations.",
        source=r"torch\.func|functorch|vmap|jacrev|jacfwd|functional_call",
    ),
    Cause(
        r"fake tensor in the exported program constant|autograd",
        "forward computes gradients with torch.autograd, which torch.export cannot trace.",
        "Write the derivative with torch operations.",
    ),
    Cause(
        r"data is not allocated yet|data pointer|doesn't have storage",
        "Code outside torch reads the values of a tensor, which has no values during tracing.",
        "Use torch operations; torch.stack makes one tensor of several numbers.",
    ),
    Cause(
        r"no fake impl registered|fake impl",
        "forward calls a custom operator, which ONNX does not have.",
        "Compute it from torch operations.",
    ),
    Cause(
        r"UnsupportedOperatorException",
        "torch.export does not know the shape of this operator's result.",
        "Compute it from other torch operations.",
    ),
    Cause(
        r"RecursionError",
        "forward calls itself more often than Python allows.",
        "Write the recursion as a loop with a fixed number of iterations.",
    ),
)

SCRIPTED = Cause(
    "",
    "The module {} is TorchScript, which torch.export cannot trace.",
    "Replace it by the nn.Module that it was scripted from.",
)
"""The cause for a module with a `torch.jit.script` part, regardless of the error."""
