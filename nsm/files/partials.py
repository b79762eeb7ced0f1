"""Temporary files and folders beside the place that they are for, each locked by the process that made it.

    .NAME.RANDOM.partial     a new NAME that is being written
    .NAME.RANDOM.replaced    an older NAME that is on its way out, see `nsm.staging`

A lock ends with its process, however that ends, and with the machine. So a temporary that can be locked is abandoned,
and the next command that writes NAME removes it. On a file system without locks it stays.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Kind = Literal["partial", "replaced"]


@contextlib.contextmanager
def partial(place: Path, folder: bool = False) -> Iterator[Path]:
    """A new file or folder, to be renamed to `place`; removed at the end if it was not. Abandoned ones go first.

    Raises:
        OSError: it cannot be made.
    """
    with abandoned(place, "partial") as found:
        for path in found:
            _remove(path)
    while True:
        path = place.with_name(f".{place.name}.{secrets.token_hex(6)}.partial")
        try:  # named first: a signal may come at any moment
            _make(path, folder)
            with locked(path, wait=True):
                if path.exists():  # else another process took it for abandoned before it was locked
                    yield path
                    return
        finally:
            _remove(path)


def replaced_name(place: Path, stage: Path) -> Path:
    """The temporary name of an older `place` while `stage` replaces it."""
    return place.with_name(f".{place.name}.{stage.name.split('.')[-2]}.replaced")


@contextlib.contextmanager
def abandoned(place: Path, kind: Kind) -> Iterator[list[Path]]:
    """The temporaries of `place` that no process holds, the newest first; they are locked within the block."""
    pattern = re.compile(rf"\.{re.escape(place.name)}\.\w+\.{kind}")
    try:
        names = [entry.name for entry in os.scandir(place.parent) if pattern.fullmatch(entry.name)]
    except OSError:  # there is no such folder, or it cannot be read
        names = []
    with contextlib.ExitStack() as stack:
        free = [path for path in map(place.with_name, names) if stack.enter_context(locked(path))]
        yield sorted((path for path in free if path.exists()), key=lambda path: -path.stat().st_mtime)


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Lock a file or folder, but none behind a link; gives whether that was possible. `wait`: until it is free."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        yield _lock(handle, wait)
    finally:
        os.close(handle)


def _lock(handle: int, wait: bool) -> bool:
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):  # another process holds it; or there are no locks here
        return False
    return True


def _make(path: Path, folder: bool) -> None:
    """Make it for this user alone, and new."""
    if folder:
        os.mkdir(path, 0o700)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
