"""What a session refuses, and that nothing has happened then."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from nsm.bundle import Bundle
from nsm.errors import InputError, SnapshotError
from nsm.runtimes.base import State
from nsm.runtimes.opening.artifacts import open_bundle
from nsm.runtimes.session import snapshots
from nsm.runtimes.session.session import Session
from nsm.trace import Array, Arrays
from tests.runtimes.fake import (
    CHUNK,
    VOCABULARY,
    WIDTH,
    FakeRuntime,
    assert_same,
    fake_initial,
    fake_session,
    fake_spec,
)
from tests.runtimes.sessions import ids, lane_of

# -- what is refused ----------------------------------------------------------------------------------------------

WRONG_STEPS = {
    "lanes": ([[0] * CHUNK], None, r"tokens has the shape \[2, 4\]; given \[1, 4\]"),
    "length": ([[0] * 3] * 2, None, r"tokens has the shape \[2, 4\]; given \[2, 3\]"),
    "rank": ([0] * CHUNK, None, r"tokens has the shape"),
    "ragged": ([[0], [0, 1]], None, r"tokens"),
    "float": ([[0.0] * CHUNK] * 2, None, r"tokens has the dtype int64; given float64"),
    "bool": ([[True] * CHUNK] * 2, None, r"tokens has the dtype int64; given bool"),
    "text": ([["a"] * CHUNK] * 2, None, r"tokens has the dtype int64"),
    "none": (None, None, r"tokens"),
    "negative id": ([[0, 0, 0, -1]] * 2, None, rf"tokens must lie in 0 \.\. {VOCABULARY - 1}; given -1 \.\. 0"),
    "large id": ([[0, 0, 0, VOCABULARY]] * 2, None, rf"tokens must lie in 0 \.\. {VOCABULARY - 1}"),
    "huge id": (np.full((2, CHUNK), 2**63, np.uint64), None, r"tokens must lie in"),
    "valid too large": ([[0] * CHUNK] * 2, [CHUNK + 1, 0], rf"valid must lie in 0 \.\. {CHUNK}"),
    "valid negative": ([[0] * CHUNK] * 2, [-1, 0], r"valid must lie in"),
    "valid scalar": ([[0] * CHUNK] * 2, 4, r"valid has the shape \[2\]; given \[\]"),
    "valid float": ([[0] * CHUNK] * 2, [1.0, 2.0], r"valid has the dtype int64; given float64"),
}


@pytest.mark.parametrize(("tokens", "valid", "message"), WRONG_STEPS.values(), ids=WRONG_STEPS)
def test_a_wrong_step_is_refused_and_leaves_the_state_untouched(tokens: Any, valid: Any, message: str) -> None:
    session = fake_session()
    session.step(ids(session))
    before = session.read_state()
    with pytest.raises(InputError, match=message):
        session.step(tokens, valid)
    assert_same(session.read_state(), before)
    assert not session.offsets.any()


@pytest.mark.parametrize("batch", [2, 100])  # few ids and many are looked at in different ways
@pytest.mark.parametrize("bad", [-1, VOCABULARY, 2**62, -(2**63)])
def test_an_id_outside_the_vocabulary_is_seen_wherever_it_is(batch: int, bad: int) -> None:
    session = fake_session(fake_spec(batch=batch))
    for place in ((0, 0), (batch // 2, 1), (-1, -1)):
        for order in ("C", "F"):
            tokens = np.array(ids(session), order=order)
            session.step(tokens)
            tokens[place] = bad
            before = session.read_state()
            with pytest.raises(InputError, match="tokens must lie in"):
                session.step(tokens)
            assert_same(session.read_state(), before)


def test_backends_never_see_an_id_outside_the_vocabulary(bundle: Bundle, target: str) -> None:
    with open_bundle(bundle, target) as session:
        tokens, before = ids(session), session.read_state()
        for bad in (-1, 20):
            tokens[1, -1] = bad
            with pytest.raises(InputError, match=r"tokens must lie in 0 \.\. 19"):
                session.step(tokens)
        assert_same(session.read_state(), before)


def test_ints_are_refused_where_vectors_are_wanted() -> None:
    session = fake_session(fake_spec(vectors=True))
    with pytest.raises(InputError, match="tokens has the dtype float32; given int64"):
        session.step(np.zeros((2, CHUNK, WIDTH), np.int64))


@pytest.mark.parametrize(
    "sequence",
    [np.zeros(8, int), np.zeros((3, 8), int), np.zeros((2, 8, 1), int), np.int64(3), [[0, 1], [2]]],
    ids=["no lanes", "lanes", "rank", "scalar", "ragged"],
)
def test_run_refuses_a_sequence_of_another_shape(sequence: Any) -> None:
    session = fake_session()
    before = session.read_state()
    with pytest.raises(
        InputError, match=r"run takes a sequence of shape \[2, T\]|The sequence given to run is not an arr"
    ):
        session.run(sequence)
    assert_same(session.read_state(), before)


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf, True, "a", None, 1j], ids=repr)
def test_run_refuses_what_are_no_ids(value: Any) -> None:
    session = fake_session()
    before = session.read_state()
    with pytest.raises(InputError, match="tokens has the dtype int64"):
        session.run([[value] * 8] * 2)
    assert_same(session.read_state(), before)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39], ids=repr)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_vector_that_is_not_finite_is_refused_before_the_call(value: float, dtype: type) -> None:
    """It would be noticed in what comes out; but then the tokens of the other lanes would be gone with it."""
    session = fake_session(fake_spec(vectors=True))
    session.step(np.ones((2, CHUNK, WIDTH), np.float32))
    before = session.read_state()
    with np.errstate(over="ignore"):
        bad: Any = np.float64(value).astype(dtype)
    for call, length in ((session.step, CHUNK), (session.decode, 1), (session.feed, 3 * CHUNK), (session.run, CHUNK)):
        vectors: Array = np.ones((2, length, WIDTH), dtype)
        vectors[1, length // 2 :, 1] = bad
        with pytest.raises(
            InputError,
            match=rf"tokens takes finite numbers; token {length // 2} of lane 1 .*float32 \({-(-length // 2)} ",
        ):
            call(vectors)
    assert_same(session.read_state(), before)
    assert not session.offsets.any()


def test_what_is_not_finite_behind_the_valid_tokens_reaches_nothing() -> None:
    spec = fake_spec(vectors=True)
    vectors = np.random.default_rng(0).standard_normal((2, CHUNK, WIDTH)).astype(np.float32)
    clean = vectors.copy()
    vectors[1, 2:], clean[1, 2:] = np.nan, 0
    for name in ("step", "feed"):
        runtime, honest = FakeRuntime(spec), fake_session(spec)
        call = runtime.call
        seen: list[bool] = []

        def watched(
            entry: str, inputs: Mapping[str, Array], state: State, call: Any = call, seen: list[bool] = seen
        ) -> tuple[Arrays, State]:
            seen.append(bool(np.isfinite(inputs["tokens"]).all()))
            found: tuple[Arrays, State] = call(entry, inputs, state)
            return found

        runtime.call = watched  # type: ignore[method-assign]
        session = Session(runtime, spec, fake_initial(spec), "f", "fake")
        assert_same(getattr(session, name)(vectors, [CHUNK, 2]), getattr(honest, name)(clean, [CHUNK, 2]))
        assert_same(session.read_state(), honest.read_state())
        assert seen
        assert all(seen)
        assert np.isnan(vectors[1, 2:]).all(), "the caller's own are left as they are"


def test_run_refuses_vectors_of_another_width() -> None:
    with pytest.raises(InputError, match=r"shape \[2, T, 4\]; given \[2, 8, 5\]"):
        fake_session(fake_spec(vectors=True)).run(np.zeros((2, 8, 5), np.float32))


def test_run_refuses_an_empty_sequence() -> None:
    with pytest.raises(InputError, match="at least one token"):
        fake_session().run(np.zeros((2, 0), int))


def test_run_refuses_a_bad_id_before_it_feeds_anything() -> None:
    session = fake_session()
    before = session.read_state()
    sequence = np.zeros((2, 3 * CHUNK), int)
    sequence[0, -1] = VOCABULARY
    with pytest.raises(InputError, match="tokens must lie in"):
        session.run(sequence)
    assert_same(session.read_state(), before)


def test_valid_is_refused_where_the_entry_has_none() -> None:
    session = fake_session(fake_spec(valid=False))
    assert np.isfinite(session.step(ids(session))["outputs"]).all()
    session.step(ids(session), [CHUNK, CHUNK])
    before = session.read_state()
    given: list[Any] = [[1, 2], [CHUNK, 0], CHUNK - 1, CHUNK, [CHUNK] * 3, [[CHUNK]], [], ["a", "b"], [None, CHUNK]]
    for valid in given:
        with pytest.raises(
            InputError,
            match=rf"step has no input valid: all {CHUNK} tokens .*given {re.escape(str(valid))}.*feed or run",
        ):
            session.step(ids(session), valid)
    with pytest.raises(InputError, match="valid is not an array"):
        session.step(ids(session), [[CHUNK], [CHUNK, 1]])
    assert_same(session.read_state(), before)


def test_valid_for_more_lanes_than_there_are_is_refused_where_the_entry_has_none() -> None:
    """With one lane numpy would take any number of them for it."""
    session = fake_session(fake_spec(batch=1, valid=False))
    with pytest.raises(InputError, match=rf"on every lane, valid=\[{CHUNK}\]; given \[4, 4, 4\]"):
        session.step(ids(session), [CHUNK] * 3)
    session.step(ids(session), [CHUNK])


def test_run_refuses_a_partial_chunk_where_the_entry_cannot_say_so() -> None:
    session = fake_session(fake_spec(valid=False, entries=("step",)))
    session.run(np.zeros((2, 2 * CHUNK), int))
    before = session.read_state()
    with pytest.raises(InputError, match=rf"whole calls of {CHUNK} tokens; given {CHUNK + 1} tokens\. Give a mult"):
        session.run(np.zeros((2, CHUNK + 1), int))
    assert_same(session.read_state(), before)


@pytest.mark.parametrize("lane", [1.0, "a", [0], np.float32(0), np.zeros(2, int)], ids=repr)
def test_a_lane_that_is_no_whole_number_is_refused(lane: Any) -> None:
    session = fake_session()
    session.step(ids(session), [CHUNK, 1])
    before, kept = session.read_state(), session.snapshot(0)
    calls: list[Callable[[], object]] = [
        lambda: session.reset(lane),
        lambda: session.snapshot(lane),
        lambda: session.restore(kept, lane),
        lambda: session.fork(lane, 1),
        lambda: session.fork(0, lane),
    ]
    for call in calls:
        with pytest.raises(InputError, match=rf"integer in 0 \.\. 1; given {re.escape(repr(lane))} of type"):
            call()
    assert_same(session.read_state(), before)
    assert session.offsets.tolist() == [0, 1]


def test_a_lane_may_be_a_number_of_numpy() -> None:
    session = fake_session()
    session.step(ids(session), [1, 2])
    session.reset(np.int64(1))  # type: ignore[arg-type]
    assert session.offsets.tolist() == [1, 0]
    session.fork(np.uint8(0), np.array(1))  # type: ignore[arg-type]
    assert session.offsets.tolist() == [1, 1]


def test_load_state_refuses_what_is_not_the_whole_state() -> None:
    session = fake_session()
    state = session.read_state()
    for change, message in (
        ({"0.tail": np.zeros((2, WIDTH + 1))}, r"The state 0\.tail has the shape \[2, 4\]; given \[2, 5\]"),
        ({"1.bank": np.zeros(3)}, r"no states \['1\.bank'\]; it has \['0\.bank'"),
    ):
        with pytest.raises(InputError, match=message):
            session.load_state({**state, **change})
    with pytest.raises(InputError, match=r"The state 0\.bank is missing; given \["):
        session.load_state({name: value for name, value in state.items() if name != "0.bank"})
    assert_same(session.read_state(), state)


WRONG_STATES = {
    "text": ("0.tail", np.full((2, WIDTH), "x"), "has the dtype float32; given <U1"),
    "complex": ("0.tail", np.zeros((2, WIDTH), complex), "has the dtype float32; given complex128"),
    "fractions for a count": ("lane.count", np.zeros(2), "has the dtype int64; given float64"),
    "numbers for a mask": ("0.mask", np.ones((2, 3), np.int64), "has the dtype bool; given int64"),
    "a huge count": ("lane.count", np.full(2, 2**63, np.uint64), r"takes numbers of int64; given 9223372036854775808"),
    "NaN": ("0.written", np.full((2, 3), np.nan, np.float32), "finite in float32; given NaN or infinity"),
    "one infinity": ("0.bank", np.full((2, 3, WIDTH), -np.inf), "finite in float32; given NaN or infinity"),
    "beyond float32": ("0.written", np.full((2, 3), 1e39), "finite in float32; given NaN or infinity"),
    "a negative offset": ("lane.offset", np.array([0, -1]), rf"counts the tokens .*0 \.\. {CHUNK}; given -1 \.\. 0"),
    "an offset too large": ("lane.offset", np.array([0, CHUNK + 1]), rf"counts .*0 \.\. {CHUNK}; given 0 \.\. 5"),
}


@pytest.mark.parametrize(("name", "value", "message"), WRONG_STATES.values(), ids=WRONG_STATES)
def test_a_wrong_state_is_refused(name: str, value: Array, message: str) -> None:
    session = fake_session()
    session.step(ids(session))
    before = session.read_state()
    arrays = {**fake_initial(fake_spec()), name: value}
    with pytest.raises(InputError, match=message):
        session.load_state(arrays)
    for lane in (None, 1):
        held = arrays if lane is None else lane_of(arrays, lane)
        with pytest.raises(SnapshotError, match=rf"does not fit this model: The state {name} .*{message[:20]}"):
            session.restore(forged(session, held, lane), lane)
    assert_same(session.read_state(), before)
    assert not session.offsets.any()


@pytest.mark.parametrize("spoil", [lambda value: value.astype(str), lambda value: value * np.float32(np.nan)])
def test_nothing_is_written_where_the_last_state_is_wrong(session: Session, spoil: Callable[[Array], Array]) -> None:
    session.step(ids(session))
    before = session.read_state()
    last = [state.name for state in session.spec.states if state.dtype == "float32"][-1]
    arrays = {name: np.zeros_like(value) for name, value in before.items()}
    arrays[last] = spoil(arrays[last])
    with pytest.raises(InputError, match=f"The state {last} "):
        session.load_state(arrays)
    with pytest.raises(SnapshotError, match=f"The state {last} "):
        session.restore(forged(session, arrays, None))
    with pytest.raises(SnapshotError, match=f"The state {last} "):
        session.restore(forged(session, lane_of(arrays, 0), 0), 0)
    assert_same(session.read_state(), before)


def forged(session: Session, arrays: Arrays, lane: int | None) -> bytes:
    """A snapshot that a session would not take; its hash fits."""
    header = np.array(
        json.dumps({"fingerprint": session.fingerprint, "lanes": session.batch if lane is None else None})
    )
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, header=header, **{f"state/{key}": value for key, value in arrays.items()})
    return snapshots._MAGIC + hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()


def test_states_of_other_widths_are_taken_as_what_they_are() -> None:
    session = fake_session()
    session.step(ids(session), [CHUNK, 1])
    state = session.read_state()
    session.reset()
    wide = {"f": np.float64, "i": np.int32, "b": np.bool_}
    session.load_state({name: value.astype(wide[value.dtype.kind]) for name, value in state.items()})
    assert_same(session.read_state(), state)
    assert session.offsets.tolist() == [0, 1]


def test_load_state_puts_every_lane_where_it_stood(session: Session) -> None:
    tokens = ids(session, 2)
    session.step(tokens[0])
    state = session.read_state()
    wanted = session.step(tokens[1])
    session.step(tokens[0], [1, 1])
    session.load_state(state)
    assert not session.offsets.any()
    assert_same(session.step(tokens[1]), wanted)


@pytest.mark.parametrize("missing", ["0.bank", "lane.count"])
def test_a_session_without_an_initial_value_for_each_state_is_refused(missing: str) -> None:
    spec = fake_spec()
    values = {name: value for name, value in fake_initial(spec).items() if name != missing}
    with pytest.raises(InputError, match=f"The state {missing} is missing"):
        Session(FakeRuntime(spec), spec, values, "f", "fake")
