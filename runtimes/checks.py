"""What callers give a session, checked before anything happens, and whether what comes out is finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nsm.errors import InputError
from nsm.spec import OFFSET, StateSpec, TensorSpec
from nsm.trace import Array


def checked_input(spec: TensorSpec, value: ArrayLike) -> Array:
    """An input of a call, in the dtype that the graph takes. Whether its numbers are finite `finite_tokens` asks."""
    array = as_array(spec.name, value)
    if array.shape != spec.shape:
        raise InputError(f"{spec.name} has the shape {list(spec.shape)}; given {list(array.shape)}.")
    check_values(spec, array)
    return _cast(array, spec.numpy_dtype)


def check_values(spec: TensorSpec, array: Array) -> None:
    """Check the kind and the range of numbers, whatever their shape."""
    kinds = "iu" if spec.numpy_dtype.kind in "iu" else spec.numpy_dtype.kind
    if array.dtype.kind not in kinds:
        raise InputError(f"{spec.name} has the dtype {spec.dtype}; given {array.dtype}.")
    if spec.minimum is not None and spec.maximum is not None:
        low, high = int(array.min()), int(array.max())
        if not spec.minimum <= low <= high <= spec.maximum:
            raise InputError(f"{spec.name} must lie in {spec.minimum} .. {spec.maximum}; given {low} .. {high}.")


def checked_tokens(spec: TensorSpec, array: Array, counts: Array) -> Array:
    """The tokens of any number of calls in the dtype that the graph takes; arguments as for `finite_tokens`."""
    check_values(spec, array)
    return finite_tokens(spec, _cast(array, spec.numpy_dtype), counts)


def finite_tokens(spec: TensorSpec, array: Array, counts: Array) -> Array:
    """The tokens, with zeros in place of what is not finite where they do not count.

    Args:
        spec: of the input.
        array: [B, T, ...], in the dtype of the spec.
        counts: [B], how many of the tokens count on each lane.

    Raises:
        InputError: one that counts holds NaN or infinity; names its lane and itself.
    """
    if array.dtype.kind != "f" or all_finite((array,)):
        return array
    finite = np.isfinite(array)
    lanes, length = array.shape[:2]
    odd = ~finite.reshape(lanes, length, -1).all(-1) & (np.arange(length) < np.asarray(counts)[:, None])
    if odd.any():
        lane, token = np.argwhere(odd)[0].tolist()
        raise InputError(
            f"{spec.name} takes finite numbers; token {token} of lane {lane} holds NaN, or what is infinite in "
            f"{spec.dtype} ({int(odd.sum())} such tokens in all). Mend them, or leave them out."
        )
    return np.where(finite, array, array.dtype.type(0))


def as_array(name: str, value: ArrayLike) -> Array:
    """An array of what was given."""
    try:
        return np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise InputError(f"{name} is not an array: {error}") from error


def checked_state(
    arrays: Mapping[str, ArrayLike], spec: StateSpec, chunk: int, shape: tuple[int, ...] | None = None
) -> Array:
    """A state out of those that were given by name, in its dtype.

    Args:
        arrays: by state name.
        spec: of the state.
        chunk: C, the tokens of a chunk.
        shape: that it must have (default: that of the spec).

    Raises:
        InputError: it is missing, of another shape or kind of numbers, not finite, or out of range.
    """
    name = spec.name
    if name not in arrays:
        raise InputError(f"The state {name} is missing; given are {sorted(arrays)}.")
    given = as_array(f"The state {name}", arrays[name])
    shape = spec.shape if shape is None else shape
    if given.shape != shape:
        raise InputError(f"The state {name} has the shape {list(shape)}; given {list(given.shape)}.")
    if not np.can_cast(given.dtype, spec.numpy_dtype, "same_kind"):
        raise InputError(f"The state {name} has the dtype {spec.dtype}; given {given.dtype}.")
    array = _cast(given, spec.numpy_dtype)
    if array.dtype.kind == "f" and not all_finite((array,)):
        raise InputError(f"The state {name} takes numbers that are finite in {spec.dtype}; given NaN or infinity.")
    if array.dtype.kind in "iu" and not np.array_equal(array, given):
        raise InputError(f"The state {name} takes numbers of {spec.dtype}; given {given.min()} .. {given.max()}.")
    if name == OFFSET and array.size and not 0 <= array.min() <= array.max() <= chunk:
        raise InputError(
            f"The state {name} counts the tokens in an open chunk, 0 .. {chunk}; given {array.min()} .. {array.max()}."
        )
    return spec.wrapped(array)


def _cast(array: Array, dtype: np.dtype[Any]) -> Array:
    """The array in another dtype; what is too large for it becomes infinite, without a warning."""
    if array.dtype == dtype or array.dtype.kind != "f":
        return array.astype(dtype, copy=False)
    with np.errstate(over="ignore"):
        return array.astype(dtype)


def all_finite(arrays: Iterable[Array]) -> bool:
    """Whether arrays of floating point numbers hold neither NaN nor infinity.

    A sum of squares is one pass without a temporary; where it overflows, the numbers are looked at one by one. By
    `vdot`, which unlike `dot` does not warn of that: turning warnings off costs more than the sum.
    """
    for array in arrays:  # noqa: SIM110 - a generator costs as much as looking at a small array
        if not (math.isfinite(np.vdot(array, array)) or np.isfinite(array).all()):
            return False
    return True
