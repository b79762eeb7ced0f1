"""Dataclasses to JSON and back, strictly: every key there, no other key, every value of the declared type.

JSON has no NaN and no infinity: a float that is not finite is written as null, and read as NaN.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from nsm.errors import BundleError, InputError

T = TypeVar("T")


def encode(value: Any) -> Any:
    """Return a dataclass or a container as data that JSON can hold; a float that is not finite becomes None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return _finite(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def decode(kind: type[T], data: object, where: str) -> T:
    """Rebuild the dataclass `kind` from the JSON of `encode`.

    Args:
        kind: a dataclass of str, int, float, bool, None, Literal, tuple[X, ...], Mapping[str, X], Any, unions of
            these, and other such dataclasses.
        data: the parsed JSON.
        where: name of the data, for the message.

    Raises:
        BundleError: names the place, the value, and the expectation.
    """
    result: T = _decode(kind, data, where)
    return result


def _decode(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, where)
    if origin is Literal:
        return data if data in arguments else _refuse(f"one of {list(arguments)}", data, where)
    if origin in (Union, types.UnionType):
        return _decode_union(arguments, data, where)
    if origin is tuple:
        if not isinstance(data, list):
            _refuse("a list", data, where)
        return tuple(_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(data))
    if origin is Mapping:
        if not isinstance(data, dict):
            _refuse("an object", data, where)
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in data.items()}
    if kind is types.NoneType:
        return data if data is None else _refuse("null", data, where)
    if kind is float and data is None:
        return math.nan
    # A bool is an int to Python, but not here.
    if not isinstance(data, kind) or (isinstance(data, bool) and kind is not bool):
        _refuse(kind.__name__, data, where)
    return data


def _decode_dataclass(kind: Any, data: Any, where: str) -> Any:
    names = [item.name for item in dataclasses.fields(kind)]
    if not isinstance(data, dict) or set(data) != set(names):
        _refuse(f"an object with the keys {names}", data, where)
    hints = get_type_hints(kind)
    values = {name: _decode(hints[name], data[name], f"{where}.{name}") for name in names}
    try:
        return kind(**values)
    except InputError as error:
        raise BundleError(f"{where} is invalid: {error} Was it edited by hand? Export the bundle again.") from error


def _decode_union(kinds: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and types.NoneType in kinds:
        return None
    for kind in kinds:
        try:
            return _decode(kind, data, where)
        except BundleError:
            continue
    return _refuse(" or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds), data, where)


def _refuse(expected: str, data: Any, where: str) -> Any:
    shown = repr(data)
    raise BundleError(
        f"{where} is {shown if len(shown) < 80 else shown[:77] + '...'}; expected {expected}. "
        "Was it edited by hand? Export the bundle again."
    )
