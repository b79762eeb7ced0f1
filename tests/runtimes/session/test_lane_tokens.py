"""A session of a model with a capacity: no lane passes it, wherever its stream comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nsm.errors import InputError, SnapshotError, StreamError
from nsm.runtimes.session.session import Session
from nsm.runtimes.session.snapshots import Snapshot, pack
from nsm.spec import COUNT, StepSpec
from tests.runtimes.fake import CHUNK, FINGERPRINT, assert_same, fake_session, fake_spec
from tests.runtimes.sessions import ids

CAPACITY = 3 * CHUNK + 1


def limited(capacity: int | None = CAPACITY, counted: bool = True, **changes: Any) -> StepSpec:
    """The fake's spec with a capacity; `counted` says whether its state COUNT is declared to count tokens."""
    spec = fake_spec(**changes)
    states = [replace(state, per_token=1) if counted and state.name == COUNT else state for state in spec.states]
    return replace(spec, states=tuple(states), capacity=capacity)


@pytest.fixture
def session() -> Session:
    return fake_session(limited())


CALLS: dict[str, Callable[[Session], object]] = {
    "step": lambda session: session.step(ids(session)),
    "decode": lambda session: [session.decode(np.zeros((2, 1), int)) for _ in range(2)],
    "feed": lambda session: session.feed(np.zeros((2, 2), int)),
    "run": lambda session: session.run(np.zeros((2, 2), int)),
}


def state_of(session: Session) -> dict[str, Any]:
    return {**session.read_state(), "offsets": session.offsets, "left": session.tokens_left}


@pytest.mark.parametrize("name", ["step", "feed", "run"])
def test_no_call_passes_the_capacity(session: Session, name: str) -> None:
    for tokens in ids(session, 3):
        session.step(tokens)
    assert session.tokens_left is not None
    assert session.tokens_left.tolist() == [1, 1]
    before = state_of(session)
    with pytest.raises(
        StreamError, match=r"at most 13 tokens .* Lanes \[0, 1\] have had \[12, 12\].*reset\(0\), reset"
    ):
        CALLS[name](session)
    assert_same(state_of(session), before)
    session.decode(np.zeros((2, 1), int))
    with pytest.raises(StreamError, match=r"have had \[13, 13\] and are given \[1, 1\] more"):
        session.decode(np.zeros((2, 1), int))


def test_lanes_are_counted_each_by_itself(session: Session) -> None:
    tokens = ids(session)
    for _ in range(3):
        session.step(tokens, [CHUNK, 0])
    session.feed(np.zeros((2, 3), int), [1, 3])
    assert session.tokens_left is not None
    assert session.tokens_left.tolist() == [0, 10]
    with pytest.raises(StreamError, match=r"Lanes \[0\] have had \[13\] and are given \[1\] more"):
        session.feed(np.zeros((2, 1), int))
    session.feed(np.zeros((2, 1), int), [0, 1])  # a lane that has no token does not stand in the way
    session.reset(0)
    assert session.tokens_left.tolist() == [13, 9]
    session.reset()
    assert session.tokens_left.tolist() == [13, 13]


def test_a_long_stream_of_whole_calls_is_counted_exactly() -> None:
    session = fake_session(limited(50 * CHUNK))
    tokens = ids(session)
    for _ in range(50):
        session.step(tokens)
    with pytest.raises(StreamError, match="have had"):
        session.step(tokens)


def test_a_call_that_fails_is_not_counted() -> None:
    session = fake_session(limited())
    session.step(ids(session))
    session._runtime.called.clear()  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="must lie in"):
        session.step(np.full((2, CHUNK), 99))
    assert session.tokens_left is not None
    assert session.tokens_left.tolist() == [9, 9]


def test_without_a_capacity_there_is_no_end() -> None:
    session = fake_session()
    assert session.tokens_left is None
    for tokens in ids(session, 20):
        session.step(tokens)


@pytest.mark.parametrize("counted", [True, False])
def test_the_count_goes_with_snapshots_and_forks(counted: bool) -> None:
    session, other = fake_session(limited(counted=counted)), fake_session(limited(counted=counted))
    session.step(ids(session), [CHUNK, 2])
    other.restore(session.snapshot())
    assert other.tokens_left is not None
    assert other.tokens_left.tolist() == [9, 11]
    other.restore(session.snapshot(1), 0)
    assert other.tokens_left.tolist() == [11, 11]
    session.fork(0, 1)
    assert session.tokens_left is not None
    assert session.tokens_left.tolist() == [9, 9]


def test_a_state_that_is_put_in_says_how_many_tokens_it_has_had(session: Session) -> None:
    session.step(ids(session), [CHUNK, 3])
    state = session.read_state()
    session.reset()
    session.load_state(state)
    assert session.tokens_left is not None
    assert session.tokens_left.tolist() == [9, 10]
    session.load_state(state, tokens=[13, 0])
    assert session.tokens_left.tolist() == [0, 13]
    far = {**state, COUNT: np.array([2**62, -5])}
    session.load_state(far)
    assert session.tokens_left.tolist() == [0, 13]
    with pytest.raises(StreamError, match=r"Lanes \[0\] have had \[4611686018427387903\]"):
        session.feed(np.zeros((2, 1), int))


def test_a_state_that_counts_nothing_needs_the_tokens_with_it() -> None:
    session = fake_session(limited(counted=False))
    session.step(ids(session))
    state = session.read_state()
    before = state_of(session)
    with pytest.raises(InputError, match=r"none of its states counts them.*load_state\(arrays, tokens=\[\.\.\.\]\)"):
        session.load_state(state)
    for wrong in ([1], [1, -1], [0.5, 1], "12"):
        with pytest.raises(InputError, match="tokens holds how many tokens each of the 2 lanes has had"):
            session.load_state(state, tokens=wrong)
    assert_same(state_of(session), before)
    session.load_state(state, tokens=[5, 6])
    assert session.tokens_left is not None
    assert session.tokens_left.tolist() == [8, 7]


def test_a_snapshot_of_a_session_without_the_limit_is_counted_by_its_state() -> None:
    free, session = fake_session(limited(None)), fake_session(limited())
    free.step(ids(free), [CHUNK, 1])
    session.restore(free.snapshot())
    assert session.tokens_left is not None
    assert session.tokens_left.tolist() == [9, 12]
    session.restore(free.snapshot(0), 1)
    assert session.tokens_left.tolist() == [9, 9]


def test_a_snapshot_that_nothing_counts_is_refused() -> None:
    free, session = fake_session(limited(None, counted=False)), fake_session(limited(counted=False))
    before = state_of(session)
    with pytest.raises(SnapshotError, match="does not contain the number of tokens"):
        session.restore(free.snapshot())
    assert_same(state_of(session), before)


@pytest.mark.parametrize("tokens", [[1], [1, -1], [1, True], [1, 2**63], ["a", 1], 5, {}])
def test_a_forged_count_is_refused(session: Session, tokens: Any) -> None:
    forged = pack(Snapshot(FINGERPRINT, 2, session.read_state(), tokens))
    with pytest.raises(SnapshotError, match="not a count for each lane"):
        session.restore(forged)
