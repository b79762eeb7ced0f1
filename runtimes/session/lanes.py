"""Lanes: check a lane number, and read or write its part of a whole state."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping

import numpy as np

from nsm.errors import InputError
from nsm.spec import StateSpec
from nsm.trace import Array, Arrays


def lane_number(lane: int, batch: int) -> int:
    """Return a lane number as a Python int.

    Raises:
        InputError: `lane` is not an integer in 0 .. batch - 1.
    """
    try:
        index = operator.index(lane)
    except TypeError as error:
        raise InputError(
            f"A lane is an integer in 0 .. {batch - 1}; given {lane!r} of type {type(lane).__name__}."
        ) from error
    if not 0 <= index < batch:
        raise InputError(f"The session has lanes 0 .. {batch - 1}; given {lane}.")
    return index


def lane_part(states: Iterable[StateSpec], whole: Mapping[str, Array], lane: int) -> Arrays:
    """Return the part of one lane by state name, as views without the lane axis."""
    return {state.name: whole[state.name][state.lane_index(lane)] for state in states}


def put_lane(states: Iterable[StateSpec], whole: Arrays, lane: int, part: Mapping[str, Array]) -> None:
    """Write the part of one lane into a whole state."""
    for state in states:
        whole[state.name][state.lane_index(lane)] = part[state.name]


def lane_shape(state: StateSpec) -> tuple[int, ...]:
    """Return the shape of the part of one lane."""
    return np.empty(state.shape, bool)[state.lane_index(0)].shape
