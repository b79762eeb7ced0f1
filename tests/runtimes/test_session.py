from __future__ import annotations

import hashlib
import io
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from nsm.bundle import Bundle
from nsm.errors import InputError, NonFiniteError, RunError, SnapshotError, StreamError
from nsm.runtimes import snapshots
from nsm.runtimes.base import State
from nsm.runtimes.measures import relative_error
from nsm.runtimes.opening import open_bundle
from nsm.runtimes.session import Session
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


@pytest.fixture(params=["fake", "onnx", "onnxruntime", "openvino"])
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    """A fresh session with two lanes over ids: the fake, and every target that runs on a CPU."""
    if request.param == "fake":
        yield fake_session()
        return
    bundle: Bundle = request.getfixturevalue("bundle")
    with open_bundle(bundle, request.param, threads=1) as opened:
        yield opened


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
    session._state = session._runtime.load_state(state)


def lane_of(arrays: Arrays, lane: int) -> Arrays:
    return {name: value[lane] for name, value in arrays.items()}


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
    message = rf"lanes \[1\] stand inside a chunk of {length} tokens \(offsets \[0, 3\]\).*Use feed or run.*valid=0"
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
            StreamError, match=r"lanes \[1\] .*no entry decode here, so a partial chunk ends a stream: reset"
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
            match=rf"tokens takes finite numbers; token {length // 2} of lane 1 .*float32 \({-(-length // 2)} such",
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
    for valid in ([1, 2], [CHUNK, 0], CHUNK - 1):
        with pytest.raises(InputError, match=rf"step has no input valid: all {CHUNK} tokens .*feed or run"):
            session.step(ids(session), valid)
    assert_same(session.read_state(), before)


def test_run_refuses_a_partial_chunk_where_the_entry_cannot_say_so() -> None:
    session = fake_session(fake_spec(valid=False, entries=("step",)))
    session.run(np.zeros((2, 2 * CHUNK), int))
    before = session.read_state()
    with pytest.raises(
        InputError, match=rf"whole calls of {CHUNK} tokens only; given {CHUNK + 1} tokens\. Give a mult"
    ):
        session.run(np.zeros((2, CHUNK + 1), int))
    assert_same(session.read_state(), before)


def test_load_state_refuses_what_is_not_the_whole_state() -> None:
    session = fake_session()
    state = session.read_state()
    for change, message in (
        ({"0.tail": np.zeros((2, WIDTH + 1))}, r"The state 0\.tail has the shape \[2, 4\]; given \[2, 5\]"),
        ({"1.bank": np.zeros(3)}, r"no states \['1\.bank'\]; it has \['0\.bank'"),
    ):
        with pytest.raises(InputError, match=message):
            session.load_state({**state, **change})
    with pytest.raises(InputError, match=r"The state 0\.bank is missing; given are"):
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


# -- snapshots ----------------------------------------------------------------------------------------------------


def test_a_whole_snapshot_resumes_bit_by_bit(session: Session) -> None:
    tokens = ids(session, 4)
    answers(session, tokens[:2])
    snapshot, state = session.snapshot(), session.read_state()
    wanted = answers(session, tokens[2:])
    session.restore(snapshot)
    assert_same(session.read_state(), state)
    for given, reference in zip(answers(session, tokens[2:]), wanted, strict=True):
        assert_same(given, reference)


def test_a_snapshot_of_a_lane_resumes_on_it_and_on_another(session: Session) -> None:
    tokens = ids(session, 3)
    session.step(tokens[0])
    snapshot = session.snapshot(0)
    wanted = lane_of(session.step(tokens[1]), 0)
    session.step(tokens[2])
    before = session.read_state()
    session.restore(snapshot, 0)
    assert_same(lane_of(session.read_state(), 1), lane_of(before, 1))
    session.restore(snapshot, 1)
    outputs = session.step(np.stack([tokens[1][0]] * 2))
    assert_same(lane_of(outputs, 0), wanted)
    assert_same(lane_of(outputs, 1), wanted)


def test_a_snapshot_inside_a_chunk_goes_on_where_it_was_taken(session: Session) -> None:
    tokens, length = ids(session, 3), session.spec.chunk_size
    session.step(tokens[0], [length, 3])
    whole, inside, between = session.snapshot(), session.snapshot(1), session.snapshot(0)
    wanted = session.feed(tokens[1])
    session.feed(tokens[2], [2, 1])
    session.restore(whole)
    assert session.offsets.tolist() == [0, 3]
    assert_same(session.feed(tokens[1]), wanted)
    session.restore(between, 1)
    assert session.offsets.tolist() == [0, 0]
    session.restore(inside, 0)
    assert session.offsets.tolist() == [3, 0]
    outputs = session.feed(tokens[1][[1, 0]])["outputs"]
    np.testing.assert_allclose(outputs[[1, 0]], wanted["outputs"], rtol=1e-5, atol=1e-5)


