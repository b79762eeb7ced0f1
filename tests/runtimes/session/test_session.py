"""Sessions: streams of lanes, in any split, from reset to close."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nsm.bundle import Bundle
from nsm.errors import InputError, RunError, StreamError
from nsm.runtimes.base import State
from nsm.runtimes.opening.artifacts import open_bundle
from nsm.runtimes.session.session import Session
from nsm.spec import TensorSpec
from nsm.trace import Array, Arrays
from tests.runtimes.fake import (
    CHUNK,
    OUTPUTS,
    VOCABULARY,
    WIDTH,
    FakeRuntime,
    assert_same,
    fake_initial,
    fake_session,
    fake_spec,
)
from tests.runtimes.sessions import answers, assert_close, ids, initial, lane_of, with_a_deadline

# -- reset --------------------------------------------------------------------------------------------------------


def test_reset_is_fresh_bit_by_bit(session: Session) -> None:
    fresh, tokens = initial(session), ids(session, 3)
    first = answers(session, tokens)
    session.reset()
    assert_same(session.read_state(), fresh)
    for given, wanted in zip(answers(session, tokens), first, strict=True):
        assert_same(given, wanted)


def test_reset_of_one_lane_is_fresh_there_and_changes_nothing_elsewhere(session: Session) -> None:
    fresh, tokens = initial(session), ids(session, 3)
    first = session.step(tokens[0])
    session.step(tokens[1])
    before = session.read_state()
    session.reset(1)
    assert_same(lane_of(session.read_state(), 1), lane_of(fresh, 1))
    assert_same(lane_of(session.read_state(), 0), lane_of(before, 0))
    mixed = np.stack([tokens[2][0], tokens[0][1]])
    assert_same(lane_of(session.step(mixed), 1), lane_of(first, 1))


def test_the_learned_initial_state_reaches_the_backend(bundle: Bundle, target: str) -> None:
    wanted = bundle.state_init()
    assert any(np.abs(value).max() > 0 for name, value in wanted.items() if name.endswith(".bank"))
    with open_bundle(bundle, target) as session:
        assert_same(session.read_state(), wanted)
        tokens = ids(session)
        learned = session.step(tokens)["outputs"]
        session.load_state({name: np.zeros_like(v) if name[2:] == "bank" else v for name, v in wanted.items()})
        assert not np.array_equal(session.step(tokens)["outputs"], learned)


def test_a_lane_outside_the_session_is_refused(session: Session) -> None:
    snapshot = session.snapshot(0)
    for lane in (-1, 2):
        with pytest.raises(InputError, match=rf"lanes 0 \.\. 1; given {lane}"):
            session.reset(lane)
        with pytest.raises(InputError, match=rf"lanes 0 \.\. 1; given {lane}"):
            session.snapshot(lane)
        with pytest.raises(InputError, match=rf"lanes 0 \.\. 1; given {lane}"):
            session.restore(snapshot, lane)


def test_a_state_with_its_lanes_on_another_axis_is_handled_by_lane() -> None:
    plain, turned = fake_session(fake_spec(3)), fake_session(fake_spec(3, tail_axis=1))
    for session in (plain, turned):
        answers(session, ids(session, 2))
        snapshot = session.snapshot(0)
        session.reset(2)
        session.restore(snapshot, 1)
    state = turned.read_state()
    assert state["0.tail"].shape == (WIDTH, 3)
    assert_same({**state, "0.tail": np.ascontiguousarray(state["0.tail"].T)}, plain.read_state())


# -- streams and chunks -------------------------------------------------------------------------------------------


def test_run_with_a_partial_last_chunk_is_the_same_tokens_in_steps(session: Session) -> None:
    length = session.spec.chunk_size
    sequence = np.concatenate(ids(session, 3), 1)[:, : 2 * length + 3]
    given = session.run(sequence)
    state = session.read_state()
    assert given["outputs"].shape[:2] == sequence.shape

    session.reset()
    padding = np.full((2, length - 3), 5)
    last = np.concatenate([sequence[:, 2 * length :], padding], 1)
    steps = [
        session.step(sequence[:, :length]),
        session.step(sequence[:, length : 2 * length]),
        session.step(last, [3, 3]),
    ]
    wanted = np.concatenate([step["outputs"] for step in steps], 1)[:, : 2 * length + 3]
    np.testing.assert_array_equal(given["outputs"], wanted)
    assert_same(session.read_state(), state)


def test_runs_of_whole_chunks_go_on_from_where_the_lanes_stand(session: Session) -> None:
    length = session.spec.chunk_size
    sequence = np.concatenate(ids(session, 4), 1)
    whole = session.run(sequence)["outputs"]
    session.reset()
    pieces = [session.run(sequence[:, :length]), session.run(sequence[:, length:])]
    np.testing.assert_array_equal(np.concatenate([piece["outputs"] for piece in pieces], 1), whole)


def test_a_lane_inside_a_chunk_goes_on_but_not_with_step(session: Session) -> None:
    tokens, length = ids(session, 2), session.spec.chunk_size
    sequence = np.concatenate(tokens, 1)
    whole = session.run(sequence)["outputs"]
    end = session.read_state()
    session.reset()
    first = session.step(tokens[0], [length, 3])["outputs"]
    assert session.offsets.tolist() == [0, 3]
    state = session.read_state()
    message = rf"lanes \[1\] .*inside a chunk of {length} tokens \(offsets \[0, 3\]\).*Use feed or run.*valid=0"
    with pytest.raises(StreamError, match=message):
        session.step(tokens[1])
    assert_same(session.read_state(), state)
    rest = np.zeros((2, 2 * length - 3), np.int64)
    rest[0, :length], rest[1] = sequence[0, length:], sequence[1, 3:]
    second = session.feed(rest, [length, 2 * length - 3])["outputs"]
    assert session.offsets.tolist() == [0, 0]
    given = [np.concatenate([first[0], second[0, :length]]), np.concatenate([first[1, :3], second[1]])]
    np.testing.assert_allclose(given, whole, rtol=1e-5, atol=1e-5)
    assert not second[0, length:].any()
    assert_close(session.read_state(), end)


def test_step_leaves_a_lane_inside_a_chunk_alone_where_it_has_no_tokens(session: Session) -> None:
    tokens, length = ids(session, 2), session.spec.chunk_size
    session.step(tokens[0], [length, 3])
    state = session.read_state()
    session.step(tokens[1], [length, 0])
    assert_same(lane_of(session.read_state(), 1), lane_of(state, 1))
    assert session.offsets.tolist() == [0, 3]
    session.reset(1)
    assert session.offsets.tolist() == [0, 0]
    session.step(tokens[0])


def test_what_offsets_returns_is_a_copy() -> None:
    session = fake_session()
    session.offsets[:] = 1
    assert not session.offsets.any()


def test_reset_of_all_lanes_brings_them_to_a_chunks_beginning(session: Session) -> None:
    session.step(ids(session), [1, 1])
    assert session.offsets.tolist() == [1, 1]
    session.reset()
    assert not session.offsets.any()
    session.step(ids(session))


def test_a_model_that_is_not_causal_stops_where_a_chunk_is_not_full() -> None:
    session = fake_session(fake_spec(entries=("step",)))
    tokens = ids(session)
    session.step(tokens, [CHUNK, 3])
    before = session.read_state()
    for call in (session.step, session.feed, session.run):
        with pytest.raises(
            StreamError, match=r"lanes \[1\] .*no entry decode, so a partial chunk ends a stream: reset"
        ):
            with_a_deadline(call, tokens)
    assert_same(session.read_state(), before)
    session.feed(tokens, [CHUNK, 0])
    session.reset(1)
    session.feed(tokens)
    with pytest.raises(InputError, match=r"There is no entry 'decode'\. Entries: step\."):
        session.decode(tokens[:, :1])


# -- decode and feed ----------------------------------------------------------------------------------------------


def test_token_by_token_is_the_same_stream(session: Session) -> None:
    sequence = np.concatenate(ids(session, 3), 1)[:, :-2]
    whole = session.run(sequence)["outputs"]
    end, offsets = session.read_state(), session.offsets
    session.reset()
    parts = [session.decode(sequence[:, index : index + 1])["outputs"] for index in range(sequence.shape[1])]
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-5)
    assert_close(session.read_state(), end)
    assert session.offsets.tolist() == offsets.tolist() == [session.spec.chunk_size - 2] * 2


def test_decode_of_one_lane_leaves_the_other_as_it_is(session: Session) -> None:
    tokens = ids(session, 2)
    session.feed(tokens[0], [1, 2])
    before, offsets = session.read_state(), session.offsets.tolist()
    for index in range(session.spec.chunk_size):
        session.decode(tokens[1][:, index : index + 1], [1, 0])
        assert_same(lane_of(session.read_state(), 1), lane_of(before, 1))
    assert session.offsets.tolist() == offsets == [1, 2]


def test_the_outputs_of_feed_are_zero_behind_the_valid_tokens(session: Session) -> None:
    tokens = np.concatenate(ids(session, 5), 1)
    outputs = session.feed(tokens, [2, 17])["outputs"]
    assert outputs.shape[:2] == tokens.shape
    assert np.abs(outputs[0, :2]).min() > 0
    assert np.abs(outputs[1, :17]).min() > 0
    assert not outputs[0, 2:].any()
    assert not outputs[1, 17:].any()
    before = session.read_state()
    assert not session.feed(tokens, [0, 0])["outputs"].any()
    assert_same(session.read_state(), before)


def test_what_lies_behind_the_valid_tokens_reaches_nothing(session: Session) -> None:
    tokens = np.concatenate(ids(session, 3), 1)
    answers_of: list[tuple[Arrays, Arrays]] = []
    for padding in (0, 7):
        session.reset()
        tokens[0, 3:], tokens[1, 11:] = padding, padding
        answers_of.append((session.feed(tokens, [3, 11]), session.read_state()))
    for given, wanted in zip(*answers_of, strict=True):
        assert_same(given, wanted)


def test_few_tokens_are_decoded_and_many_are_stepped() -> None:
    spec = fake_spec(1, tokens_per_call=2 * CHUNK)
    for start, count, wanted in (
        (0, 2 * CHUNK, ["step"]),
        (0, 4 * CHUNK + 1, ["step", "step", "step"]),
        (0, 1, ["step"]),  # a quarter of a chunk of 4
        (3, 1 + 2 * CHUNK, ["decode", "commit", "step"]),
        (1, 2, ["decode", "decode"]),
    ):
        runtime = FakeRuntime(spec)
        session = Session(runtime, spec, fake_initial(spec), "f", "fake")
        for _ in range(start):
            session.decode([[1]])
        runtime.called.clear()
        session.feed(np.ones((1, count), int))
        assert runtime.called == wanted, (start, count)


def test_lanes_at_different_places_each_take_their_own_way() -> None:
    spec = fake_spec(3)
    runtime = FakeRuntime(spec)
    session = Session(runtime, spec, fake_initial(spec), "f", "fake")
    alone = [fake_session(fake_spec(1)) for _ in range(3)]
    random = np.random.default_rng(0)
    for _ in range(30):
        tokens, valid = random.integers(0, VOCABULARY, (3, 10)), random.integers(0, 11, 3)
        outputs = session.feed(tokens, valid)["outputs"]
        for lane, single in enumerate(alone):
            if valid[lane]:
                wanted = single.run(tokens[lane, : valid[lane]])["outputs"]
                np.testing.assert_array_equal(outputs[lane, : valid[lane]], wanted)
            state = {name: value[0] for name, value in single.read_state().items()}
            assert_same(lane_of(session.read_state(), lane), state)
    assert {"step", "decode", "commit"} == set(runtime.called)


def test_without_valid_whole_calls_are_stepped_and_the_rest_is_decoded() -> None:
    spec = fake_spec(1, valid=False)
    runtime = FakeRuntime(spec)
    session, other = Session(runtime, spec, fake_initial(spec), "f", "fake"), fake_session(fake_spec(1))
    sequence = np.arange(3 * CHUNK + 1) % VOCABULARY
    for piece in (sequence[: 2 * CHUNK + 1], sequence[2 * CHUNK + 1 :]):
        np.testing.assert_array_equal(session.run(piece)["outputs"], other.run(piece)["outputs"])
    assert_same(session.read_state(), other.read_state())
    assert runtime.called == ["step", "step", "decode", *["decode"] * 3, "commit", "decode"]


WRONG_DECODES = {
    "two tokens": ([[0, 0]] * 2, None, r"tokens has the shape \[2, 1\]; given \[2, 2\]"),
    "lanes": ([[0]], None, r"tokens has the shape \[2, 1\]; given \[1, 1\]"),
    "large id": ([[0], [VOCABULARY]], None, r"tokens must lie in"),
    "float": ([[0.0]] * 2, None, r"tokens has the dtype int64; given float64"),
    "valid too large": ([[0]] * 2, [2, 0], r"valid must lie in 0 \.\. 1; given 0 \.\. 2"),
    "valid negative": ([[0]] * 2, [-1, 0], r"valid must lie in 0 \.\. 1"),
    "valid scalar": ([[0]] * 2, 1, r"valid has the shape \[2\]; given \[\]"),
}


@pytest.mark.parametrize(("tokens", "valid", "message"), WRONG_DECODES.values(), ids=WRONG_DECODES)
def test_a_wrong_decode_is_refused_and_leaves_the_state_untouched(tokens: Any, valid: Any, message: str) -> None:
    session = fake_session()
    session.feed(ids(session), [1, 3])
    before = session.read_state()
    with pytest.raises(InputError, match=message):
        session.decode(tokens, valid)
    assert_same(session.read_state(), before)
    assert session.offsets.tolist() == [1, 3]


def test_debug_outputs_are_nan_for_tokens_that_were_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = fake_spec(1)
    step = spec.entry("step")
    debug = replace(step, outputs=(*step.outputs, TensorSpec("routing.0", (1, CHUNK, 2), "float32", 1)))
    session = fake_session(replace(spec, entries=(debug, *spec.entries[1:])))
    real = session.step
    monkeypatch.setattr(
        session, "step", lambda *given: {**real(*given), "routing.0": np.full((1, CHUNK, 2), 0.5, np.float32)}
    )
    session.decode(np.zeros((1, 1), np.int64))
    found = session.feed(np.zeros((1, 2 * CHUNK - 1), np.int64))["routing.0"]
    assert np.isnan(found[:, : CHUNK - 1]).all()
    assert (found[:, CHUNK - 1 :] == 0.5).all()


@pytest.mark.parametrize(
    ("valid", "message"),
    [
        ([4, 10], r"valid must lie in 0 \.\. 9; given 4 \.\. 10"),
        ([-1, 3], r"valid must lie in"),
        (3, r"valid has the shape \[2\]; given \[\]"),
        ([1.0, 2.0], r"valid has the dtype int64; given float64"),
    ],
)
def test_feed_refuses_a_wrong_valid_before_it_feeds_anything(valid: Any, message: str) -> None:
    session = fake_session()
    before = session.read_state()
    with pytest.raises(InputError, match=message):
        session.feed(np.zeros((2, 9), int), valid)
    assert_same(session.read_state(), before)


def test_a_lane_without_valid_tokens_stays_exactly_as_it_was(session: Session) -> None:
    tokens = ids(session, 3)
    session.step(tokens[0])
    before = session.read_state()
    session.step(tokens[1], [session.spec.chunk_size, 0])
    after = session.read_state()
    assert_same(lane_of(after, 1), lane_of(before, 1))
    assert not np.array_equal(after["0.bank"][0], before["0.bank"][0])


def test_lanes_do_not_bleed_into_each_other(session: Session) -> None:
    tokens, others = ids(session, 4), ids(session, 4, seed=1)
    alone = [lane_of(session.step(step), 0) for step in tokens]
    state = lane_of(session.read_state(), 0)
    length = session.spec.chunk_size
    for neighbour in ([length] * 4, [0] * 4, [length, 0, length, 2]):
        session.reset()
        for step, other, count, wanted in zip(tokens, others, neighbour, alone, strict=True):
            outputs = session.step(np.stack([step[0], other[1]]), [length, count])
            assert_same(lane_of(outputs, 0), wanted)
        assert_same(lane_of(session.read_state(), 0), state)


def test_a_call_of_several_chunks_gives_the_same_stream() -> None:
    session = fake_session(fake_spec(1, tokens_per_call=2 * CHUNK))
    short = fake_session(fake_spec(1))
    sequence = np.arange(3 * CHUNK + 1) % VOCABULARY
    for piece in (sequence[: 3 * CHUNK], sequence[3 * CHUNK :]):
        np.testing.assert_array_equal(session.run(piece)["outputs"], short.run(piece)["outputs"])
    assert session.offsets.tolist() == [1]
    assert_same(session.read_state(), short.read_state())


def test_run_on_one_lane_takes_a_sequence_without_the_lane_axis() -> None:
    session = fake_session(fake_spec(1))
    sequence = np.arange(6)
    flat = session.run(sequence)["outputs"]
    session.reset()
    assert flat.shape == (6, OUTPUTS)
    np.testing.assert_array_equal(session.run(sequence[None])["outputs"][0], flat)


def test_vectors_are_fed_like_ids() -> None:
    session = fake_session(fake_spec(1, vectors=True))
    vectors = np.random.default_rng(0).standard_normal((6, WIDTH))
    flat = session.run(vectors)["outputs"]
    session.reset()
    np.testing.assert_array_equal(session.run(vectors[None].astype(np.float32))["outputs"][0], flat)
    assert flat.shape == (6, OUTPUTS)


# -- copies -------------------------------------------------------------------------------------------------------


def test_outputs_and_states_are_the_callers_own(session: Session) -> None:
    tokens = ids(session, 3)
    wanted = answers(session, tokens)
    session.reset()
    for step, reference in zip(tokens, wanted, strict=True):
        outputs = session.step(step)
        assert_same(outputs, reference)
        for array in (*outputs.values(), *session.read_state().values()):
            array[...] = 1
    session.reset()
    first = session.step(tokens[0])
    kept = first["outputs"].copy()
    session.step(tokens[1])
    np.testing.assert_array_equal(first["outputs"], kept)


def test_tokens_may_be_changed_after_the_call(session: Session) -> None:
    tokens = ids(session)
    valid = np.array([session.spec.chunk_size] * 2)
    wanted = session.step(tokens, valid)
    session.reset()
    given = session.step(tokens, valid)
    tokens[:], valid[:] = 0, 1
    assert_same(given, wanted)
    assert not session.offsets.any()


def test_loaded_states_may_be_changed_afterwards(session: Session) -> None:
    session.step(ids(session))
    state = session.read_state()
    kept = {name: value.copy() for name, value in state.items()}
    session.load_state(state)
    for value in state.values():
        value[...] = 0
    assert_same(session.read_state(), kept)


# -- end ----------------------------------------------------------------------------------------------------------


def test_a_session_closes_its_runtime_also_after_an_error() -> None:
    spec = fake_spec()
    for broken in (False, True):
        runtime = FakeRuntime(spec, effective_precision="tf32")
        try:
            with Session(runtime, spec, fake_initial(spec), "f", "fake") as session:
                assert (session.batch, session.effective_precision) == (2, "tf32")
                if broken:
                    raise KeyError
        except KeyError:
            assert broken
        assert runtime.closed


def test_a_loaded_state_stands_where_it_stood(session: Session) -> None:
    tokens, length = ids(session), session.spec.chunk_size
    session.step(tokens, [length, 3])
    state = session.read_state()
    wanted = session.feed(tokens)
    session.reset()
    session.load_state(state)
    assert session.offsets.tolist() == [0, 3]
    with pytest.raises(StreamError, match=r"lanes \[1\] .*inside a chunk"):
        session.step(tokens)
    assert_same(session.feed(tokens), wanted)


def test_the_initial_state_is_the_sessions_own() -> None:
    spec = fake_spec()
    initial_arrays = fake_initial(spec)
    session = Session(FakeRuntime(spec), spec, initial_arrays, "f" * 64, "fake")
    initial_arrays["0.bank"][:] = 7.0
    session.reset()
    assert session.is_fresh()
    assert_same(session.read_state(), fake_initial(spec))
    session.step(ids(session))
    assert not session.is_fresh()


def test_a_commit_that_failed_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token was taken and the chunk is full: the next token finds it committed, as if nothing had happened."""
    session, honest = fake_session(), fake_session()
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2 * CHUNK, 2, 1))
    call = session.runtime.call
    failed: list[str] = []

    def fail_once(entry: str, inputs: Mapping[str, Array], state: State) -> tuple[Arrays, State]:
        if entry == "commit" and not failed:
            failed.append(entry)
            raise RunError("no memory")
        return call(entry, inputs, state)

    monkeypatch.setattr(session.runtime, "call", fail_once)
    for number, token in enumerate(tokens):
        honest.decode(token)
        if number == CHUNK - 1:
            with pytest.raises(RunError, match="no memory"):
                session.decode(token)
            assert session.offsets.tolist() == [CHUNK, CHUNK]
        else:
            session.decode(token)
            assert_same(session.read_state(), honest.read_state())
    assert failed == ["commit"]
