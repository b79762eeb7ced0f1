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
        code: pattern of the line of the user's code that the error passed through.
        read: pattern of the error that torch gives where it reads the code instead of running it.
        source: pattern by which the line is found in the module's classes, where the error does not tell it.
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
    "A number taken out of a tensor becomes a size, an index or a count here; in a graph these are fixed.",
    "Index with the tensor itself (table[index], torch.gather), or keep a fixed size and mask with torch.where.",
)
_ONE_PATH = "a graph holds one path for all values"

CAUSES = (
    Cause(
        _GUARD + "|" + _SIZE,
        "Packed sequences are cut and sorted by lengths that are known only while a stream runs.",
        "Give the padded tensor to the layer itself; a session masks lanes that have no token.",
        read="pack_padded_sequence",
    ),
    Cause(
        _GUARD,
        "This loop runs until a tensor has some value, and a graph has a fixed number of operations.",
        "Loop a fixed number of times, and keep values with torch.where(condition, new, old).",
        code=r"^while\b",
    ),
    Cause(_GUARD, *_NUMBER, code=r"^(?!.*\b(if|and|or|not|assert)\b).*\b(int|float|round|item)\("),
    Cause(
        _GUARD,
        f"Python decides here by the value of a tensor, and {_ONE_PATH}.",
        "Compute both sides and select with torch.where(condition, a, b).",
    ),
    Cause(
        r"DataDependentOutputException",
        f"Python takes a result out of tensors here, and {_ONE_PATH}.",
        "Compare with operations that give tensors, such as ==, torch.isclose and .all(), and select with torch.where.",
    ),
    Cause(_SIZE, *_NUMBER),
    Cause(
        r"\bSym(Float|Int|Bool)\b",
        "Python code takes a number out of a tensor here (.item(), .tolist(), float()), which has no value in a graph.",
        "Keep the number a tensor, and leave what is not computed with torch out of forward.",
    ),
    Cause(
        r"\.?numpy\(?\)?.* is not supported for tensor subclasses|numpy\(\) on",
        "NumPy computes on the values of a tensor here, and a graph holds operations of torch only.",
        "Use the operations of torch of the same name.",
    ),
    Cause(
        r"functorch|functional_call|vmap",
        "forward transforms functions with torch.func, whose tensors torch.export cannot follow.",
        "Write the derivative or the batched function out with operations of torch.",
        source=r"torch\.func|functorch|vmap|jacrev|jacfwd|functional_call",
    ),
    Cause(
        r"fake tensor in the exported program constant|autograd",
        "forward computes gradients with torch.autograd, which torch.export cannot follow.",
        "Write the derivative out with operations of torch.",
    ),
    Cause(
        r"data is not allocated yet|data pointer|doesn't have storage",
        "Code that is not torch's reads the values of a tensor here, which has none while it is traced.",
        "Use operations of torch; torch.stack makes one tensor of several numbers.",
    ),
    Cause(
        r"no fake impl registered|fake impl",
        "This calls a custom operator, which ONNX does not have.",
        "Compute it from operations of torch.",
    ),
    Cause(
        r"UnsupportedOperatorException",
        "torch.export does not know what shape the result of this operator has.",
        "Compute it from other operations of torch.",
    ),
    Cause(
        r"RecursionError",
        "forward calls itself more often than Python allows.",
        "Write the recursion as a loop with a fixed number of rounds.",
    ),
)

SCRIPTED = Cause(
    "",
    "The module {} is TorchScript, which torch.export cannot trace.",
    "Put the nn.Module that it was scripted from in its place.",
)
"""For a module with a part that `torch.jit.script` made, whatever the error says."""
