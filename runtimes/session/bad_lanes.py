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

"raise" refuses the call. "skip" runs it for the other lanes: those lanes have no tokens in it and keep their state.
"""


class Usable(NamedTuple):
    """Tokens as a graph takes them.

    Args:
        tokens: [B, T, ...] in the dtype of the spec, with zeros in place of invalid tokens.
        counts: [B], how many of the tokens count on each lane; 0 on those that are skipped.
        skipped: lanes whose tokens the model does not take.
    """

    tokens: Array
    counts: Array
    skipped: tuple[int, ...] = ()


def check_choice(on_bad_lane: str, lanes: int, counted: bool) -> None:
    """Raise `InputError` for a choice that there is not, or that the model does not allow.

    Args:
        on_bad_lane: see `OnBadLane`.
        lanes: B.
        counted: whether the entry has the input `valid`, so that a lane can have no tokens.
    """
    if on_bad_lane not in ("raise", "skip"):
        raise InputError(f'on_bad_lane is "raise" or "skip"; given {on_bad_lane!r}.')
    if on_bad_lane == "skip" and not counted and lanes > 1:
        raise InputError(
            f"This model has no input valid, so all of its {lanes} lanes have tokens in every call and none can be "
            'skipped. Leave on_bad_lane at "raise".'
        )


def usable_tokens(spec: TensorSpec, array: Array, counts: Array, on_bad_lane: OnBadLane = "raise") -> Usable:
    """The tokens of any number of calls.

    Args:
        spec: of the input.
        array: [B, T, ...], of any dtype.
        counts: [B], how many of the tokens count on each lane. Ids have to be in range also where they do not count.
        on_bad_lane: behaviour if tokens are not finite or out of range.

    Raises:
        InputError: another kind of numbers; or tokens of some lanes that the model does not take, which `lanes` names.
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
    """Check floating-point tokens; tokens that do not count may have any value."""
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
            f"{spec.name} takes finite numbers; token {token} of lane {lane} holds NaN, or what is infinite in "
            f"{spec.dtype} ({int(bad.sum())} such tokens in all, on lanes {list(_lanes(odd))}). Mend them, or leave "
            "them out." + _way_out(odd),
            _lanes(odd),
        )
    return Usable(_zero(clean, odd), np.where(odd, 0, counts), _lanes(odd))


def _lanes(odd: Array) -> tuple[int, ...]:
    return tuple(np.flatnonzero(odd).tolist())


def _zero(tokens: Array, odd: Array) -> Array:
    """A copy with zeros on the lanes that are marked."""
    zeroed = tokens.copy()
    zeroed[odd] = 0
    return zeroed


def _way_out(odd: Array) -> str:
    return "" if odd.all() else ' The other lanes go on with on_bad_lane="skip".'
