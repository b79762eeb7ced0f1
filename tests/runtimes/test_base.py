from __future__ import annotations

from pathlib import Path

import pytest

from nsm.errors import BundleDamagedError, StreamError
from nsm.runtimes.base import Handles, Sides, State, Watched
from nsm.spec import COUNT, OFFSET
from tests.runtimes.fake import fake_spec


def sides_of(sides: Sides) -> dict[str, int]:
    return {name: sides[name] for name in fake_spec(ring=True).state_names}


def test_a_state_is_of_use_to_its_owner_while_it_lives() -> None:
    mine, other = Handles(), Handles()
    state = mine.new()
    mine.check(state)
    for stranger in (State(), other.new()):
        with pytest.raises(StreamError, match="belongs to another runtime"):
            mine.check(stranger)
    mine.new()
    with pytest.raises(StreamError, match="consumed by an earlier call"):
        mine.check(state)


def test_a_call_turns_over_the_states_that_its_entry_writes_and_no_other() -> None:
    spec = fake_spec(ring=True)
    sides = Sides(spec)
    handle = sides.reset()
    expected = dict.fromkeys(spec.state_names, 0)
    assert sides_of(sides) == expected
    for entry in ("step", "decode", "commit", "commit", "step", "decode", "decode"):
        handle = sides.flip(entry, handle)
        for name in spec.entry(entry).writes:
            expected[name] ^= name != "0.recent"
        assert sides_of(sides) == expected
    assert len({expected[name] for name in (COUNT, OFFSET, "0.bank", "0.written")}) == 2, "they came apart"


def test_a_state_that_no_entry_writes_and_one_that_is_appended_to_stay_where_they_are() -> None:
    sides = Sides(fake_spec(ring=True))
    handle = sides.reset()
    for entry in ("step", "decode", "commit") * 3:
        handle = sides.flip(entry, handle)
        assert (sides["0.mask"], sides["0.recent"]) == (0, 0)


def test_a_reset_brings_all_states_back() -> None:
    sides = Sides(fake_spec(ring=True))
    sides.flip("step", sides.reset())
    sides.reset()
    assert set(sides_of(sides).values()) == {0}


def test_only_the_last_handle_lives() -> None:
    sides = Sides(fake_spec())
    handles = [sides.reset()]
    for entry in ("step", "decode"):
        handles.append(sides.flip(entry, handles[-1]))
    handles.append(sides.reset())
    for consumed in handles[:-1]:
        with pytest.raises(StreamError, match="consumed by an earlier call"):
            sides.check(consumed)
    sides.check(handles[-1])


def test_watched_files_are_to_stay_and_what_is_no_file_is_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "step.onnx").write_bytes(b"graph")
    (tmp_path / ".#step.onnx").symlink_to("user@host.1234")
    (tmp_path / "folder").mkdir()
    watched = Watched(tmp_path)
    (tmp_path / "folder" / "more").touch()
    watched.check()
    (tmp_path / "step.onnx").unlink()
    with pytest.raises(BundleDamagedError, match="were replaced while the session was open"):
        watched.check()
