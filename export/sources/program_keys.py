"""Keys of a program's inputs and outputs: the names that `forward` gives them in its mappings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from nsm.errors import InputError


def output_names(program: ExportedProgram) -> list[str]:
    """The name of each output: its key in the mapping that `forward` returns, else the operator that computes it.

    A key that stands twice, or that is also an operator's name, is not taken.
    """
    operators = [str(name) for name in program.graph_signature.user_outputs]
    keys = _keys(program.call_spec.out_spec, len(operators))
    single = [key is not None and keys.count(key) == 1 and key not in operators for key in keys]
    return [str(key) if taken else name for key, name, taken in zip(keys, operators, single, strict=True)]


def check_keys(program: ExportedProgram, places: Mapping[str, int]) -> None:
    """Raise `InputError` if a state is paired with another output than the one of its own key.

    Args:
        program: as exported.
        places: of each state, its input and the place of its output.
    """
    given = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    inputs = dict(zip(given, _keys(program.call_spec.in_spec, len(given)), strict=True))
    names = output_names(program)
    for past, place in places.items():
        key = inputs.get(past) or past
        if key in names and names[place] != key:
            raise InputError(
                f"The state {past} is {key!r} in forward, which returns an output {key!r} too; given --state "
                f"{past}={names[place]}. Give --state {past}={key}."
            )


def _keys(spec: Any, count: int) -> Sequence[str | None]:
    """The last key of each leaf, if it lies in a mapping."""
    if spec is None or spec.num_leaves != count:
        return [None] * count
    leaves, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(range(count), spec))
    keys: list[str | None] = [None] * count
    for path, index in leaves:
        last = path[-1] if path else None
        if isinstance(last, pytree.MappingKey) and isinstance(last.key, str):
            keys[index] = last.key
    return keys
