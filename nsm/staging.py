"""Writing a bundle: beside its final place, renamed at the end, so that a crash never leaves half of one.

Where a bundle is to be changed, a copy is, and takes its place.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from nsm.bundle import CALIBRATION, GOLDEN, GRAPHS, PARITY, STATE_INIT, Bundle
from nsm.errors import BundleDamagedError, InputError, OutputExistsError, ParityError
from nsm.files import followed, json_bytes, new_mode, settled, write_json
from nsm.manifest import MANIFEST, Manifest, file_record

FAILED_SUFFIX = ".failed"


def check_output(output: Path, force: bool = False) -> None:
    """Raise `OutputExistsError` where `staged` would not replace what is there."""
    output = followed(settled(output))
    if output.exists() and not force:
        raise OutputExistsError(f"{output} exists. Give --force to replace it, or another name with --output.")
    if output.exists() and not (output / MANIFEST).is_file():
        raise OutputExistsError(
            f"{output} exists and is not a bundle, so --force does not replace it. Move it away, or take another name."
        )
    failed = output.with_name(output.name + FAILED_SUFFIX)
    if failed.exists() and not (failed / MANIFEST).is_file():
        raise OutputExistsError(f"{failed} exists and is not a bundle; a failed export would go there. Move it away.")


@contextlib.contextmanager
def staged(output: Path, force: bool = False) -> Iterator[Path]:
    """A new directory beside `output` that takes its name when the block ends well.

    A `ParityError` keeps it aside as `{output}.failed`, replacing an earlier one; any other error removes it.
    An existing `output` stays in place, untouched, until the new one is complete. Where it is a link, what it leads to
    is replaced, and all this happens there.

    Raises:
        OutputExistsError: `output` exists and `force` is not set (before any work is done).
        InputError: the directory cannot be made.
    """
    with _staged(followed(settled(output)), force, None) as stage:
        yield stage


@contextlib.contextmanager
def staged_copy(path: Path) -> Iterator[Path]:
    """A copy of a bundle to change, that takes the bundle's place when the block ends well; see `staged`.

    The copy has the recorded files alone, and no links. They are linked, not copied, where the file system can: replace
    a file in the stage, never write into one. What lies beside their folders, notes perhaps, stays in the bundle.

    Raises:
        BundleError: it is damaged.
        OutputExistsError: another command changed the bundle meanwhile; it is left as that made it.
    """
    output = followed(settled(path))
    check_output(output, force=True)
    bundle = Bundle(output)
    replaced = _Replaced(bundle.written, bundle.recorded())
    with _staged(output, True, replaced) as stage:
        for name in replaced.recorded:
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            _link(bundle.file(name).resolve(), stage / name)
        (stage / MANIFEST).write_bytes(replaced.manifest)
        yield stage


class _Replaced(NamedTuple):
    """What a copy was made of: the manifest, byte by byte, and the files that it lists."""

    manifest: bytes
    recorded: tuple[str, ...]


@contextlib.contextmanager
def _staged(output: Path, force: bool, replaced: _Replaced | None) -> Iterator[Path]:
    """See `staged`, and `_put` for `replaced`."""
    check_output(output, force)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.", suffix=".partial"))
    except OSError as error:
        raise InputError(f"The output {output} cannot be written: {error}.") from error
    try:
        yield stage
        check_output(output, force)  # something may have come to be there during the work
        _put(stage, output, replaced)
    except ParityError as error:
        failed = output.with_name(output.name + FAILED_SUFFIX)
        _put(stage, failed)
        raise ParityError(f"{error} The bundle is kept as {failed}, with its report in {PARITY}.") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, atomically; its list of shared files is filled in from what lies in the directory.

    A link is none of them, wherever it leads.
    """
    own = _own_files(directory)
    names = [name for name in (STATE_INIT, GOLDEN, PARITY, CALIBRATION) if (directory / name) in own]
    graphs = sorted(path.relative_to(directory).as_posix() for path in own if directory / GRAPHS in path.parents)
    manifest = replace(manifest, files=tuple(file_record(directory, name) for name in [*graphs, *names]))
    write_json(directory / MANIFEST, manifest.to_json())


def _own_files(directory: Path) -> list[Path]:
    """The regular files in a directory, also deep in it; links are neither followed nor files."""
    found = [Path(folder, name) for folder, _, names in os.walk(directory) for name in names]
    return [path for path in found if stat.S_ISREG(path.lstat().st_mode)]


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _put(stage: Path, output: Path, replaced: _Replaced | None = None) -> None:
    """Rename `stage` to `output`, moving an older one out of the way and then deleting it.

    With `replaced` that has to be the older one still, and what lies beside its own files and folders is moved over.

    Raises:
        OutputExistsError: it is another one by now, and stays.
    """
    _permit(stage, output)
    old = stage.with_suffix(".old")
    if output.exists():
        os.replace(output, old)
    try:
        if replaced is not None and not _has_manifest(old, replaced.manifest):
            raise OutputExistsError(
                f"{output} was changed by another command while this one was at work, and is left as it is now. Start "
                "this one again: it then begins with what the other one made."
            )
        os.replace(stage, output)
    except BaseException:
        if old.exists() and not output.exists():
            os.replace(old, output)
        raise
    try:
        if replaced is not None:
            _move_others(old, output, {MANIFEST, *replaced.recorded})
    except OSError:  # the older one is left, with what could not be moved
        return
    shutil.rmtree(old, ignore_errors=True)


def _has_manifest(directory: Path, manifest: bytes) -> bool:
    try:
        return json_bytes(directory / MANIFEST) == manifest
    except (OSError, BundleDamagedError):
        return False


def _permit(stage: Path, output: Path) -> None:
    """Give what is new in `stage` the permissions of what it replaces in `output`, or those that new files have.

    A file with more than one name belongs to others too, and keeps its own; so does what a link leads to.
    """
    for folder, _, names in os.walk(stage, topdown=False):
        for path in (*(Path(folder, name) for name in names), Path(folder)):
            found = path.lstat()
            single = stat.S_ISREG(found.st_mode) and found.st_nlink == 1
            if single or stat.S_ISDIR(found.st_mode):
                path.chmod(_mode(output / path.relative_to(stage), found.st_mode))


def _mode(replaced: Path, new: int) -> int:
    if os.path.lexists(replaced) and stat.S_IFMT(replaced.lstat().st_mode) == stat.S_IFMT(new):
        return replaced.lstat().st_mode & 0o777
    return new_mode(stat.S_ISDIR(new) or bool(new & stat.S_IXUSR))


def _move_others(old: Path, output: Path, recorded: Collection[str]) -> None:
    """Move what a bundle holds beside its own files and folders into the one that replaced it: links as links."""
    own = {PurePosixPath(name).parts[0] for name in recorded}
    for path in sorted(old.iterdir()):
        if path.name not in own and not os.path.lexists(output / path.name):
            os.rename(path, output / path.name)
