"""Files that were made to do harm: they are refused before they cost memory, and with a message that says why."""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nsm
from nsm.bundle import CALIBRATION, GOLDEN, STATE_INIT, Bundle
from nsm.errors import BundleDamagedError, CheckpointError, SnapshotError
from nsm.files.reading import LIMITS
from nsm.manifest import MANIFEST
from nsm.runtimes.opening.artifacts import open_artifact
from nsm.runtimes.session.snapshots import Snapshot, pack, unpack
from nsm.staging import write_manifest
from nsm.trace import Trace, load_arrays

TERABYTES = 1 << 42
ENOUGH = 32 << 20
"""Bytes of Python's memory within which everything here is refused."""


def header(shape: tuple[int, ...], dtype: str = "<f8", version: tuple[int, int] = (1, 0)) -> bytes:
    """The beginning of a .npy that declares such an array."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", len(text)) + text


def archive(contents: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in contents.items():
            file.writestr(name, content)
    return buffer.getvalue()


def many_names_for_one_member() -> bytes:
    """An archive whose directory names the same megabyte a thousand times."""
    data = archive({"a.npy": header((131_072,)) + bytes(1 << 20)})
    end = data.rindex(b"PK\x05\x06")
    start = struct.unpack("<I", data[end + 16 : end + 20])[0]
    directory = data[start:end] * 1000
    counts = struct.pack("<HHII", 1000, 1000, len(directory), start)
    return data[:start] + directory + data[end : end + 8] + counts + data[end + 20 :]


def lying_directory() -> bytes:
    """An archive whose directory declares three gigabytes for a member of a few bytes."""
    data = bytearray(archive({"a.npy": header((1,)) + bytes(8)}))
    place = data.rindex(b"PK\x01\x02") + 20
    data[place : place + 8] = struct.pack("<II", 3 << 30, 3 << 30)
    return bytes(data)


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "terabytes declared": (lambda: archive({"a.npy": header((TERABYTES,)) + bytes(64)}), r"declares \[4398046511104\]"),
    "terabytes in two sizes": (
        lambda: archive({"a.npy": header((1 << 21, 1 << 21)) + bytes(64)}),
        r"declares \[2097152, 2097152\] of float64, 35,184,372,",
    ),
    "a wide element": (lambda: archive({"a.npy": header((2,), "|S2000000000") + bytes(64)}), r"of \|S2000000000, 4,0"),
    "more than fits in 64 bits": (lambda: archive({"a.npy": header((1 << 62, 1 << 62))}), "of float64"),
    "of the later format": (lambda: archive({"a.npy": header((TERABYTES,), version=(2, 0))}), "of float64"),
    "of an unknown format": (lambda: archive({"a.npy": header((1,), version=(3, 0))}), r"format \(3, 0\)"),
    "less than it has": (lambda: archive({"a.npy": header((1,)) + bytes(64)}), "and has"),
    "zeros that unpack": (
        lambda: archive({"a.npy": header((1 << 23,)) + bytes(1 << 26)}, zipfile.ZIP_DEFLATED),
        r"a\.npy in it is compressed",
    ),
    "one member by a thousand names": (many_names_for_one_member, "declares 1,0"),
    "a directory that lies": (lying_directory, r"declares 3,221,225,472 bytes; expected at most \d+"),
    "a very long header": (lambda: archive({"a.npy": header((1,) * 200_000, version=(2, 0))}), "cannot be read"),
    "no array": (lambda: archive({"a.txt": b"text" * 100}), "cannot be read"),
}


@pytest.mark.parametrize(("make", "message"), BOMBS.values(), ids=BOMBS)
def test_an_archive_that_declares_more_than_it_holds_costs_no_memory(
    make: Callable[[], bytes], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "golden.npz"
    path.write_bytes(make())
    for load in (load_arrays, Trace.load):
        tracemalloc.start()
        try:
            with pytest.raises(BundleDamagedError, match=message) as caught:
                load(path)
            assert tracemalloc.get_traced_memory()[1] < ENOUGH
        finally:
            tracemalloc.stop()
        assert "cannot be read as an archive of arrays" in str(caught.value)
        assert caught.value.exit_code == 6


def test_what_numpy_writes_is_read_as_numpy_reads_it(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {
        "plain": np.arange(6.0).reshape(2, 3),
        "none": np.zeros((0, 3), np.int64),
        "scalar": np.float32(3),
        "text": np.array("text"),
        "turned": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "strided": np.arange(12)[::2],
        "a/b.c": np.array([True, False]),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    found = load_arrays(tmp_path / "a.npz")
    assert set(found) == set(arrays)
    for name, value in arrays.items():
        np.testing.assert_array_equal(found[name], value, strict=True)


def test_damage_inside_an_array_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, a=np.ones(100))
    data = path.read_bytes()
    path.write_bytes(data.replace(np.ones(1).tobytes(), np.zeros(1).tobytes(), 1))
    with pytest.raises(BundleDamagedError, match="Bad CRC-32"):
        load_arrays(path)


@pytest.mark.parametrize("name", [STATE_INIT, GOLDEN])
def test_a_bomb_with_records_that_fit_is_refused(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).write_bytes(archive({"a.npy": header((TERABYTES,)) + bytes(64)}))
    write_manifest(bundle_copy, Bundle(bundle_copy).manifest)
    bundle = Bundle(bundle_copy)
    bundle.verify()
    with pytest.raises(BundleDamagedError, match=rf"{name} cannot be read.*declares"):
        bundle.state_init() if name == STATE_INIT else bundle.trace()


# -- the manifest against what lies there --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (2, TERABYTES, 4)}, r"the manifest has \[2, 4398046511104, 4\] of"),
        ({"shape": (2, 1)}, r"the manifest has \[2, 1\] of"),
        ({"dtype": "float64"}, "of float64"),
        ({"name": "9.unknown"}, r"holds nothing for 9\.unknown"),
    ],
    ids=["absurd", "small", "dtype", "name"],
)
def test_states_that_are_not_those_of_the_spec_are_refused_before_a_backend_takes_memory(
    bundle_copy: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Bundle(bundle_copy).manifest
    (bank,) = manifest.spec.states_of(("0.bank",))
    changed = replace(bank, **changes)
    states = tuple(changed if state is bank else state for state in manifest.spec.states)
    names = {bank.name: changed.name}
    entries = tuple(
        replace(e, reads=tuple(names.get(n, n) for n in e.reads), writes=tuple(names.get(n, n) for n in e.writes))
        for e in manifest.spec.entries
    )
    spec = replace(manifest.spec, states=states, entries=entries)
    write_manifest(bundle_copy, replace(manifest, spec=spec))

    def loaded(*_: object) -> None:
        raise AssertionError("the backend was loaded")

    monkeypatch.setattr("nsm.runtimes.backends.onnxruntime.load", loaded)
    bundle = Bundle(bundle_copy)
    with pytest.raises(BundleDamagedError, match=message) as caught:
        open_artifact(bundle, bundle.artifact("onnxruntime"))
    assert "edited by hand" in str(caught.value)


def test_json_of_absurd_size_is_not_parsed(bundle_copy: Path) -> None:
    manifest = Bundle(bundle_copy).manifest
    with (bundle_copy / CALIBRATION).open("wb") as file:
        file.truncate(LIMITS["json"] + 1)  # a hole: it takes no room on the disk
    write_manifest(bundle_copy, manifest)
    with pytest.raises(BundleDamagedError, match=r"calibration\.json cannot be read: it has 67,108,865 bytes; at most"):
        Bundle(bundle_copy).json(CALIBRATION)
    with (bundle_copy / MANIFEST).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BundleDamagedError, match=r"manifest\.json cannot be read: it has 1,099,511,627,776 bytes; at"):
        Bundle(bundle_copy)


def test_a_number_of_absurd_length_is_no_json(bundle_copy: Path) -> None:
    (bundle_copy / MANIFEST).write_text('{"format_version": ' + "9" * 100_000 + "}")
    with pytest.raises(BundleDamagedError, match="is not JSON"):
        Bundle(bundle_copy)


def test_a_recorded_size_of_absurd_length_is_damage(bundle_copy: Path) -> None:
    data = json.loads((bundle_copy / MANIFEST).read_text())
    (record,) = (item for item in data["files"] if item["path"] == GOLDEN)
    record["size"] = 1 << 70
    (bundle_copy / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleDamagedError, match=r"golden\.npz has \d+ bytes, recorded are 1180591620717411303424"):
        Bundle(bundle_copy).trace()


# -- snapshots -----------------------------------------------------------------------------------------------------

MAGIC = pack(Snapshot("f", None, {})).split(b"\n", 1)[0] + b"\n"


def forged(payload: bytes) -> bytes:
    """A snapshot with a hash that fits."""
    return MAGIC + hashlib.sha256(payload).digest() + payload


def saved(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(("make", "message"), BOMBS.values(), ids=BOMBS)
def test_a_forged_snapshot_costs_no_memory(make: Callable[[], bytes], message: str) -> None:
    snapshot = forged(make())
    tracemalloc.start()
    try:
        with pytest.raises(SnapshotError, match="not a snapshot, although their hash fits") as caught:
            unpack(snapshot, "f", None, {})
        assert tracemalloc.get_traced_memory()[1] < ENOUGH
    finally:
        tracemalloc.stop()
    assert message == "cannot be read" or re.search(message, str(caught.value))


# -- files of torch ------------------------------------------------------------------------------------------------


def packed(data: bytes) -> bytes:
    """An archive again, with its members compressed."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        return archive({name: old.read(name) for name in old.namelist()}, zipfile.ZIP_DEFLATED)


