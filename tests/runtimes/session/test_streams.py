"""Any split of a stream, on every backend, is the stream as PyTorch runs it in one piece.

Models of all kinds are exported once; hypothesis makes up what happens to the lanes of a session: pieces of any length,
lanes that rest, resets, snapshots inside a chunk and restores, on the same lane or another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nsm.errors import StreamError
from nsm.export.graphs.exporter import initial_arrays
from nsm.export.sources.torch import TorchSource
from nsm.export.verify.golden import record, synthetic
from nsm.runtimes.parity.budgets import find_budget
from nsm.runtimes.parity.comparison import compare
from nsm.spec import COUNT, OFFSET
from nsm.trace import Array
from tests.runtimes.fake import assert_same
from tests.runtimes.streams import (
    ADAPTIVE,
    CHUNK,
    DEFAULTS,
    LSTM,
    PLAIN,
    TOP_K,
    VARIANTS,
    Exporter,
    Opener,
    assert_close,
    lane_of,
    make_tokens,
    offline,
)

MASKED = (LSTM, ADAPTIVE, TOP_K)
TARGETS = ("onnx", "onnxruntime", "openvino")


def but_long(names: Iterable[str]) -> list[Any]:
    """All of them on all targets take minutes: those of which others show as much are left to the long tests."""
    return [pytest.param(name, marks=pytest.mark.slow if name in (LSTM, DEFAULTS) else ()) for name in names]


# What happens: (how many tokens the lanes are given, how many of them count on each lane as a share), or to a lane.
FEEDS = st.tuples(
    st.integers(1, 5 * CHUNK), st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]), min_size=3, max_size=3)
)
TURNS = st.tuples(st.sampled_from(["reset", "snapshot", "restore"]), st.integers(0, 2))
EVENTS = st.lists(st.one_of(FEEDS, FEEDS, TURNS), min_size=4, max_size=9)


Event = tuple[Any, Any]


def check_streams(name: str, target: str, lanes: int | None, opener: Opener, events: list[Event], seed: int) -> None:
    """What the lanes of a session answer, and are left with, after all that happens to them."""
    exported, session = opener(name, target, lanes)
    model, lanes = exported.model, exported.spec.batch
    assert session.is_fresh()
    start = make_tokens(model, lanes, 1, 0)[:, :0]
    history = list(start)
    kept: tuple[bytes, Array] | None = None
    for turn, (what, argument) in enumerate([*events, (CHUNK + 3, [1.0] * 3)]):
        before = session.read_state()
        touched = set(range(lanes))
        if what == "reset":
            session.reset(argument % lanes)
            history[argument % lanes], touched = start[0], {argument % lanes}
        elif what == "snapshot":
            kept, touched = (session.snapshot(argument % lanes), history[argument % lanes]), set()
        elif what == "restore":
            if kept is None:
                continue
            session.restore(kept[0], argument % lanes)
            history[argument % lanes], touched = kept[1], {argument % lanes}
        else:
            tokens = make_tokens(model, lanes, what, 100 * seed + turn)
            valid = np.array([round(what * share) for share in argument[:lanes]])
            # Without `decode` a stream ends where a chunk does not become full.
            ended = (session.offsets > 0) & (valid > 0) & (not exported.spec.has("decode"))
            if ended.any():
                with pytest.raises(
                    StreamError, match=re.escape(f"on lanes {np.flatnonzero(ended).tolist()} are inside")
                ):
                    session.feed(tokens, valid)
                valid[ended] = 0
            outputs = session.feed(tokens, valid)["outputs"]
            touched = set(np.flatnonzero(valid).tolist())
            for lane in touched:
                history[lane] = np.concatenate([history[lane], tokens[lane, : valid[lane]]])
                wanted, _ = offline(model, history[lane])
                about = f"turn {turn}, lane {lane}, outputs"
                np.testing.assert_allclose(
                    outputs[lane, : valid[lane]], wanted[-valid[lane] :], rtol=1e-5, atol=1e-5, err_msg=about
                )
        after = session.read_state()
        for lane in range(lanes):
            if lane not in touched:
                assert_same(
                    {s.name: after[s.name][s.lane_index(lane)] for s in exported.spec.states},
                    {s.name: before[s.name][s.lane_index(lane)] for s in exported.spec.states},
                )
    for lane in range(lanes):
        assert_close(lane_of(session, lane), offline(model, history[lane])[1], f"lane {lane}")
        if OFFSET in exported.spec.state_names:
            assert session.offsets[lane] == len(history[lane]) % CHUNK


ALL_STREAMS = [
    pytest.param(
        name,
        target,
        marks=pytest.mark.slow if name in (LSTM, DEFAULTS) or (target == "onnx" and name != PLAIN) else (),
    )
    for name in VARIANTS
    for target in TARGETS
]


@pytest.mark.parametrize(("name", "target"), ALL_STREAMS)
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS, seed=st.integers(0, 99))
def test_any_split_is_the_stream_in_one_piece(
    name: str, target: str, opener: Opener, events: list[Event], seed: int
) -> None:
    check_streams(name, target, None, opener, events, seed)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lanes=st.sampled_from([1, 3]), events=EVENTS, seed=st.integers(0, 10_000))
def test_other_splits_at_every_run_are_the_stream_in_one_piece(
    name: str, target: str, opener: Opener, lanes: int, events: list[Event], seed: int
) -> None:
    check_streams(name, target, lanes, opener, events, seed)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", but_long(VARIANTS))
def test_reset_is_fresh_bit_by_bit(name: str, target: str, opener: Opener) -> None:
    exported, session = opener(name, target)
    fresh = exported.open(target)
    tokens = make_tokens(exported.model, exported.spec.batch, 3 * CHUNK + 1, 1)
    session.feed(tokens[:, ::-1])
    session.reset()
    assert_same(session.read_state(), fresh.read_state())
    assert_same(session.read_state(), initial_arrays(exported.model, exported.spec.batch))
    assert_same(session.feed(tokens), fresh.feed(tokens))
    assert_same(session.read_state(), fresh.read_state())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", but_long(MASKED))
def test_slots_that_begin_masked_may_hold_anything(name: str, target: str, opener: Opener) -> None:
    exported, session = opener(name, target)
    tokens = make_tokens(exported.model, exported.spec.batch, 9 * CHUNK + 2, 2)
    results = []
    for poison in (0.0, 1e30, -1e30):
        state = initial_arrays(exported.model, exported.spec.batch)
        poisoned = 0
        for key, mask in state.items():
            layer, _, role = key.partition(".")
            for slotted in (f"{layer}.bank", f"{layer}.cell"):
                if role == "mask" and slotted in state:
                    np.moveaxis(state[slotted], 2, 1)[~mask] = poison
                    poisoned += int((~mask).sum())
        assert poisoned
        session.load_state(state)
        pieces = np.split(tokens, [CHUNK + 1, 5 * CHUNK], 1)
        outputs = [session.feed(piece)["outputs"] for piece in pieces]
        after = session.read_state()
        for key, mask in after.items():
            if key.endswith(".mask"):
                for slotted in (key.replace("mask", "bank"), key.replace("mask", "cell")):
                    if slotted in after:
                        np.moveaxis(after[slotted], 2, 1)[~mask] = 0
        results.append({**after, "outputs": np.concatenate(outputs, 1)})
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


# -- a model without chunks -------------------------------------------------------------------------------------------


def test_the_cache_of_a_transformer_is_written_in_place(exporter: Exporter) -> None:
    spec = exporter(PLAIN).spec
    assert [entry.name for entry in spec.entries] == ["step", "decode"]
    assert {state.name for state in spec.states if state.append_axis is not None} == {"0.key", "0.value"}
    assert COUNT in spec.state_names


@pytest.mark.parametrize("target", TARGETS)
def test_a_model_without_chunks_passes_the_comparison(target: str, opener: Opener) -> None:
    exported, session = opener(PLAIN, target)
    source = TorchSource.of(exported.model)
    trace = record(source, synthetic(source, 4, 80), steps=20, origin="synthetic")
    report = compare(trace, session, find_budget("fp32"))
    report.require()
    assert report.split is not None
    assert report.free_run.p99 > 0


@pytest.mark.parametrize("target", TARGETS)
def test_a_lane_without_chunks_may_be_stepped_from_anywhere(target: str, opener: Opener) -> None:
    exported, session = opener(PLAIN, target)
    tokens = make_tokens(exported.model, 3, 2 * CHUNK, 3)
    first = session.step(tokens[:, :CHUNK], [CHUNK, 3, 0])["outputs"]
    second = session.step(tokens[:, CHUNK:], [CHUNK] * 3)["outputs"]
    for lane, count in enumerate((CHUNK, 3, 0)):
        history = np.concatenate([tokens[lane, :count], tokens[lane, CHUNK:]])
        wanted, state = offline(exported.model, history)
        np.testing.assert_allclose(first[lane, :count], wanted[:count], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(second[lane], wanted[count:], rtol=1e-5, atol=1e-5)
        assert_close(lane_of(session, lane), state, f"lane {lane}")
