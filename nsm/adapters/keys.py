"""Keys: which tensor that a module returns is which state, by the keys of mappings and named tuples, else by place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nsm.adapters.state import Carried
from nsm.errors import ConfigError

Path = tuple[str, ...]
"""The keys on the way to a tensor; places in tuples and lists are none."""


def keyed(tree: Any) -> list[tuple[Path, Any]]:
    """The leaves of a nesting, each with the keys that lead to it."""
    leaves, _ = pytree.tree_flatten_with_path(tree)
    return [(tuple(name for key in path if (name := _name(key)) is not None), value) for path, value in leaves]


def _name(key: Any) -> str | None:
    if isinstance(key, pytree.MappingKey):
        return str(key.key)
    return key.name if isinstance(key, pytree.GetAttrKey) else None


def taken_apart(kind: str, states: Any, outputs: Sequence[str]) -> Callable[[Any], tuple[list[Tensor], list[Tensor]]]:
    """A function that splits a module's result into outputs and states, in the declared order.

    A result under the key of a state, or under its name, is that state; results without a key are outputs and then the
    states that are left, by their places.

    Args:
        kind: of the module, for messages.
        states: the declared nesting, with a `Carried` for each state.
        outputs: names; results under these keys are these outputs.
    """
    declared = [(path or (one.name,), one.name) for path, one in keyed(states)]
    names = [name for _, name in declared]

    def apart(results: Any) -> tuple[list[Tensor], list[Tensor]]:
        leaves = keyed(results)
        found: dict[int, int] = {}
        for label in sorted({label for label, _ in declared}, key=len, reverse=True):
            wanted = [state for state, (other, _) in enumerate(declared) if other == label]
            free = [place for place in range(len(leaves)) if place not in found.values()]
            given = [place for place in free if leaves[place][0][-len(label) :] == label]
            given = given or [place for state in wanted for place in free if leaves[place][0] == (names[state],)]
            if given and len(given) != len(wanted):
                raise ConfigError(
                    f"{kind} returned {len(given)} tensors under the key {'.'.join(label)}, "
                    f"{', '.join('.'.join(leaves[place][0]) for place in given)}; its states have "
                    f"{len(wanted)} of that key. Give each state a key of its own."
                )
            found |= dict(zip(wanted, given, strict=False))  # layers in a list, say, in their order
        others = [place for place in range(len(leaves)) if place not in found.values()]
        missing = [state for state in range(len(names)) if state not in found]
        if len(others) != len(outputs) + len(missing):
            raise ConfigError(
                f"{kind} took {len(names)} states and gave {len(leaves)} tensors; expected {len(outputs)} outputs "
                f"and then the states, {len(outputs) + len(names)} in all. Name further outputs with outputs=[...], "
                "and return every state."
            )
        for state, place in zip(missing, others[len(outputs) :], strict=True):
            if leaves[place][0]:
                keys = sorted({".".join(path) for path, _ in leaves if path})
                raise ConfigError(
                    f"{kind} returned a mapping with the keys {keys}, and none of them is the state {names[state]}. "
                    "Name states as the keys that they are returned under: Carried('h', ...) for {'h': ...}."
                )
            found[state] = place
        given_outputs = by_name([leaves[place] for place in others[: len(outputs)]], outputs)
        return given_outputs, [leaves[found[state]][1] for state in range(len(names))]

    return apart


def by_name(leaves: Sequence[tuple[Path, Any]], outputs: Sequence[str]) -> list[Any]:
    """Outputs in the order of their names, where their keys are these; else as they come."""
    keys = [path[-1] if path else "" for path, _ in leaves]
    if sorted(keys) == sorted(outputs):
        return [leaves[keys.index(name)][1] for name in outputs]
    return [value for _, value in leaves]


def check_order(module: nn.Module, states: Sequence[Any]) -> None:
    """Raise `ConfigError` where the parameters of forward contradict the order of the states."""
    try:
        parameters = [
            p.name
            for p in inspect.signature(module.forward).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ][1:]
    except (TypeError, ValueError):  # a function of C
        return
    declared = [one.name if isinstance(one, Carried) else None for one in states]
    for parameter, name in zip(parameters, declared, strict=False):
        if name is not None and name != parameter and name in parameters:
            order = ", ".join(str(one) if one is not None else "..." for one in declared)
            raise ConfigError(
                f"The states are declared in the order {order}; {type(module).__name__}.forward takes "
                f"{', '.join(parameters)} behind its input, so {name} would be given for {parameter}. Declare them in "
                "the order of forward, or give the state another name."
            )
