"""Why torch's exporter gave up on a model, in a sentence: the operator that ONNX does not have, and its module."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import torch
from torch import Tensor, fx, nn

from nsm.errors import BuildError, NsmError, UnsupportedError

# What the exporter raises for it; its own classes are private.
_NO_FUNCTION = re.compile(
    r"No ONNX function found for (?:<OpOverload\(op='([\w.]+)', overload='(\w+)'\)>|(.+?)\. Fail)"
)


def failure(error: Exception, module: nn.Module, examples: tuple[Tensor, ...], entry: str) -> NsmError:
    """What to raise for an error of the exporter.

    Args:
        error: as it was caught.
        module, examples: what was exported.
        entry: the graph that was to be written.

    Returns:
        An `UnsupportedError` that names an operator and the module that it came from, or a `BuildError` with the
        exporter's own words.
    """
    for cause in _causes(error):
        match = _NO_FUNCTION.search(str(cause))
        if match:
            name, overload, other = match.groups()
            operator = f"{name}.{overload}" if name else other
            return UnsupportedError(
                f"ONNX has nothing for the operator {_origin(module, examples, operator)}, so that the graph {entry} "
                "cannot be written. Compute it from other operations of torch."
            )
    return BuildError(f"The ONNX exporter failed on {entry}: {click.unstyle(str(error))}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _origin(module: nn.Module, examples: tuple[Tensor, ...], operator: str) -> str:
    """An operator with where it came from, as far as torch tells: `aten.sort in the module head.top (TopK)`."""
    try:
        program = torch.export.export(module, examples, strict=False)
        made = next(node for node in program.run_decompositions().graph.nodes if str(node.target) == operator)
    except Exception:  # the exporter may have got further, by other ways, and taken other operators
        return _short(operator)
    # Exporters take operators apart first: what the model calls has its name in the program from before.
    before = [source.name for source in made.meta.get("from_node", [])]
    node = next((item for item in program.graph.nodes if item.name in before), made)
    called = _short(operator) if node.target == made.target else f"{_short(operator)} (of {_short(node.target)})"
    # A program that was loaded knows its modules itself; to torch.export it is one.
    loaded = [part.graph for part in module.modules() if isinstance(part, fx.GraphModule)]
    nodes = [item for graph in loaded for item in graph.nodes if item.target == node.target]
    stack = list((nodes[0] if nodes else node).meta.get("nn_module_stack", {}).values())
    if not stack:
        return called
    path, kind = stack[-1]
    name = re.sub(r"^model\.(module(\.|$))?", "", path)
    kind = str(getattr(kind, "__name__", kind)).rsplit(".", 1)[-1]
    return f"{called} in the module {f'{name} ({kind})' if name else kind}"


def _short(operator: object) -> str:
    return str(operator).removesuffix(".default")
