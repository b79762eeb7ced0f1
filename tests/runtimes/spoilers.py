"""Ways in which a target may be dishonest: each spoils the outputs or the state after a call of the fake."""

from __future__ import annotations

import numpy as np

from nsm.trace import Arrays


def late(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    if calls > 30:
        outputs["outputs"] *= 1 + 1e-3


def far_off(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    outputs["outputs"] *= 2


def frozen(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    state.update(before)


def unread_state(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    state["0.written"] *= 1 + 1e-3


def bank_of_a_slot_that_is_off(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    state["0.bank"][:, -1] += 1.0


def mask(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    state["0.mask"][:, 0] ^= True


def counter(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    state["lane.count"] += 1


def zeros(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    outputs["outputs"][...] = 0


def swapped_lanes(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    outputs["outputs"] = outputs["outputs"][::-1].copy()


def nan_output(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    if calls == 40:
        outputs["outputs"][1, 0, 0] = np.nan


def nan_state(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    if calls == 64:
        state["0.written"][0, 0] = np.nan


def infinite_state(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    state["0.written"][0, 0] = np.inf


def half_state(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    state["0.bank"] = state["0.bank"].astype(np.float16).astype(np.float32)


def decode_off(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    outputs["outputs"] *= 1 + 1e-3


def decode_forgets(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    state["0.bank"][...] = before["0.bank"]


def commit_forgets(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    state["0.written"][...] = before["0.written"]


def one_counter_for_all_lanes(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    state["lane.count"][:] = state["lane.count"][0]


def outputs_by_the_first_lane(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    if before["lane.count"][0] != before["lane.count"][-1]:
        outputs["outputs"][-1] *= 1 + 1e-3
