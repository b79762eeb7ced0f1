from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nsm.errors import BundleDamagedError
from nsm.trace import Trace, load_arrays
from tests.runtimes.fake import CHUNK, OUTPUTS, assert_same, fake_trace

GROUPS = ("inputs", "outputs", "before", "after", "decisions")


def test_a_trace_survives_the_disk(tmp_path: Path) -> None:
    decisions = {"0.mask": np.random.default_rng(0).random((2, 9, 3)) < 0.5}
    floors = {"one_step": {"outputs": 1.25e-7}, "free_run": {"outputs": 3e-7, "0.tail": math.inf}}
    trace = fake_trace(streams=2, steps=8)
    trace = replace(trace, source="recorded", conditioning=floors, fingerprint="abc", decisions=decisions)
    trace.save(tmp_path / "golden.npz")
    loaded = Trace.load(tmp_path / "golden.npz")
    for group in GROUPS:
        assert_same(getattr(loaded, group), getattr(trace, group))
    np.testing.assert_array_equal(loaded.positions, trace.positions)
    np.testing.assert_array_equal(loaded.sampled, trace.sampled)
    assert (loaded.fingerprint, loaded.source, loaded.conditioning) == ("abc", "recorded", floors)


def test_a_trace_knows_its_size() -> None:
    trace = fake_trace(streams=3, steps=8)
    fewer = replace(trace, before={name: value[:2] for name, value in trace.before.items()})
    assert (fewer.streams, fewer.steps, fewer.state_streams) == (3, 8, 2)


def test_a_trace_without_decisions_is_read_without_them(tmp_path: Path) -> None:
    fake_trace(streams=1, steps=2).save(tmp_path / "golden.npz")
    assert Trace.load(tmp_path / "golden.npz").decisions == {}


@pytest.mark.parametrize("steps", [1, 3, 8, 100])
def test_the_first_steps_are_a_trace_of_their_own(steps: int) -> None:
    whole = np.arange(2 * 9 * 3).reshape(2, 9, 3)
    trace = replace(fake_trace(streams=2, steps=8), decisions={"0.importance": whole})
    cut = trace.first(steps)
    np.testing.assert_array_equal(cut.decisions["0.importance"], whole[:, : min(steps, 8) + 1])
    assert cut.steps == min(steps, 8)
    assert cut.sampled.tolist() == [step for step in trace.sampled.tolist() if step < steps]
    assert cut.outputs["outputs"].shape == (2, min(steps, 8), CHUNK, OUTPUTS)
    for group in ("before", "after"):
        for name, value in getattr(cut, group).items():
            np.testing.assert_array_equal(value, getattr(trace, group)[name][:, : len(cut.sampled)])
    assert (cut.fingerprint, cut.source, cut.conditioning) == (trace.fingerprint, trace.source, trace.conditioning)
    np.testing.assert_array_equal(cut.positions, trace.positions)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleDamagedError, match=r"golden\.npz cannot be read as an archive of arrays"):
        Trace.load(tmp_path / "golden.npz")
    with pytest.raises(BundleDamagedError, match="cannot be read as an archive of arrays"):
        load_arrays(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"nothing of the kind", b"PK\x03\x04" + bytes(64)], ids=["empty", "short", "text", "zip"]
)
def test_a_file_that_is_no_archive_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    path.write_bytes(content)
    with pytest.raises(BundleDamagedError, match=r"golden\.npz cannot be read as an archive of arrays.*Export"):
        Trace.load(path)


def test_a_single_array_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(BundleDamagedError, match="cannot be read as an archive of arrays"):
        load_arrays(path)


class Trap:
    sprung = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (Trap.spring, ())

    @staticmethod
    def spring() -> None:
        Trap.sprung = True


def test_a_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap()))
    assert Trap.sprung
    Trap.sprung = False
    path = tmp_path / "golden.npz"
    contents = np.empty(1, object)
    contents[0] = Trap()
    np.savez(path, contents)
    with pytest.raises(BundleDamagedError, match="cannot be read"):
        load_arrays(path)
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(BundleDamagedError, match="cannot be read"):
        load_arrays(path)
    assert not Trap.sprung


WRONG: dict[str, dict[str, object]] = {
    "no meta": {"meta": None},
    "meta no JSON": {"meta": "{"},
    "meta a number": {"meta": "3"},
    "meta a list": {"meta": "[]"},
    "no fingerprint": {"meta": json.dumps({"source": "recorded", "floor": 0.0})},
    "no floor": {"meta": json.dumps({"fingerprint": "f", "source": "recorded"})},
    "floor a word": {"meta": json.dumps({"fingerprint": "f", "source": "recorded", "floor": "low"})},
    "floor a list": {"meta": json.dumps({"fingerprint": "f", "source": "recorded", "floor": []})},
    "no positions": {"positions": None},
    "no sampled": {"sampled": None},
    "another group": {"weights/0": np.zeros(3)},
    "no inputs": {"inputs/tokens": None, "inputs/valid": None},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_an_archive_that_is_no_trace_is_refused(changes: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    fake_trace(streams=1, steps=2).save(path)
    arrays: dict[str, Any] = {**load_arrays(path), **changes}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    with pytest.raises(BundleDamagedError, match=r"golden\.npz is not a golden trace"):
        Trace.load(path)


def test_a_flipped_bit_gives_a_trace_or_a_clean_refusal_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    fake_trace(streams=1, steps=1).save(path)
    data = path.read_bytes()
    refused, loaded = 0, 0
    for index in range(0, len(data), 5):
        for bit in (1, 8, 128):
            damaged = bytearray(data)
            damaged[index] ^= bit
            path.write_bytes(bytes(damaged))
            try:
                Trace.load(path)
            except BundleDamagedError:
                refused += 1
            else:
                loaded += 1
    assert refused > loaded > 0
    path.write_bytes(data)
    assert Trace.load(path).steps == 1
