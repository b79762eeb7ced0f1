"""Tokens that a model does not take, on some lanes only: errors name these lanes, and the others can go on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nsm.bundle import Bundle
from nsm.errors import InputError, NonFiniteError
from nsm.runtimes.opening.artifacts import open_bundle
from nsm.runtimes.session.outputs import Outputs
from nsm.runtimes.session.session import Session
from nsm.trace import Array, Arrays
from tests.runtimes.fake import CHUNK, VOCABULARY, WIDTH, assert_same, fake_session, fake_spec
from tests.runtimes.sessions import ids, lane_of

CALLS: dict[str, tuple[str, int]] = {"step": ("step", CHUNK), "decode": ("decode", 1), "feed": ("feed", 2 * CHUNK + 3)}
calls = pytest.mark.parametrize(("name", "length"), CALLS.values(), ids=CALLS)

BAD: dict[str, tuple[bool, Any]] = {
    "nan": (True, np.nan),
    "infinite": (True, -np.inf),
    "infinite in float32": (True, 1e39),
    "negative id": (False, -1),
    "large id": (False, VOCABULARY),
}
bad = pytest.mark.parametrize(("vectors", "value"), BAD.values(), ids=BAD)


def made(vectors: bool, lanes: int, length: int) -> tuple[Session, Array]:
    """A session in the middle of streams that are at a chunk's beginning, and tokens for all of its lanes."""
    session = fake_session(fake_spec(lanes, vectors=vectors))
    random = np.random.default_rng(0)
    shape = (lanes, length)
    tokens = random.standard_normal((*shape, WIDTH)) if vectors else random.integers(0, VOCABULARY, shape)
    session.feed(tokens[:, :1].repeat(CHUNK, 1))
    return session, tokens


@calls
@bad
def test_an_error_names_the_lanes_whose_tokens_it_refuses(name: str, length: int, vectors: bool, value: Any) -> None:
    session, tokens = made(vectors, 4, length)
    tokens[[1, 3], -1] = value
    before = session.read_state()
    with pytest.raises(InputError, match=r"on lanes \[1, 3\].*on_bad_lane=\"skip\"") as caught:
        getattr(session, name)(tokens)
    assert caught.value.lanes == (1, 3)
    assert_same(session.read_state(), before)


@calls
def test_an_error_about_the_whole_call_names_no_lanes(name: str, length: int) -> None:
    session, tokens = made(False, 2, length)
    for wrong in (tokens.astype(float), tokens[:1], "a"):
        with pytest.raises(InputError) as caught:
            getattr(session, name)(wrong)
        assert caught.value.lanes == ()
    with pytest.raises(InputError, match="valid must lie in") as caught:
        getattr(session, name)(tokens, [length, -1])
    assert caught.value.lanes == ()


@calls
@bad
def test_the_other_lanes_go_on_as_if_the_bad_ones_had_no_tokens(
    name: str, length: int, vectors: bool, value: Any
) -> None:
    session, tokens = made(vectors, 4, length)
    honest, _ = made(vectors, 4, length)
    wanted = getattr(honest, name)(tokens, [length, 0, length, 0])
    tokens[1, 0], tokens[3, -1] = value, value
    outputs = getattr(session, name)(tokens, on_bad_lane="skip")
    assert isinstance(outputs, Outputs)
    assert outputs.skipped == (1, 3)
    assert_same(session.read_state(), honest.read_state())
    assert session.offsets.tolist() == honest.offsets.tolist()
    for key, given in outputs.items():
        assert np.isnan(given[[1, 3]]).all(), "no number that could be taken for an answer"
        np.testing.assert_array_equal(given[[0, 2]], wanted[key][[0, 2]])


@calls
def test_nothing_is_skipped_where_all_is_well(name: str, length: int) -> None:
    session, tokens = made(True, 3, length)
    honest, _ = made(True, 3, length)
    tokens[2, -1] = np.nan  # which does not count
    valid = [length, 0, length - 1]
    outputs = getattr(session, name)(tokens, valid, on_bad_lane="skip")
    assert outputs.skipped == ()
    assert_same(outputs, getattr(honest, name)(np.nan_to_num(tokens), valid))
    assert_same(session.read_state(), honest.read_state())


