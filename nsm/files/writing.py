"""Write files atomically, and check archives that may be hostile."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from nsm.errors import BundleDamagedError, InputError, OutputExistsError
from nsm.files.partials import partial
from nsm.files.reading import read_regular


def settled(path: Path) -> Path:
    """Resolve `.` and `..` so that the path survives the rename.

    A path in or above the current directory is resolved as well: it would be lost with that directory.
    """
    try:
        real = Path(os.path.realpath(path))
        inside = Path.cwd().is_relative_to(real)
    except FileNotFoundError:  # the current directory is gone
        return path
    return real if inside or path.name in ("", "..") else path


def followed(path: Path) -> Path:
    """The target of `path` if it is a link, existing or not; else `path`. The target is replaced, not the link.

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
    mask = os.umask(0o077)  # the mask cannot be read without setting it; files made meanwhile are private
    os.umask(mask)
    return (0o777 if executable else 0o666) & ~mask


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path`, open for writing, that takes its place when the block ends well and is gone otherwise.

    The target of a link is replaced, not the link. The new file has the permissions of the old one. An existing path
    that is not a regular file, such as /dev/stdout or a pipe, is written to directly.

    Raises:
        InputError: the folder is not there, or may not be written to; or `path` is a folder itself.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; expected the name of a file. Give one in it, or another.")
    with contextlib.ExitStack() as stack:
        try:
            place = followed(path)
            straight = _opened(path)
            if straight is None:
                mode = path.stat().st_mode & 0o777 if path.exists() else new_mode()
                temporary = stack.enter_context(partial(place))
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error}. Make the folder first, or take another.") from error
        if straight is not None:
            yield stack.enter_context(straight)
            return
        with os.fdopen(os.open(temporary, os.O_WRONLY), "wb") as file:
            yield file
        temporary.chmod(mode)
        os.replace(temporary, place)


def check_output_file(
    path: Path, what: str = "", is_one: Callable[[IO[bytes]], bool] | None = None, force: bool = True
) -> None:
    """Raise `OutputExistsError` where writing `path` would lose a file that nsm did not write.

    An empty file, a pipe and the target of stdout may always be written.

    Args:
        path: of the file to write.
        what: the kind of file, with its article, for the message.
        is_one: whether an open file is of that kind, and may be replaced; None replaces none.
        force: whether one may be replaced at all.
    """
    if not path.is_file() or not path.stat().st_size or _stream(path) is not None:
        return
    if is_one is None:
        raise OutputExistsError(f"{path} exists. Move it away, or take another name.")
    with path.open("rb") as file:
        if not is_one(file):
            raise OutputExistsError(
                f"{path} exists and is not {what}, so it is not replaced. Move it away, or take another name."
            )
    if not force:
        raise OutputExistsError(f"{path} exists. Give --force to replace it, or another name with --output.")


def json_with(*keys: str) -> Callable[[IO[bytes]], bool]:
    """For `check_output_file`: whether an open file is a JSON object with these keys, or a list of such objects."""

    def is_one(file: IO[bytes]) -> bool:
        try:
            held = json.load(file)
        except (ValueError, RecursionError):
            return False
        items = held if isinstance(held, list) else [held]
        return bool(items) and all(isinstance(item, dict) and item.keys() >= set(keys) for item in items)

    return is_one


def _opened(path: Path) -> IO[bytes] | None:
    """`path` open for writing where it cannot be replaced: it is no regular file, or the one that stdout goes to."""
    if not path.exists():
        return None
    if not path.is_file():
        return path.open("wb")
    stream = _stream(path)
    return None if stream is None else os.fdopen(os.dup(stream), "wb")


def _stream(path: Path) -> int | None:
    """Which of stdout and stderr goes to this file, by number."""
    for stream in (1, 2):
        with contextlib.suppress(OSError):  # it is closed
            if os.path.samestat(path.stat(), os.fstat(stream)):
                return stream
    return None


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON beside `path` and rename it, so that a reader sees the old text or the new one."""
    with replacing(path) as file:
        file.write((json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_bytes(path: Path) -> bytes:
    """The bytes of a JSON file.

    Raises:
        OSError: it cannot be read, or is no regular file, which might have no end or never give anything.
        BundleDamagedError: no export writes one of that size: parsed, it takes many times as much.
    """
    try:
        return read_regular(path, "json")
    except ValueError as error:
        raise BundleDamagedError(f"{path} cannot be read: {error}. Export it again.") from error


def check_stored(archive: zipfile.ZipFile, size: int, unpacked: int = 0) -> None:
    """Check the declared sizes of a zip archive against its bytes, before memory is allocated.

    A few hundred bytes can declare an array of terabytes, and deflated members unpack to a thousand times their size.
    numpy.savez and torch.save store members uncompressed, so only those are accepted from untrusted files.

    Args:
        size: bytes of the archive itself.
        unpacked: bytes that members may declare all the same, compressed or not: for files of the user's own.

    Raises:
        ValueError: a member is compressed, or together they declare more than the archive holds.
    """
    members = archive.infolist()
    packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
    if packed and not unpacked:
        raise ValueError(
            f"{packed[0]} in it is compressed; expected members that are stored as they are, as numpy.savez and "
            "torch.save write them"
        )
    check_declared(sum(member.file_size for member in members), max(size, unpacked))


def check_declared(declared: int, most: int) -> None:
    """Raise `ValueError` where an archive declares more bytes than it may."""
    if declared > most:
        raise ValueError(f"what is in it declares {declared:,} bytes; expected at most {most:,}")
