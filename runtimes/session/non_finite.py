"""The search for lanes whose outputs or state became NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from nsm.errors import NonFiniteError
from nsm.spec import StateSpec
from nsm.trace import Array, Arrays


def check_lanes(outputs: Arrays, state: Arrays, specs: Iterable[StateSpec], counts: Array) -> None:
    """Check outputs and states of a call on the lanes that had tokens.

    Args:
        outputs: by name, [B, T, ...]; only the tokens that count are looked at.
        state: by name, with all lanes.
        specs: of the states.
        counts: [B], how many tokens each lane had.

    Raises:
        NonFiniteError: names the first output or state that is not finite, and all lanes where one is.
    """
    _check(_values(outputs, state, specs, counts))


def check_states(parts: Mapping[int, Arrays], specs: Iterable[StateSpec]) -> None:
    """Look at states, given by lane; raises as `check_lanes`."""
    _check((f"state {spec.name}", {lane: part[spec.name] for lane, part in parts.items()}) for spec in specs)


def _check(values: Iterable[tuple[str, Mapping[int, Array]]]) -> None:
    """Raise `NonFiniteError` if one of the values, given by name and lane, holds NaN or infinity."""
    first, first_lanes, lanes = "", [0], set[int]()
    for name, by_lane in values:
        bad = [lane for lane, value in by_lane.items() if not np.isfinite(value).all()]
        if bad and not lanes:
            first, first_lanes = name, bad
        lanes |= set(bad)
    if not lanes:
        return
    others = sorted(lanes - set(first_lanes))
    raise NonFiniteError(
        f"The {first} holds NaN or infinite numbers on lanes {first_lanes}"
        + (f", another output or state on lanes {others}. " if others else ". ")
        + "Reset them to go on; if it happens again, check the weights and the inputs.",
        sorted(lanes),
    )


def _values(
    outputs: Arrays, state: Arrays, specs: Iterable[StateSpec], counts: Array
) -> Iterator[tuple[str, dict[int, Array]]]:
    lanes = np.flatnonzero(counts).tolist()
    for name, value in outputs.items():
        yield f"output {name}", {lane: value[lane, : counts[lane]] for lane in lanes}
    for spec in specs:
        yield f"state {spec.name}", {lane: state[spec.name][spec.lane_index(lane)] for lane in lanes}