@calls
def test_a_call_with_bad_lanes_only_does_nothing(name: str, length: int) -> None:
    for spec in (fake_spec(2), fake_spec(1, valid=False), fake_spec(1, valid=False, entries=("step",))):
        if not spec.has(name) and name != "feed":
            continue
        session = fake_session(spec)
        rows = 2 * CHUNK if name == "feed" and not spec.has("decode") else length
        before = session.read_state()
        outputs = getattr(session, name)(np.full((spec.batch, rows), -1), on_bad_lane="skip")
        assert outputs.skipped == tuple(range(spec.batch))
        assert outputs["outputs"].shape == (spec.batch, rows, 5)
        assert np.isnan(outputs["outputs"]).all()
        assert_same(session.read_state(), before)


@calls
def test_lanes_that_cannot_rest_cannot_be_skipped(name: str, length: int) -> None:
    session = fake_session(fake_spec(2, valid=False))
    for tokens in (np.zeros((2, length), int), np.full((2, length), -1)):
        with pytest.raises(InputError, match="no input valid, so all 2 lanes"):
            getattr(session, name)(tokens, on_bad_lane="skip")


@calls
def test_an_unknown_choice_is_refused(name: str, length: int) -> None:
    session = fake_session()
    with pytest.raises(InputError, match=r"on_bad_lane is \"raise\" or \"skip\"; given 'ignore'"):
        getattr(session, name)(np.zeros((2, length), int), on_bad_lane="ignore")


def test_whole_numbers_of_lanes_that_were_skipped_are_zero() -> None:
    outputs = Outputs({"ids": np.ones((2, 3), np.int64), "logits": np.ones((2, 3), np.float16)}).skip([0])
    assert outputs["ids"].tolist() == [[0, 0, 0], [1, 1, 1]]
    assert np.isnan(outputs["logits"]).tolist() == [[True] * 3, [False] * 3]


def test_a_lane_is_skipped_on_every_target(bundle: Bundle, target: str) -> None:
    with open_bundle(bundle, target) as session:
        tokens, length = ids(session, 3), session.spec.chunk_size
        spoilt = tokens[1].copy()
        spoilt[1, 2] = -5
        given: list[Arrays] = []
        for skipping in (True, False):
            session.reset()
            session.step(tokens[0])
            before = lane_of(session.read_state(), 1)
            if skipping:
                given.append(session.step(spoilt, on_bad_lane="skip"))
            else:
                given.append(session.step(tokens[1], [length, 0]))
            assert_same(lane_of(session.read_state(), 1), before)
            given.append(session.step(tokens[2]))
        assert_same(lane_of(given[0], 0), lane_of(given[2], 0))
        assert np.isnan(given[0]["outputs"][1]).all()
        assert_same(given[1], given[3])


def test_an_error_about_nan_names_all_lanes_and_where_it_was_found_first() -> None:
    def spoil(at: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
        outputs["outputs"][2, 0] = np.nan
        state["0.tail"][[0, 2]] = np.inf

    session = fake_session(fake_spec(4), after=spoil)
    message = r"The output outputs contains NaN .*on lanes \[2\].* on lanes \[0\].*Reset them"
    with pytest.raises(NonFiniteError, match=message) as caught:
        session.step(ids(session), [CHUNK, 0, CHUNK, CHUNK])
    assert caught.value.lanes == (0, 2)
    with pytest.raises(NonFiniteError, match=r"The state 0\.tail contains NaN .* lanes \[0, 2\]") as caught:
        session.snapshot()
    assert caught.value.lanes == (0, 2)
    for lane in caught.value.lanes:
        session.reset(lane)
    session.snapshot()


def test_lanes_inside_a_chunk_are_named_too() -> None:
    session = fake_session(fake_spec(3))
    session.step(ids(session), [CHUNK, 1, 2])
    with pytest.raises(InputError, match="inside a chunk") as caught:
        session.step(ids(session))
    assert caught.value.lanes == (1, 2)
