"""Writing a bundle: beside its final place, and renamed at the end, so that a crash never leaves half of one.

A bundle is changed in a copy, which then takes its place. Two bundles exchange their names in one step where the system
supports it (`nsm.files.atomic_exchange`). Elsewhere a process may be killed between two renames; the next command then
restores the older bundle (`nsm.bundle.put_back`). The next export removes other leftovers of dead processes
(`nsm.files.partials`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePath

from nsm.bundle import CALIBRATION, GOLDEN, GRAPHS, PARITY, STATE_INIT, Bundle, put_back
from nsm.errors import BundleDamagedError, BundleError, InputError, OutputExistsError, ParityError
from nsm.files import (
    abandoned,
    exchange,
    followed,
    json_bytes,
    locked,
    new_mode,
    partial,
    replaced_name,
    settled,
    write_json,
)
from nsm.manifest import MANIFEST, Manifest, file_record

FAILED_SUFFIX = ".failed"

_NAMED = 3


def check_output(output: Path, force: bool = False) -> None:
    """Raise `OutputExistsError` if the path holds anything but the files of a bundle, which `staged` may replace."""
    output = followed(settled(output))
    if output.exists():
        _check_only_a_bundle(output, "is not replaced")
        if not force:
            raise OutputExistsError(f"{output} exists. Give --force to replace it, or another name with --output.")
    _check_failed(output)


def _check_failed(output: Path) -> None:
    """Raise `OutputExistsError` where a failed export of `output` would replace anything but an earlier one."""
    failed = output.with_name(output.name + FAILED_SUFFIX)
    if failed.exists():
        _check_only_a_bundle(failed, "is not replaced, and a failed export would go there")


def _check_only_a_bundle(path: Path, consequence: str) -> None:
    """Raise `OutputExistsError` where a path is not a bundle that this nsm can read, or holds other files as well."""
    if not (path / MANIFEST).is_file():
        raise OutputExistsError(
            f"{path} exists and is not a bundle, so it {consequence}. Move it away, or take another name."
        )
    try:
        others = _named(Bundle(path).others())
    except BundleError as error:
        raise OutputExistsError(
            f"{path} exists and cannot be read as a bundle, so it {consequence}. Move it away, or take another name. "
            f"The reason: {error}"
        ) from error
    if others:
        raise OutputExistsError(
            f"{path} holds files that are not of the bundle, so it {consequence}: {others}. Move them away, or take "
            "another name."
        )


def _named(paths: Sequence[PurePath]) -> str:
    more = f" and {len(paths) - _NAMED:,} more" if len(paths) > _NAMED else ""
    return ", ".join(str(path) for path in paths[:_NAMED]) + more


@contextlib.contextmanager
def staged(output: Path, force: bool = False) -> Iterator[Path]:
    """A new directory beside `output` that takes its name when the block ends well.

    A `ParityError` keeps it aside as `{output}.failed`, replacing an earlier one; any other error removes it.
    An existing `output` is not touched until the new one is complete. If it is a link, its target is replaced, and the
    temporary folders are beside the target.

    Raises:
        OutputExistsError: `output` exists, and `force` is not set, or it is more or other than a bundle of this
            version; before any work is done.
        InputError: the directory cannot be made.
    """
    output = followed(settled(output))
    _recover(output)
    check_output(output, force)
    with _stage(output) as stage:
        yield stage
        check_output(output, force)  # something may have come to be there during the work
        _put(stage, output)


@contextlib.contextmanager
def staged_copy(path: Path) -> Iterator[Path]:
    """A copy of a bundle to change, that takes the bundle's place when the block ends well; see `staged`.

    The copy has the recorded files only, and no links. They are hard links if the file system has them: replace a file
    in the stage, never write into one. Other files in the bundle, such as notes, stay in it.

    Raises:
        InputError, BundleError: there is no bundle, or it is damaged.
        OutputExistsError: another command changed the bundle meanwhile, and its result is kept; or another file in the
            bundle has the name of a new one.
    """
    output = followed(settled(path))
    _recover(output)
    bundle = Bundle(output)
    _check_failed(output)
    with _stage(output) as stage:
        for name in bundle.recorded():
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            _link(bundle.file(name).resolve(), stage / name)
        (stage / MANIFEST).write_bytes(bundle.written)
        yield stage
        _put(stage, output, bundle.written)


@contextlib.contextmanager
def _stage(output: Path) -> Iterator[Path]:
    """A new directory to become `output`; a `ParityError` keeps it aside, any other error removes it."""
    with contextlib.ExitStack() as stack:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            stage = stack.enter_context(partial(output, folder=True))
        except OSError as error:
            raise InputError(f"The output {output} cannot be written: {error}.") from error
        try:
            yield stage
        except ParityError as error:
            failed = output.with_name(output.name + FAILED_SUFFIX)
            _put(stage, failed)
            raise ParityError(f"{error} The bundle is kept as {failed}, with its report in {PARITY}.") from error


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, atomically; its list of shared files is made from the directory.

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


def _put(stage: Path, output: Path, copied: bytes | None = None) -> None:
    """Rename `stage` to `output`; an older one is then deleted.

    Args:
        stage: of `_stage`.
        output: its place.
        copied: for a copy, the manifest of the older bundle, which must still have it; its other files are moved over.

    Raises:
        OutputExistsError: the older one stays; see `staged` and `staged_copy`.
    """
    _permit(stage, output)
    with locked(output, wait=True):  # two commands may be about to replace it
        if copied is None and not os.path.lexists(output):
            _put_new(stage, output)
            return
        _check_replaced(stage, output, copied)
        old = replaced_name(output, stage)
        try:
            _swap(stage, output, old)
        finally:
            if old.exists():
                _settle(old, output)


def _put_new(stage: Path, output: Path) -> None:
    try:
        os.rename(stage, output)
    except OSError as error:
        if os.path.lexists(output):
            raise OutputExistsError(f"{output} came to be during the work. Take another name.") from error
        raise


def _check_replaced(stage: Path, output: Path, copied: bytes | None) -> None:
    """Raise `OutputExistsError` where `output` is not as it was, or something in it would be lost."""
    if copied is None:
        _check_only_a_bundle(output, "is not replaced")
        return
    if not _has_manifest(output, copied):
        raise OutputExistsError(
            f"{output} was changed by another command while this one was at work, and is left as it is now. Start this "
            "one again: it then begins with what the other one made."
        )
    lost = [path for path in Bundle(output).others() if os.path.lexists(stage / path)]
    if lost:
        raise OutputExistsError(
            f"{output} holds files that are not of the bundle where new ones would go: {_named(lost)}. Move them away."
        )


def _swap(stage: Path, output: Path, old: Path) -> None:
    """Let `stage` take the place of `output`, which is then called `old`. It is `stage` at first, so that after a
    kill `_settle` can recognize whatever has that name.
    """
    os.rename(stage, old)
    if not exchange(old, output):
        os.rename(old, stage)
        os.rename(output, old)
        os.rename(stage, output)


def _settle(old: Path, output: Path) -> None:
    """Delete the older or unused bundle `old` if `output` is there, else rename it to `output`. Its files that are
    not of a bundle are moved over; if one cannot be moved, `old` is kept with it.
    """
    if not os.path.lexists(output):
        os.rename(old, output)
        return
    try:
        for path in Bundle(old).others():
            (output / path).parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(output / path):
                return
            os.rename(old / path, output / path)
    except (OSError, BundleError):
        return
    shutil.rmtree(old, ignore_errors=True)


def _recover(output: Path) -> None:
    """Finish or undo the work of commands that were killed while they replaced `output`."""
    put_back(output)
    with abandoned(output, "replaced") as found:
        for old in found:
            _settle(old, output)


def _has_manifest(directory: Path, manifest: bytes) -> bool:
    try:
        return json_bytes(directory / MANIFEST) == manifest
    except (OSError, BundleDamagedError):
        return False


def _permit(stage: Path, output: Path) -> None:
    """Give new files in `stage` the permissions of the files that they replace in `output`, or the default ones.

    A file with several hard links, or behind a link, keeps its permissions.
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
