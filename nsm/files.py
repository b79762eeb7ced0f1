"""Writing a file whole or not at all, and the names of what is replaced."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from nsm.errors import InputError


def settled(path: Path) -> Path:
    """`path`, made absolute where it would mean nothing once what lies there is replaced: `.` and `..` are no names
    that anything could take, and what is relative to a folder is lost with it.
    """
    try:
        real = Path(os.path.realpath(path))
        inside = Path.cwd().is_relative_to(real)
    except FileNotFoundError:  # the current directory is gone
        return path
    return real if inside or path.name in ("", "..") else path


def followed(path: Path) -> Path:
    """Where `path` leads if it is a link, there already or not; else `path`. What is replaced is that, not the link.

    Raises:
        InputError: it is a link that leads back to itself.
    """
    if not path.is_symlink():
        return path
    real = Path(os.path.realpath(path))
    if real.is_symlink():
        raise InputError(f"{path} is a link that leads back to itself. Remove it, or give another name.")
    return real


def new_mode(executable: bool = False) -> int:
    """The permissions that this process gives to new files, or to new folders and programs."""
    mask = os.umask(0o077)  # there is no way to read it alone; meanwhile what others make is private
    os.umask(mask)
    return (0o777 if executable else 0o666) & ~mask


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path`, open for writing, that takes its place when the block ends well and is gone otherwise.

    A link stays, and what it leads to is replaced. The new file has the permissions of the old one. What is there and
    is no regular file, /dev/stdout or a pipe say, is written to as it is.

    Raises:
        InputError: the folder is not there, or may not be written to; or `path` is a folder itself.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; expected is the name of a file. Give one in it, or another.")
    try:
        place = followed(path)
        straight = _opened(path)
        if straight is None:
            mode = path.stat().st_mode & 0o777 if path.exists() else new_mode()
            handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}. Make the folder first, or take another.") from error
    if straight is not None:
        with straight:
            yield straight
        return
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        Path(temporary).chmod(mode)
        os.replace(temporary, place)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _opened(path: Path) -> IO[bytes] | None:
    """`path` open for writing where it cannot be replaced: it is no regular file, or the one that stdout goes to."""
    if not path.exists():
        return None
    if not path.is_file():
        return path.open("wb")
    for stream in (1, 2):
        with contextlib.suppress(OSError):  # it is closed
            if os.path.samestat(path.stat(), os.fstat(stream)):
                return os.fdopen(os.dup(stream), "wb")
    return None
