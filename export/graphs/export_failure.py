"""Why a traced program does not become an ONNX graph: the operator, its module, and the line of the user's code."""

from __future__ import annotations

import re

import click
from torch.export import ExportedProgram

from nsm.errors import BuildError, NsmError, UnsupportedError
from nsm.export.capture import DETAILS, SourceLine, causes, first_line, line_of_node, module_of

# The exporter's message; its exception classes are private.
_NO_FUNCTION = re.compile(
    r"No ONNX function found for (?:<OpOverload\(op='([\w.]+)', overload='(\w+)'\)>|(.+?)\. Fail)"
)
_NODE = re.compile(r"call_function\[target=torch\.ops\.([\w.]+)\]")

_FIXES = {
    "aten.masked_select": "Keep the full shape and mask with torch.where(condition, value, 0).",
    "aten._to_sparse": "Keep the tensor dense.",
    "aten.linalg_inv_ex": "Invert what is constant beforehand, and keep it as a buffer.",
}
"""Replacements for operators, where a specific one is known."""
_FIX = "Compute it from other operations of torch."


def failure(error: Exception, program: ExportedProgram, entry: str) -> NsmError:
    """The error to raise for a failure of the exporter.

    Args:
        error: the exporter's.
        program: to export.
        entry: the name of the graph.

    Returns:
        An `UnsupportedError` that names an operator that ONNX lacks, or a `BuildError` with the exporter's
        message; with the module and the line of the user's code, if the program records them.
    """
    for cause in causes(error):
        if match := _NO_FUNCTION.search(str(cause)):
            name, overload, other = match.groups()
            called, line = _origin(program, f"{name}.{overload}" if name else other)
            return UnsupportedError(
                f"ONNX has nothing for the operator {called}, so that the graph {entry} cannot be written"
                f"{_at(line)}{_FIXES.get(name or other, _FIX)}"
            )
    for cause in causes(error):
        if match := _NODE.search(str(cause)):
            called, line = _origin(program, match[1])
            root = list(causes(error))[-1]
            return BuildError(
                f"The ONNX exporter failed on the operator {called} of {entry}{_at(line)}It says: "
                f"{first_line(click.unstyle(str(root)))} {DETAILS}"
            )
    return BuildError(f"The ONNX exporter failed on {entry}: {click.unstyle(str(error))}")


def _at(line: SourceLine | None) -> str:
    return f": {line}" if line else ". "


def _origin(program: ExportedProgram, operator: str) -> tuple[str, SourceLine | None]:
    """An operator with its module, as far as a program tells, and its line: `aten.sort in the module head.top (TopK)`.

    Exporters decompose operators first, so the name that the model uses is in the original program.
    """
    made = next((node for node in program.graph.nodes if str(node.target) == operator), None)
    try:
        made = made or next(node for node in program.run_decompositions().graph.nodes if str(node.target) == operator)
    except Exception:  # the exporter may have got further, by other ways, and taken other operators
        return _short(operator), None
    before = [source.name for source in made.meta.get("from_node", [])]
    node = next((item for item in program.graph.nodes if item.name in before), made)
    called = _short(operator) if node.target == made.target else f"{_short(operator)} (of {_short(node.target)})"
    module = module_of(node)
    return (f"{called} in the module {module}" if module else called), line_of_node(node)


def _short(operator: object) -> str:
    return str(operator).removesuffix(".default")
