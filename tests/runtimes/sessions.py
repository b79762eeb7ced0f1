"""What the tests of sessions share."""

from __future__ import annotations

import signal
from collections.abc import Callable

import numpy as np

from nsm.runtimes.session.session import Session
from nsm.trace import Array, Arrays


def ids(session: Session, *shape: int, seed: int = 0) -> Array:
    """Random ids [*shape, B, K]."""
    spec = session.spec.entry("step").inputs[0]
    assert spec.maximum is not None
    return np.random.default_rng(seed).integers(0, spec.maximum + 1, (*shape, *spec.shape))


def answers(session: Session, tokens: Array) -> list[Arrays]:
    return [session.step(step) for step in tokens]


def with_a_deadline(call: Callable[[Array], Arrays], tokens: Array) -> None:
    """Call, and fail after a while where the call would go on for ever."""

    def late(number: int, frame: object) -> None:
        raise AssertionError("the call does not come back")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 2.0)
    try:
        call(tokens)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def assert_close(given: Arrays, wanted: Arrays) -> None:
    """1e-5: a piece of another length is another matrix product, which rounds differently; decisions are equal."""
    assert set(given) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(given[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def initial(session: Session) -> Arrays:
    """What a fresh stream starts from; only right before the first step."""
    return session.read_state()


def put(session: Session, state: Arrays) -> None:
    """Let the session go on from a state that it would not take: one that a call went wrong on."""
    standing = session._standing
    assert standing.at is not None
    standing.at = session.runtime.load_state(state), standing.at[1]


def lane_of(arrays: Arrays, lane: int) -> Arrays:
    return {name: value[lane] for name, value in arrays.items()}