def test_a_snapshot_resumes_on_another_target_within_the_fp32_budget(bundle: Bundle, target: str) -> None:
    with open_bundle(bundle, target) as taken:
        tokens = ids(taken, 6)
        answers(taken, tokens[:3])
        snapshot, lane = taken.snapshot(), taken.snapshot(1)
        state = taken.read_state()
        wanted = answers(taken, tokens[3:])
    for other in ("onnx", "onnxruntime", "openvino"):
        with open_bundle(bundle, other) as session:
            session.restore(snapshot)
            assert_same(session.read_state(), state)
            for given, reference in zip(answers(session, tokens[3:]), wanted, strict=True):
                assert relative_error(given["outputs"], reference["outputs"], 0.0) <= 1e-4
            session.restore(lane, 0)
            assert_same(lane_of(session.read_state(), 0), lane_of(state, 1))


def test_a_snapshot_of_a_lane_goes_to_a_session_with_another_number_of_lanes() -> None:
    two, three = fake_session(), fake_session(fake_spec(3))
    two.step(ids(two))
    three.restore(two.snapshot(1), 2)
    assert_same(lane_of(three.read_state(), 2), lane_of(two.read_state(), 1))
    assert_same(lane_of(three.read_state(), 0), lane_of(fake_session().read_state(), 0))


def test_a_damaged_snapshot_is_refused_whatever_the_damage() -> None:
    session = fake_session()
    session.step(ids(session))
    snapshot, before = session.snapshot(), session.read_state()
    damaged = [b"", b"nsm", snapshot[:-1], snapshot + b"\0", snapshot[:40], b"x" + snapshot]
    flips = range(0, len(snapshot), 31)
    damaged += [snapshot[:index] + bytes([snapshot[index] ^ 1]) + snapshot[index + 1 :] for index in flips]
    for bad in damaged:
        with pytest.raises(SnapshotError, match="damaged: the hash does not fit"):
            session.restore(bad)
    assert_same(session.read_state(), before)


def test_a_snapshot_of_another_model_is_refused() -> None:
    session, other = fake_session(), fake_session(fingerprint="0" * 64)
    other.step(ids(other))
    before = session.read_state()
    with pytest.raises(SnapshotError, match=r"another model \(fingerprint 000000000000\.\.\., this is ffffffffffff"):
        session.restore(other.snapshot())
    assert_same(session.read_state(), before)


def test_a_snapshot_of_other_lanes_is_refused() -> None:
    session, three = fake_session(), fake_session(fake_spec(3))
    for snapshot, lane, message in (
        (three.snapshot(), None, r"holds all 3 lanes, the call restores all 2 lanes"),
        (session.snapshot(), 0, r"holds all 2 lanes, the call restores one lane"),
        (session.snapshot(0), None, r"holds one lane, the call restores all 2 lanes\. Give `lane`"),
    ):
        before = session.read_state()
        with pytest.raises(SnapshotError, match=message):
            session.restore(snapshot, lane)
        assert_same(session.read_state(), before)


def test_a_snapshot_with_states_of_other_shapes_is_refused() -> None:
    session, turned = fake_session(), fake_session(fake_spec(tail_axis=1))
    with pytest.raises(SnapshotError, match=r"does not hold 0\.tail of shape \[2, 4\]"):
        session.restore(turned.snapshot())
    assert_same(session.read_state(), fake_session().read_state())


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
    with pytest.raises(NonFiniteError, match=r"output outputs holds NaN or infinite numbers on lanes \[1\]"):
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
    with pytest.raises(StreamError, match=r"lanes \[0\] stand inside a chunk"):
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
    with pytest.raises(StreamError, match=r"lanes \[1\] stand inside a chunk"):
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
    call = session._runtime.call
    failed: list[str] = []

    def fail_once(entry: str, inputs: Mapping[str, Array], state: State) -> tuple[Arrays, State]:
        if entry == "commit" and not failed:
            failed.append(entry)
            raise RunError("no memory")
        return call(entry, inputs, state)

    monkeypatch.setattr(session._runtime, "call", fail_once)
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
