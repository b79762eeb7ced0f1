"""Whatever a reader is given that is no regular file, or far too large, is refused at once and without memory."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import nsm
from nsm.bundle import Bundle
from nsm.errors import BundleDamagedError, CheckpointError, InputError
from nsm.export.options import ExportOptions
from nsm.export.pipeline import open_source
from nsm.export.sources.onnx.file.limits import load_weights
from nsm.export.sources.sequences import MOST_SEQUENCES, read_sequences
from nsm.export.sources.state_options import StateOption
from nsm.files.reading import (
    LARGEST_TABLE,
    LIMITS,
    check_npy,
    open_regular,
    open_zip,
    read_npy,
    read_regular,
    regular_size,
)
from nsm.manifest import MANIFEST
from nsm.trace import Trace, load_arrays

ENOUGH = 64 << 20
"""Bytes of Python's memory within which everything here is refused."""


def _in_bundle(path: Path) -> object:
    """The file is the manifest of a bundle."""
    path.rename(path.with_name(MANIFEST))
    return Bundle(path.parent)


def _source(path: Path) -> object:
    return open_source(path, ExportOptions(("onnx",), states=("h=1",) if path.suffix == ".pt2" else ()))


READERS: dict[str, tuple[str, Callable[[Path], object], type[Exception]]] = {
    "checkpoint": ("m.pt", nsm.load, CheckpointError),
    "checkpoint of an export": ("m.pt", _source, CheckpointError),
    "program": ("m.pt2", _source, CheckpointError),
    "graph": ("m.onnx", _source, InputError),
    "sequences": ("x.npy", read_sequences, InputError),
    "archive of sequences": ("x.npz", read_sequences, InputError),
    "text": ("x.txt", read_sequences, InputError),
    "initial state": ("h.npy", lambda path: StateOption("h", "1", str(path)).initial((1, 2), "float32"), InputError),
    "initial states of a bundle": (
        "h.npz",
        lambda path: StateOption("h", "1", str(path), key="h").initial((1, 2), "float32"),
        InputError,
    ),
    "golden trace": ("golden.npz", Trace.load, BundleDamagedError),
    "arrays": ("a.npz", load_arrays, BundleDamagedError),
    "manifest": ("m.json", _in_bundle, BundleDamagedError),
}


def refused(read: Callable[[Path], object], path: Path, error: type[Exception], message: str) -> None:
    """It is, in a thread that does not wait for ever, and without memory."""
    caught: list[BaseException] = []

    def attempt() -> None:
        try:
            read(path)
        except BaseException as problem:
            caught.append(problem)

    thread = threading.Thread(target=attempt, daemon=True)
    tracemalloc.start()
    try:
        thread.start()
        thread.join(20)
        assert not thread.is_alive(), f"{path} is waited for"
        assert tracemalloc.get_traced_memory()[1] < ENOUGH
    finally:
        tracemalloc.stop()
    assert len(caught) == 1
    assert type(caught[0]) is error, caught
    assert message in str(caught[0]), caught


@pytest.mark.parametrize(("name", "read", "error"), READERS.values(), ids=READERS)
def test_a_pipe_that_nobody_writes_into_is_not_waited_for(
    name: str, read: Callable[[Path], object], error: type[Exception], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / name)
    refused(read, tmp_path / name, error, "it is no regular file")


@pytest.mark.parametrize(("name", "read", "error"), READERS.values(), ids=READERS)
def test_a_device_without_end_is_not_read(
    name: str, read: Callable[[Path], object], error: type[Exception], tmp_path: Path
) -> None:
    (tmp_path / name).symlink_to("/dev/zero")
    refused(read, tmp_path / name, error, "outside the bundle" if name == "m.json" else "it is no regular file")


@pytest.mark.parametrize(("name", "read", "error"), READERS.values(), ids=READERS)
def test_a_sparse_file_of_any_size_is_not_read(
    name: str, read: Callable[[Path], object], error: type[Exception], tmp_path: Path
) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(10 << 30)
    refused(read, tmp_path / name, error, "it has 10,737,418,240 bytes; at most")