@pytest.fixture
def bomb(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """128 MB of zeros as torch would inflate them, in a thousandth of it; torch is not to be asked."""
    buffer = io.BytesIO()
    torch.save({"format": "nsm-checkpoint", "weights": torch.zeros(1 << 25)}, buffer)
    data = packed(buffer.getvalue())
    assert len(data) < 1 << 20
    assert len(torch.load(io.BytesIO(data), weights_only=True)["weights"]) == 1 << 25

    def loaded(*_: object, **_options: object) -> None:
        raise AssertionError("it was loaded")

    monkeypatch.setattr(torch, "load", loaded)
    return data


def test_a_checkpoint_that_unpacks_to_a_thousand_times_its_size_is_not_loaded(bomb: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(bomb)
    with pytest.raises(CheckpointError, match=r"was refused: \S+ in it is compressed; .*torch\.save .*by nsm\.save"):
        nsm.load(tmp_path / "model.pt")


def test_a_checkpoint_is_held_against_the_table_that_torch_reads(bomb: bytes, tmp_path: Path) -> None:
    """Python takes the table that lies before the end of an archive, torch the one whose place is written there."""
    end = bomb.rindex(b"PK\x05\x06")
    start = struct.unpack("<I", bomb[end + 16 : end + 20])[0]
    table, place = bytearray(bomb[start:end]), 0
    while place < len(table):  # a second table: nothing is compressed
        table[place + 10 : place + 12] = bytes(2)
        table[place + 24 : place + 28] = table[place + 20 : place + 24]
        place += 46 + sum(struct.unpack("<HHH", table[place + 28 : place + 34]))
    path = tmp_path / "model.pt"
    path.write_bytes(bomb[:end] + table + bomb[end:])
    with zipfile.ZipFile(path) as seen:
        assert all(member.file_size < 1 << 20 for member in seen.infolist())
    with pytest.raises(
        CheckpointError, match=r"was refused: what is in it declares 134,\d+,\d+ bytes; expected at most"
    ):
        nsm.load(path)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"rubbish",
        saved(a=np.zeros(3)),
        saved(header=np.array("{")),
        saved(header=np.array("[]")),
        saved(header=np.array("[" * 100_000)),
        saved(header=np.array(json.dumps({"fingerprint": "f"}))),
        saved(header=np.array([{}], dtype=object)),
    ],
    ids=["nothing", "rubbish", "no header", "cut", "a list", "deep", "no lanes", "a pickle"],
)
def test_a_forged_snapshot_that_is_none_is_refused(payload: bytes) -> None:
    with pytest.raises(SnapshotError, match="not a snapshot, although their hash fits"):
        unpack(forged(payload), "f", None, {})


def test_a_snapshot_comes_back_as_it_was_taken() -> None:
    states = {"0.bank": np.arange(6, dtype=np.float32).reshape(2, 3), "lane.offset": np.array([3])}
    found = unpack(pack(Snapshot("f", 2, states)), "f", 2, {name: value.shape for name, value in states.items()})
    assert set(found.arrays) == set(states)
    for name, value in states.items():
        np.testing.assert_array_equal(found.arrays[name], value, strict=True)
