"""Refuses programs of torch.export that were made in training mode, or that draw random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from nsm.errors import UnsupportedError
from nsm.export.capture import line_of_node, module_of

_TRAINING = ("train", "training", "use_input_stats")
"""Names of the arguments that switch operators to training mode."""
_SHOWN = 3
_STATISTICS = ("batch_norm", "instance_norm")


def check_eval_mode(program: ExportedProgram, what: str) -> None:
    """Raise unless a program is that of a module in eval mode.

    Args:
        program: of torch.export.
        what: name of the program, for messages.

    Raises:
        UnsupportedError: names the operators with their modules, and the remedy.
    """
    nodes = list(_operations(program))
    trained = list(dict.fromkeys(_called(node) for node in nodes if _is_in_training(node)))
    if trained:
        more = f", and {len(trained) - _SHOWN} more" if len(trained) > _SHOWN else ""
        raise UnsupportedError(
            f"{what} was exported in training mode: {', '.join(trained[:_SHOWN])}{more}. Call module.eval() before "
            "torch.export.export."
        )
    for node in nodes:
        if _name(node) == "batch_norm" and _argument(node, "training"):
            raise UnsupportedError(
                f"{what} normalizes over the streams of a call, in eval mode too: {_called(node)} has no running "
                "statistics. Train it with track_running_stats=True, or take a LayerNorm."
            )
        if _is_random(node):
            line = line_of_node(node)
            raise UnsupportedError(
                f"{what} draws random numbers: {_called(node)}{f': {line}' if line else '. '}Outputs of a stream have "
                "to be repeatable. Make the numbers an input, or leave them out in eval mode."
            )


def _operations(program: ExportedProgram) -> Iterator[fx.Node]:
    for part in program.graph_module.modules():
        if isinstance(part, fx.GraphModule):
            yield from (node for node in part.graph.nodes if isinstance(node.target, torch._ops.OpOverload))


def _is_in_training(node: fx.Node) -> bool:
    """Whether an operator applies dropout, or uses batch statistics although it has running ones."""
    if _argument(node, "dropout_p"):
        return True
    if not any(_argument(node, name) for name in _TRAINING):
        return False
    if any(kind in _name(node) for kind in _STATISTICS):
        return _argument(node, "running_mean") is not None
    dropped = [_argument(node, name) for name in ("p", "dropout")]
    return any(dropped) or dropped == [None, None]


def _is_random(node: fx.Node) -> bool:
    seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    # Operators that know a training mode, and attention, draw numbers in that mode alone.
    names = [argument.name for argument in _schema(node)]
    return seeded and not {*_TRAINING, "dropout_p"} & set(names)


def _argument(node: fx.Node, name: str) -> Any:
    """An argument of an operator by its name, its default where it is not given; None where there is none."""
    for index, argument in enumerate(_schema(node)):
        if argument.name == name:
            given = node.args[index] if index < len(node.args) else argument.default_value
            return node.kwargs.get(name, given)
    return None


def _schema(node: fx.Node) -> list[Any]:
    assert isinstance(node.target, torch._ops.OpOverload)
    return list(node.target._schema.arguments)


def _name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").split(".", 1)[0]


def _called(node: fx.Node) -> str:
    module = module_of(node)
    return f"{str(node.target).removesuffix('.default')}{f' in the module {module}' if module else ''}"
