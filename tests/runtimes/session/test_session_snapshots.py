"""Snapshots of a session: whole, of this model, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nsm.bundle import Bundle
from nsm.errors import SnapshotError
from nsm.runtimes.opening.artifacts import open_bundle
from nsm.runtimes.parity.metrics import relative_error
from nsm.runtimes.session.session import Session
from tests.runtimes.fake import (
    assert_same,
    fake_session,
    fake_spec,
)
from tests.runtimes.sessions import answers, ids, lane_of

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


@pytest.mark.parametrize("kind", [bytearray, memoryview, lambda data: np.frombuffer(data, np.uint8)])
def test_a_snapshot_is_taken_from_any_memory(kind: Callable[[bytes], Any]) -> None:
    session = fake_session()
    session.step(ids(session))
    whole, lane, state = session.snapshot(), session.snapshot(1), session.read_state()
    session.reset()
    session.restore(kind(whole))
    assert_same(session.read_state(), state)
    session.restore(kind(lane), 0)
    assert_same(lane_of(session.read_state(), 0), lane_of(state, 1))
    with pytest.raises(SnapshotError, match="damaged: the hash does not fit"):
        session.restore(kind(whole[:-1]))


@pytest.mark.parametrize("given", ["abc", None, 3, Path("kept.bin"), [1, 2]], ids=lambda given: type(given).__name__)
def test_what_is_no_bytes_is_no_snapshot(given: Any) -> None:
    session = fake_session()
    for lane in (None, 0):
        with pytest.raises(
            SnapshotError,
            match=rf"A snapshot is bytes; given a {type(given).__name__}.*Session\.snapshot\(\) returned",
        ):
            session.restore(given, lane)
    released = memoryview(session.snapshot())
    released.release()
    with pytest.raises(SnapshotError, match=r"given a memoryview.*released"):
        session.restore(released)


@pytest.mark.parametrize("version", [1, 3, 12])
def test_a_snapshot_of_another_version_says_so(version: int) -> None:
    session = fake_session()
    snapshot, before = session.snapshot(), session.read_state()
    other = snapshot.replace(b"nsm-snapshot 2\n", b"nsm-snapshot %d\n" % version, 1)
    assert other != snapshot
    with pytest.raises(SnapshotError, match=f"has the format version {version}, and this nsm reads version 2"):
        session.restore(other)
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
