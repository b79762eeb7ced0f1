"""Kept: values that a module holds between calls: buffers, attributes, and the objects and containers in them."""

from __future__ import annotations

import types
import zlib
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

PLACES = 20_000
"""Values that are looked at, at most: an attribute may lead to a whole data set."""

# Attributes of every module, or private to another library.
_INTERNAL = frozenset(vars(nn.Module()))
_LIBRARIES = ("torch", "numpy", "builtins", "functools", "logging", "threading", "_thread", "collections")
_CODE = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class Owner(NamedTuple):
    """A container that values lie in: an object's attributes, a module's buffers or parameters, a list, a dictionary.

    `path` tells owners of one module apart, `name` is that of the object for people.
    """

    path: str
    name: str
    values: Any
    attributes: bool

    def places(self) -> list[Any]:
        """Where values lie that are no containers themselves."""
        every = list(self.values) if isinstance(self.values, dict) else list(range(len(self.values)))
        return [key for key in every if key not in _INTERNAL or not self.attributes]

    def called(self, key: Any) -> str:
        if self.attributes:
            return f"{self.name}.{key}" if self.name else str(key)
        return f"{self.name}[{key!r}]"


class Kept:
    """Values that a module holds: compare, overwrite and restore them.

    Args:
        module: of torch. Parameters are told apart, and neither copied nor put back.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._owners = [(owner.values, owner.values.copy()) for owner in owners(module)]
        self._contents = [(t, t.detach().clone()) for t in tensors(module) if not isinstance(t, nn.Parameter)]

    def digests(self) -> dict[str, str]:
        """A digest of each value, by name."""
        seen: dict[int, str] = {}
        return {owner.called(key): _digest(owner.values[key], seen) for owner, key in _places(self._module)}

    def scramble(self, names: Collection[str]) -> bool:
        """Put values there that a model never has; False where one cannot be replaced."""
        for owner, key in _places(self._module):
            if owner.called(key) in names:
                if isinstance(owner.values[key], nn.Parameter):
                    return False
                owner.values[key] = _another(owner.values[key])
        return True

    def put_back(self) -> None:
        """Everything as it was when this object was made."""
        for values, before in self._owners:
            values.clear()
            if isinstance(values, dict):
                values.update(before)
            else:
                values.extend(before)
        for tensor, before in self._contents:
            if not torch.equal(tensor, before):
                tensor.detach().copy_(before)

    def where(self, names: Collection[str]) -> list[tuple[str, Any]]:
        """The owner's path and the key of each of these places, for `Lent`."""
        return [(owner.path, key) for owner, key in _places(self._module) if owner.called(key) in names]


class Lent:
    """Attributes that a module writes before it reads them, put back after every call.

    A graph cannot keep values between calls, and an exporter refuses such a module.

    Args:
        module: of torch.
        where: as `Kept.where` gives it.
    """

    def __init__(self, module: nn.Module, where: Sequence[tuple[str, Any]]) -> None:
        found = {owner.path: owner.values for owner in owners(module)} if where else {}
        self._places = [(found[path], key) for path, key in where if path in found]
        self._before: list[Any] = []

    def __enter__(self) -> None:
        self._before = [_get(values, key) for values, key in self._places]
        for (values, key), value in zip(self._places, self._before, strict=True):
            if isinstance(value, Tensor):
                values[key] = value.detach().clone()  # which the module may write into

    def __exit__(self, *_: object) -> None:
        for (values, key), value in zip(self._places, self._before, strict=True):
            if value is _ABSENT:
                values.pop(key, None)
            else:
                values[key] = value


_ABSENT = object()


def _get(values: Any, key: Any) -> Any:
    return values.get(key, _ABSENT) if isinstance(values, dict) else values[key]


def owners(module: nn.Module) -> list[Owner]:
    """Containers that hang off a module, each once."""
    found: list[Owner] = []
    seen: set[int] = set()
    waiting: deque[tuple[str, Any]] = deque([("", module)])
    while waiting and len(seen) < PLACES:
        name, value = waiting.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            # Without the keys of nn.Module: their values belong to torch.
            parts = {"parameters": value._parameters, "buffers": value._buffers, "attributes": vars(value)}
            found += [Owner(f"{name}/{part}", name, values, True) for part, values in parts.items()]
            items = [(key, item) for key, item in vars(value).items() if key not in _INTERNAL]
            inside = [(f"{name}.{key}" if name else str(key), item) for key, item in (*value._modules.items(), *items)]
        elif isinstance(value, (dict, list, deque)):
            found.append(Owner(name, name, value, False))
            pairs: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else enumerate(value)
            inside = [(f"{name}[{key!r}]", item) for key, item in pairs]
        elif _is_object(value):
            found.append(Owner(f"{name}/attributes", name, vars(value), True))
            inside = [(f"{name}.{key}", item) for key, item in vars(value).items()]
        else:
            continue
        waiting.extend((below, item) for below, item in inside if not _is_value(item))
    return found


def tensors(module: nn.Module) -> list[Tensor]:
    """All tensors that a module holds, each once."""
    found = {id(t): t for owner, key in _places(module) for t in _tensors_of(owner.values[key])}
    return list(found.values())


def _places(module: nn.Module) -> Iterator[tuple[Owner, Any]]:
    """Every value that is no container, up to `PLACES`."""
    count = 0
    for owner in owners(module):
        for key in owner.places():
            if _is_value(owner.values[key]) and (count := count + 1) <= PLACES:
                yield owner, key


def _is_object(value: Any) -> bool:
    library = type(value).__module__.partition(".")[0] in _LIBRARIES
    return not library and not isinstance(value, _CODE) and hasattr(value, "__dict__")


def _is_value(value: Any) -> bool:
    """Whether a value is looked at as a whole: a tensor, an array, a number, a name, or a tuple of some."""
    if isinstance(value, (tuple, set, frozenset)):
        return all(_is_value(item) for item in value)
    return isinstance(value, (Tensor, np.ndarray, *_PLAIN))


def _tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, (tuple, set, frozenset)):
        return [tensor for item in value for tensor in _tensors_of(item)]
    return [value] if isinstance(value, Tensor) else []


def _digest(value: Any, seen: dict[int, str]) -> str:
    """A digest of a value; for a tensor, a checksum of its bytes."""
    if isinstance(value, tuple):
        return f"({', '.join(_digest(item, seen) for item in value)})"
    if isinstance(value, (set, frozenset)):
        return str(sorted(_digest(item, seen) for item in value))
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = f"{value.dtype}{list(value.shape)} {_sum_of(value)}"
        return seen[id(value)]
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)} {zlib.crc32(np.ascontiguousarray(value).view(np.uint8).data)}"
    return f"{type(value).__name__} {value!r}"


def _sum_of(tensor: Tensor) -> int:
    if tensor.layout != torch.strided or tensor.is_meta:
        return tensor._version
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def _another(value: Any) -> Any:
    """A value that differs, of the same kind: NaN of a number that may be one."""
    if isinstance(value, tuple):
        items = [_another(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, Tensor):
        value = value.detach()
        if value.dtype == torch.bool:
            return ~value
        return torch.full_like(value, torch.nan) if value.is_floating_point() or value.is_complex() else value + 7
    if isinstance(value, np.ndarray):
        return np.full_like(value, np.nan) if value.dtype.kind in "fc" else ~value if value.dtype == bool else value + 7
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1009
    if isinstance(value, (float, complex)):
        return float("nan")
    return value + "?" if isinstance(value, str) else value
