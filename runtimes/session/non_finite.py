"""Find the lanes with NaN or infinite outputs or state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from nsm.errors import NonFiniteError
from nsm.spec import StateSpec
from nsm.trace import Array, Arrays


def check_lanes(outputs: Arrays, state: Arrays, specs: Iterable[StateSpec], counts: Array) -> None:
    """Check outputs and states of a call on the lanes that had tokens.

    Args:
        outputs: outputs by name, [B, T, ...]; only valid tokens are checked.
        state: states by name, with all lanes.
        specs: specs of the states.
        counts: [B], number of valid tokens of each lane.

    Raises:
        NonFiniteError: names the first non-finite output or state, and all lanes with one.
    """
    _check(_values(outputs, state, specs, counts))


def check_states(parts: Mapping[int, Arrays], specs: Iterable[StateSpec]) -> None:
    """Check states, given by lane; raise like `check_lanes`."""
    _check((f"state {spec.name}", {lane: part[spec.name] for lane, part in parts.items()}) for spec in specs)


def _check(values: Iterable[tuple[str, Mapping[int, Array]]]) -> None:
    """Raise `NonFiniteError` if a value, given by name and lane, contains NaN or infinity."""
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
        f"The {first} contains NaN or infinite numbers on lanes {first_lanes}"
        + (f", another output or state on lanes {others}. " if others else ". ")
        + "Reset them to continue; if it happens again, check the weights and the inputs.",
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
