"""Numbers that are not finite: found at once, and named by lane."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nsm.errors import NonFiniteError, StreamError
from nsm.runtimes.session.session import Session
from nsm.trace import Arrays
from tests.runtimes.fake import (
    CHUNK,
    VOCABULARY,
    assert_same,
    fake_session,
    fake_spec,
)
from tests.runtimes.sessions import answers, ids, initial, lane_of, put

# -- numbers that are not finite ----------------------------------------------------------------------------------


def _spoil(name: str, value: float, lane: int = 1) -> Any:
    def after(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
        if calls == 2:
            {**outputs, **state}[name][lane, 0] = value

    return after


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_output_that_is_not_finite_names_its_lane_and_tensor(value: float) -> None:
    session = fake_session(after=_spoil("outputs", value))
    session.step(ids(session))
    with pytest.raises(NonFiniteError, match=r"output outputs .*NaN or infinite numbers on lanes \[1\]"):
        session.step(ids(session))
    session.reset(1)
    session.step(ids(session))


def test_a_state_that_is_not_finite_names_its_lane_and_tensor() -> None:
    session = fake_session(after=_spoil("0.written", np.nan))
    session.step(ids(session))
    with pytest.raises(NonFiniteError, match=r"0\.written .*lanes \[1\]"):
        session.step(ids(session))
    session.reset(1)
    session.step(ids(session))


def test_an_idle_lane_may_answer_nonsense() -> None:
    session = fake_session(after=_spoil("outputs", np.nan))
    session.step(ids(session))
    outputs = session.step(ids(session), [CHUNK, 0])
    assert np.isfinite(outputs["outputs"][0]).all()


def test_what_stands_after_the_valid_tokens_may_be_nonsense() -> None:
    def after(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
        outputs["outputs"][1, 2:] = np.nan

    session = fake_session(after=after)
    assert np.isfinite(session.step(ids(session), [CHUNK, 2])["outputs"][1, :2]).all()
    session.reset()
    with pytest.raises(NonFiniteError, match=r"lanes \[1\]"):
        session.step(ids(session), [CHUNK, 3])


def _spoil_once(name: str, call: int) -> Any:
    spoilt: list[int] = []  # calls are counted anew after a reset

    def after(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
        if calls == call and not spoilt:
            spoilt.append(calls)
            {**outputs, **state}[name][1, 0] = np.nan

    return after


@pytest.mark.parametrize(("spoiled", "name"), [("decode", "outputs"), ("decode", "0.tail"), ("commit", "0.written")])
def test_a_healthy_lane_goes_on_where_it_stands_after_another_was_poisoned(spoiled: str, name: str) -> None:
    """The call has happened: the lane that is well has taken its token, and stands behind it."""
    session = fake_session(after=_spoil_once(name, 2), spoiled=spoiled)
    honest, raised = fake_session(), 0
    for token in np.random.default_rng(0).integers(0, VOCABULARY, (3 * CHUNK, 2, 1)):
        honest.decode(token)
        try:
            session.decode(token)
        except NonFiniteError:
            raised += 1
            session.reset(1)
            honest.reset(1)
        assert_same(session.read_state(), honest.read_state())
        assert session.offsets.tolist() == honest.offsets.tolist()
    assert raised == 1


def test_a_healthy_lane_inside_a_chunk_is_not_stepped_after_another_was_poisoned() -> None:
    session = fake_session(after=_spoil_once("outputs", 1))
    with pytest.raises(NonFiniteError, match=r"lanes \[1\]"):
        session.step(ids(session), [3, 3])
    session.reset(1)
    assert session.offsets.tolist() == session.read_state()["lane.offset"].tolist() == [3, 0]
    with pytest.raises(StreamError, match=r"lanes \[0\] .*inside a chunk"):
        session.step(ids(session))


@pytest.mark.parametrize("name", ["outputs", "0.tail"])
def test_the_token_that_fills_a_chunk_is_looked_at_though_a_commit_follows(name: str) -> None:
    session = fake_session(after=_spoil_once(name, CHUNK), spoiled="decode")
    for _ in range(CHUNK - 1):
        session.decode(np.zeros((2, 1), int))
    with pytest.raises(NonFiniteError, match=rf"{name.replace('.', '[.]')} .*lanes \[1\]"):
        session.decode(np.zeros((2, 1), int))
    assert session.offsets.tolist() == [0, 0], "the chunk was committed"
    session.reset(1)
    session.step(ids(session))


def test_an_output_that_is_not_finite_is_noticed_without_valid_too() -> None:
    session = fake_session(fake_spec(valid=False), after=_spoil("outputs", np.nan))
    session.step(ids(session))
    with pytest.raises(NonFiniteError, match=r"lanes \[1\]"):
        session.step(ids(session))


def test_a_poisoned_lane_raises_alone_and_can_be_reset(session: Session) -> None:
    fresh, tokens = initial(session), ids(session, 3)
    wanted = answers(session, tokens)
    session.reset()
    session.step(tokens[0])
    state = session.read_state()
    state["0.bank"][1] = np.nan
    put(session, state)
    with pytest.raises(NonFiniteError, match=r"lanes \[1\]"):
        session.step(tokens[1])
    session.reset(1)
    assert_same(lane_of(session.read_state(), 1), lane_of(fresh, 1))
    outputs = session.step(np.stack([tokens[2][0], tokens[0][1]]))
    assert_same(lane_of(outputs, 0), lane_of(wanted[2], 0))
    assert_same(lane_of(outputs, 1), lane_of(wanted[0], 1))


def test_a_poisoned_lane_may_rest_while_the_other_goes_on(session: Session) -> None:
    tokens, length = ids(session, 2), session.spec.chunk_size
    wanted = lane_of(session.step(tokens[0]), 0)
    session.reset()
    state = session.read_state()
    state["0.bank"][1] = np.nan
    put(session, state)
    assert_same(lane_of(session.step(tokens[0], [length, 0]), 0), wanted)
    with pytest.raises(NonFiniteError, match=r"lanes \[1\]"):
        session.step(tokens[1])


def test_large_numbers_are_finite(session: Session) -> None:
    state = session.read_state()
    state["0.tail"][:] = 1e30
    session.load_state(state)
    session.step(ids(session), [0, 0])
    session.restore(session.snapshot())
    assert_same(session.read_state(), state)


def test_a_state_that_is_not_finite_is_not_kept() -> None:
    session = fake_session()
    state = session.read_state()
    state["0.tail"][1] = np.inf
    put(session, state)
    for lane in (None, 1):
        with pytest.raises(NonFiniteError, match=r"0\.tail"):
            session.snapshot(lane)


def test_a_healthy_lane_can_be_kept_beside_a_poisoned_one() -> None:
    session = fake_session()
    session.step(ids(session))
    state = session.read_state()
    state["0.tail"][1] = np.nan
    put(session, state)
    snapshot = session.snapshot(0)
    session.restore(snapshot, 0)
    session.fork(0, 0)
    assert_same(session.read_state(), state)
    session.reset()
    session.restore(snapshot, 0)
    assert_same(lane_of(session.read_state(), 0), lane_of(state, 0))