def test_a_pipe_for_the_weights_beside_a_graph_is_not_waited_for(tmp_path: Path) -> None:
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [4], np.zeros(4, np.float32).tobytes(), raw=True)
    onnx.external_data_helper.set_external_data(tensor, "w.bin")
    tensor.ClearField("raw_data")
    model = helper.make_model(helper.make_graph([], "g", [], [], [tensor]))
    os.mkfifo(tmp_path / "w.bin")
    refused(lambda path: load_weights(path, model), tmp_path / "m.onnx", InputError, "it is no regular file")


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1 << 40,), "<f8", "declares [1099511627776] of float64, 8,796,093,022,"),
        ((1 << 33, 1 << 33), "<i8", "declares [8589934592, 8589934592] of int64"),
        ((3,), "|S2000000000", "declares [3] of |S2000000000, 6,0"),
        ((0,), "<f8", "declares [0] of float64"),
    ],
)
def test_an_array_that_declares_what_is_not_there_costs_no_memory(
    shape: tuple[int, ...], dtype: str, message: str, tmp_path: Path
) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    (tmp_path / "x.npy").write_bytes(header.getvalue() + bytes(64))
    refused(read_sequences, tmp_path / "x.npy", InputError, message)


def test_an_array_without_numbers_has_no_rows(tmp_path: Path) -> None:
    """It may have any number of them."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40, 0)})
    (tmp_path / "x.npy").write_bytes(header.getvalue())
    refused(read_sequences, tmp_path / "x.npy", InputError, "holds no sequence")


def test_more_sequences_than_anybody_has_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((MOST_SEQUENCES + 1, 1), np.uint8))
    refused(read_sequences, tmp_path / "x.npy", InputError, "holds more than 1,048,576 sequences")


def test_an_archive_with_too_large_a_table_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for index in range(3):
            member = zipfile.ZipInfo(f"{index}.npy")
            archive.writestr(member, b"")
    data = bytearray((tmp_path / "x.npz").read_bytes())
    end = data.rindex(b"PK\x05\x06")
    table = bytes(LARGEST_TABLE)
    data[end + 12 : end + 16] = (len(table) + end - data.index(b"PK\x01\x02")).to_bytes(4, "little")
    (tmp_path / "x.npz").write_bytes(data[:end] + table + data[end:])
    with (tmp_path / "x.npz").open("rb") as file, pytest.raises(ValueError, match=r"contents has 16,777,\d+ bytes; at"):
        open_zip(file)
    with pytest.raises(InputError, match="its table of contents"):
        read_sequences(tmp_path / "x.npz")


def test_what_is_regular_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"content")
    assert read_regular(path, "text") == b"content"
    assert regular_size(path) == 7
    link = tmp_path / "link"
    link.symlink_to(path)
    with open_regular(link, "json") as file:
        assert file.read() == b"content"
    with pytest.raises(IsADirectoryError if sys.platform == "win32" else OSError, match="no regular file"):
        read_regular(tmp_path, "text")
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "absent", "text")
    with pytest.raises(OSError, match="no regular file"):
        regular_size(Path(os.devnull))


@pytest.mark.parametrize(
    "array",
    [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.float32(3), np.zeros((0, 2))],
    ids=["plain", "turned", "scalar", "none"],
)
def test_an_array_is_read_as_numpy_reads_it(array: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(read_npy(tmp_path / "a.npy"), np.asarray(array), strict=True)


def test_an_unknown_format_of_numpy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"it has the format \(3, 0\)"):
        check_npy(io.BytesIO(b"\x93NUMPY\x03\x00"), 8, "it")


def test_a_sparse_archive_of_weights_is_refused_before_they_are_read(tmp_path: Path) -> None:
    """Its table is true: two gigabytes of zeros, of which none lies on the disk."""
    path = tmp_path / "m.pt2"
    size = LIMITS["onnx"] + 1
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/models/model.json", "{}")
        member = zipfile.ZipInfo("m/data/weights/weight_0")
        member.header_offset = archive.fp.tell()  # type: ignore[union-attr]
        member.file_size, member.compress_size, member.CRC = size, size, 0
        archive.fp.write(member.FileHeader(zip64=True))  # type: ignore[union-attr]
        archive.fp.seek(size, os.SEEK_CUR)  # type: ignore[union-attr]
        archive.start_dir = archive.fp.tell()  # type: ignore[union-attr]
        archive.filelist.append(member)
        archive._didModify = True  # type: ignore[attr-defined]
    assert path.stat().st_size > size
    assert path.stat().st_blocks * 512 < 1 << 20
    refused(_source, path, CheckpointError, "its weights have 2,130,706,433 bytes, and a graph holds at most")


def test_the_command_ends_at_once(tmp_path: Path) -> None:
    """In a process of its own, as a user starts it."""
    os.mkfifo(tmp_path / "m.onnx")
    command = [sys.executable, "-m", "nsm.export", str(tmp_path / "m.onnx"), "-t", "onnx"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "it is no regular file" in done.stderr
