"""Invalid tokens: their lanes, and how a call treats them."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from nsm.errors import InputError
from nsm.runtimes.base import all_finite
from nsm.runtimes.session.inputs import cast, check_kind
from nsm.spec import TensorSpec
from nsm.trace import Array

OnBadLane = Literal["raise", "skip"]
"""Behaviour of a call if tokens of some lanes are not finite or out of range.

"raise" refuses the call. "skip" runs it for the other lanes: the bad lanes get no tokens and keep their state.
"""


class Usable(NamedTuple):
    """Tokens in the form that a graph takes.

    Args:
        tokens: [B, T, ...] in the dtype of the spec, with zeros in place of invalid tokens.
        counts: [B], number of valid tokens of each lane; 0 on skipped lanes.
        skipped: lanes with invalid tokens.
    """

    tokens: Array
    counts: Array
    skipped: tuple[int, ...] = ()


def check_choice(on_bad_lane: str, lanes: int, counted: bool) -> None:
    """Raise `InputError` for an unknown value, or one that the model does not support.

    Args:
        on_bad_lane: see `OnBadLane`.
        lanes: B.
        counted: whether the entry has the input `valid`, so that a lane can have no tokens.
    """
    if on_bad_lane not in ("raise", "skip"):
        raise InputError(f'on_bad_lane is "raise" or "skip"; given {on_bad_lane!r}.')
    if on_bad_lane == "skip" and not counted and lanes > 1:
        raise InputError(
            f"This model has no input valid, so all {lanes} lanes take tokens in every call and no lane can be "
            'skipped. Leave on_bad_lane at "raise".'
        )


def usable_tokens(spec: TensorSpec, array: Array, counts: Array, on_bad_lane: OnBadLane = "raise") -> Usable:
    """Check and convert the tokens of any number of calls.

    Args:
        spec: spec of the input.
        array: [B, T, ...], of any dtype.
        counts: [B], number of valid tokens of each lane. Ids must be in range on padding too.
        on_bad_lane: behaviour if tokens are not finite or out of range.

    Raises:
        InputError: the dtype has another kind, or some lanes have invalid tokens; `lanes` names them.
    """
    check_kind(spec, array)
    tokens = cast(array, spec.numpy_dtype)
    if tokens.dtype.kind == "f":
        return _finite(spec, tokens, counts, on_bad_lane)
    if spec.minimum is None or spec.maximum is None:
        return Usable(tokens, counts)
    low, high = int(array.min()), int(array.max())
    if spec.minimum <= low <= high <= spec.maximum:
        return Usable(tokens, counts)
    outside = (array < spec.minimum) | (array > spec.maximum)
    odd: Array = np.any(outside.reshape(len(array), -1), axis=1)
    lanes = _lanes(odd)
    if on_bad_lane == "raise":
        raise InputError(
            f"{spec.name} must lie in {spec.minimum} .. {spec.maximum}; given {low} .. {high}, out of range on lanes "
            f"{list(lanes)}." + _way_out(odd),
            lanes,
        )
    return Usable(_zero(tokens, odd), np.where(odd, 0, counts), lanes)


def _finite(spec: TensorSpec, tokens: Array, counts: Array, on_bad_lane: OnBadLane) -> Usable:
    """Check floating-point tokens; padding may have any value."""
    if all_finite((tokens,)):
        return Usable(tokens, counts)
    finite = np.isfinite(tokens)
    lanes, length = tokens.shape[:2]
    bad = ~finite.reshape(lanes, length, -1).all(-1) & (np.arange(length) < np.asarray(counts)[:, None])
    clean = np.where(finite, tokens, tokens.dtype.type(0))
    odd: Array = np.any(bad, axis=1)
    if not odd.any():
        return Usable(clean, counts)
    if on_bad_lane == "raise":
        lane, token = np.argwhere(bad)[0].tolist()
        raise InputError(
            f"{spec.name} takes finite numbers; token {token} of lane {lane} is NaN or infinite in "
            f"{spec.dtype} ({int(bad.sum())} bad tokens in total, on lanes {list(_lanes(odd))}). Fix or remove "
            "them." + _way_out(odd),
            _lanes(odd),
        )
    return Usable(_zero(clean, odd), np.where(odd, 0, counts), _lanes(odd))


def _lanes(odd: Array) -> tuple[int, ...]:
    return tuple(np.flatnonzero(odd).tolist())


def _zero(tokens: Array, odd: Array) -> Array:
    """Return a copy with zeros on the marked lanes."""
    zeroed = tokens.copy()
    zeroed[odd] = 0
    return zeroed


def _way_out(odd: Array) -> str:
    return "" if odd.all() else ' To run the other lanes, pass on_bad_lane="skip".'
