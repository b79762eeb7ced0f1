"""What callers give a session, checked before anything happens, and whether what comes out is finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import ArrayLike

from nsm.errors import InputError
from nsm.spec import TensorSpec
from nsm.trace import Array


def checked_input(spec: TensorSpec, value: ArrayLike) -> Array:
    """An input of a call, in the dtype that the graph takes."""
    array = as_array(spec.name, value)
    if array.shape != spec.shape:
        raise InputError(f"{spec.name} has the shape {list(spec.shape)}; given {list(array.shape)}.")
    check_values(spec, array)
    return array.astype(spec.numpy_dtype, copy=False)


def check_values(spec: TensorSpec, array: Array) -> None:
    """Check the kind and the range of numbers, whatever their shape."""
    kinds = "iu" if spec.numpy_dtype.kind in "iu" else spec.numpy_dtype.kind
    if array.dtype.kind not in kinds:
        raise InputError(f"{spec.name} has the dtype {spec.dtype}; given {array.dtype}.")
    if spec.minimum is not None and spec.maximum is not None:
        low, high = int(array.min()), int(array.max())
        if not spec.minimum <= low <= high <= spec.maximum:
            raise InputError(f"{spec.name} must lie in {spec.minimum} .. {spec.maximum}; given {low} .. {high}.")


def as_array(name: str, value: ArrayLike) -> Array:
    """An array of what was given."""
    try:
        return np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise InputError(f"{name} is not an array: {error}") from error


def checked_state(arrays: Mapping[str, ArrayLike], name: str, shape: tuple[int, ...]) -> Array:
    """A state out of those that were given by name."""
    if name not in arrays:
        raise InputError(f"The state {name} is missing; given are {sorted(arrays)}.")
    array = np.asarray(arrays[name])
    if array.shape != shape:
        raise InputError(f"The state {name} has the shape {list(shape)}; given {list(array.shape)}.")
    return array


def all_finite(arrays: Iterable[Array]) -> bool:
    """Whether flat arrays of floating point numbers hold neither NaN nor infinity.

    A sum of squares is one pass without a temporary; where it overflows, the numbers are looked at one by one. By
    `vdot`, which unlike `dot` does not warn of that: turning warnings off costs more than the sum.
    """
    return all(math.isfinite(np.vdot(array, array)) or np.isfinite(array).all() for array in arrays)
