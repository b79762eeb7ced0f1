"""Checks of the arguments of a session, before anything changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nsm.errors import InputError
from nsm.runtimes.base import all_finite
from nsm.spec import OFFSET, StateSpec, TensorSpec
from nsm.trace import Array


def checked_input(spec: TensorSpec, value: ArrayLike) -> Array:
    """Check an integer input such as `valid` and convert it to its dtype."""
    array = as_array(spec.name, value)
    check_shape(spec, array)
    check_kind(spec, array)
    if spec.minimum is not None and spec.maximum is not None:
        low, high = int(array.min()), int(array.max())
        if not spec.minimum <= low <= high <= spec.maximum:
            raise InputError(f"{spec.name} must lie in {spec.minimum} .. {spec.maximum}; given {low} .. {high}.")
    return cast(array, spec.numpy_dtype)


def check_shape(spec: TensorSpec, array: Array) -> None:
    """Raise `InputError` if the shape is not that of the spec."""
    if array.shape != spec.shape:
        raise InputError(f"{spec.name} has the shape {list(spec.shape)}; given {list(array.shape)}.")


def check_kind(spec: TensorSpec, array: Array) -> None:
    """Raise `InputError` if the dtype has another kind than that of the spec."""
    kinds = "iu" if spec.numpy_dtype.kind in "iu" else spec.numpy_dtype.kind
    if array.dtype.kind not in kinds:
        raise InputError(f"{spec.name} has the dtype {spec.dtype}; given {array.dtype}.")


def as_array(name: str, value: ArrayLike) -> Array:
    """Convert a value to an array."""
    try:
        return np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise InputError(f"{name} is not an array: {error}") from error


def checked_state(
    arrays: Mapping[str, ArrayLike], spec: StateSpec, chunk: int, shape: tuple[int, ...] | None = None
) -> Array:
    """Check one of the given states and convert it to its dtype.

    Args:
        arrays: the states by name.
        spec: spec of the state.
        chunk: C, the tokens of a chunk.
        shape: the required shape (default: that of the spec).

    Raises:
        InputError: the state is missing, has a wrong shape or dtype, is not finite, or is out of range.
    """
    name = spec.name
    if name not in arrays:
        raise InputError(f"The state {name} is missing; given {sorted(arrays)}.")
    given = as_array(f"The state {name}", arrays[name])
    shape = spec.shape if shape is None else shape
    if given.shape != shape:
        raise InputError(f"The state {name} has the shape {list(shape)}; given {list(given.shape)}.")
    if not np.can_cast(given.dtype, spec.numpy_dtype, "same_kind"):
        raise InputError(f"The state {name} has the dtype {spec.dtype}; given {given.dtype}.")
    array = cast(given, spec.numpy_dtype)
    if array.dtype.kind == "f" and not all_finite((array,)):
        raise InputError(f"The state {name} takes numbers that are finite in {spec.dtype}; given NaN or infinity.")
    if array.dtype.kind in "iu" and not np.array_equal(array, given):
        raise InputError(f"The state {name} takes numbers of {spec.dtype}; given {given.min()} .. {given.max()}.")
    if name == OFFSET and array.size and not 0 <= array.min() <= array.max() <= chunk:
        raise InputError(
            f"The state {name} counts the tokens in an open chunk, 0 .. {chunk}; given {array.min()} .. {array.max()}."
        )
    return spec.wrapped(array)


def cast(array: Array, dtype: np.dtype[Any]) -> Array:
    """Cast an array; values beyond the range of the dtype become infinite, without a warning."""
    if array.dtype == dtype or array.dtype.kind != "f":
        return array.astype(dtype, copy=False)
    with np.errstate(over="ignore"):
        return array.astype(dtype)
