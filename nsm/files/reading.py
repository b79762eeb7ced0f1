"""Reads files that may come from anybody: regular files only, and no more bytes than a reader of that kind takes."""

from __future__ import annotations

import errno
import io
import math
import os
import stat
import zipfile
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["json", "torch", "program", "onnx", "arrays", "text"]

LIMITS = MappingProxyType(
    {
        "json": 64 << 20,  # a manifest has some ten thousand bytes; parsed, they take many times as much
        "torch": 4 << 30,  # .pt and .pt2: the weights of a graph, which `onnx` bounds, and sequences
        "onnx": (2 << 30) - (16 << 20),  # one protobuf message; and the weights beside it, all together
        "program": 256 << 20,  # JSON in a .pt2
        "arrays": 4 << 30,  # the user's .npy and .npz, uncompressed
        "tensor": 1 << 30,  # an input, output or state of a call
        "text": 256 << 20,  # each byte becomes an id of eight
    }
)
"""Bytes of the largest file of a kind that is read. Sparse files have any size and take no room on a disk."""

LARGEST_TABLE = 16 << 20
"""Bytes of the table of contents of an archive: some hundred thousand members."""


def open_regular(path: Path, kind: Kind) -> io.BufferedReader:
    """Open a file for reading, if it is a regular one within its limit.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe or a device, which may wait for ever or have no end.
        ValueError: it is larger than `LIMITS` of its kind.
    """
    # A pipe that nobody writes into would wait to be opened.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check(os.fstat(handle), path, kind)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def check_regular(path: Path, kind: Kind) -> None:
    """Check a path as `open_regular` does, for readers that take a path."""
    _check(path.stat(), path, kind)


def regular_size(path: Path) -> int:
    """Bytes of a regular file, of any size.

    Raises:
        OSError: it is not there, or is no regular file.
    """
    found = path.stat()
    _check_kind(found, path)
    return found.st_size


def read_regular(path: Path, kind: Kind) -> bytes:
    """The bytes of a regular file; see `open_regular`."""
    with open_regular(path, kind) as file:
        return file.read()


def check_npy(file: IO[bytes], size: int, name: str) -> None:
    """Check the header of a .npy against the file's size, before memory is allocated.

    Args:
        file: at the beginning of the .npy; read up to the numbers.
        size: of the .npy, in bytes.
        name: for the message.

    Raises:
        ValueError: it declares another size, or has another format.
    """
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"{name} has the format {version}; expected 1.0 or 2.0")
    needed = file.tell() + math.prod(shape) * dtype.itemsize
    if needed != size and not dtype.hasobject:
        raise ValueError(f"{name} declares {list(shape)} of {dtype}, {needed:,} bytes, and has {size:,}")


def read_npy(path: Path) -> NDArray[Any]:
    """The array of a .npy file, never unpickling.

    Raises:
        OSError, ValueError: see `open_regular` and `check_npy`; or it holds Python objects.
        Exception: numpy's, for a file in another format.
    """
    with open_regular(path, "arrays") as file:
        check_npy(file, os.fstat(file.fileno()).st_size, "it")
        file.seek(0)
        found: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        return found


def open_zip(file: IO[bytes]) -> zipfile.ZipFile:
    """An archive in an open file, whose table of contents has at most `LARGEST_TABLE` bytes.

    Raises:
        ValueError: it has more; the members of a table take ten times its size.
        zipfile.BadZipFile: it is no archive.
    """
    return zipfile.ZipFile(_Bounded(file))


class _Bounded(io.BufferedIOBase):
    """A file of which no more than `LARGEST_TABLE` bytes are read at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell  # type: ignore[method-assign]

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:  # the rest: the end of an archive, which zipfile looks for in the last 64 KB
            size = 1 << 17
        if size > LARGEST_TABLE:
            raise ValueError(f"its table of contents has {size:,} bytes; at most {LARGEST_TABLE:,} are read")
        return self._file.read(size)

    def seekable(self) -> bool:
        return True


def _check(found: os.stat_result, path: Path, kind: Kind) -> None:
    _check_kind(found, path)
    if found.st_size > LIMITS[kind]:
        raise ValueError(f"it has {found.st_size:,} bytes; at most {LIMITS[kind]:,} are read")


def _check_kind(found: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
