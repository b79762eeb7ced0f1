"""Arguments as plain numbers of Python, which JSON and checkpoints hold: numpy's are taken, other types refused."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from nsm.errors import ConfigError, InputError


def whole(what: str, value: Any, error: type[InputError] = ConfigError) -> int:
    """A whole number, 20 or np.int64(20).

    Raises:
        ConfigError: it is something else, 20.0 for instance, or the `error` that is given.
    """
    try:
        return operator.index(value)
    except TypeError as cause:
        raise error(f"{what} is a whole number; given {_shown(value)}.") from cause


def real(what: str, value: Any, error: type[InputError] = ConfigError) -> float:
    """A number, 0.1 or np.float32(0.1); a whole one stays one.

    Raises:
        ConfigError: it is something else, a tensor for instance, or the `error` that is given.
    """
    if isinstance(value, Integral):
        return operator.index(value)
    if isinstance(value, Real):
        return float(value)
    raise error(f"{what} is a number; given {_shown(value)}.")


def flag(what: str, value: Any) -> bool:
    """True or False, also as np.True_ or as a whole number.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(value, bool | np.bool_ | Integral):
        return bool(value)
    raise ConfigError(f"{what} is True or False; given {_shown(value)}.")


def each_whole(what: str, value: Any) -> list[int]:
    """Whole numbers, from a sequence or an array of them.

    Raises:
        ConfigError: it is something else.
    """
    items = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise ConfigError(f"{what} is a list of whole numbers; given {_shown(value)}.")
    return [whole(f"Every one of {what}", item) for item in items]


def _shown(value: object) -> str:
    return f"{value!r} of type {type(value).__name__}"
