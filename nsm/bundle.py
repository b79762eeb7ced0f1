"""The bundle: a directory with a manifest, the portable graphs, each target's files, and the golden trace.

    manifest.json  graphs/  openvino/ tensorrt/ ...  state_init.npz  golden.npz  parity.json

A bundle is written beside its final place and renamed at the end, so a crash never leaves half of one under the
asked name. Every payload file is recorded with size and SHA-256 and checked again when it is loaded.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from nsm.decode import decode
from nsm.errors import (
    BundleDamagedError,
    BundleVersionError,
    ConfigError,
    InputError,
    OutputExistsError,
    ParityError,
)
from nsm.files import followed, new_mode, replacing, settled
from nsm.spec import StepSpec
from nsm.trace import Arrays, Trace, load_arrays

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
GRAPHS = "graphs"
STATE_INIT = "state_init.npz"
GOLDEN = "golden.npz"
PARITY = "parity.json"
CALIBRATION = "calibration.json"
FAILED_SUFFIX = ".failed"

JSON_LIMIT = 64 << 20
"""Bytes of the largest JSON file that is read; a manifest has some ten thousand."""


@dataclass(frozen=True)
class FileRecord:
    """One payload file: its path inside the bundle (with /), size in bytes, SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """What one target runs.

    `files` are its own files and those it shares with other targets. `parity` holds at least `status`: "passed",
    "failed" or "not_run"; the last with a `reason`. `notes` are sentences for people. `quantization`, of an artifact in
    low precision, holds the `form` of its products, the `float` ones by name with the reason, and `speed` against fp32.
    """

    target: str
    device: str
    precision: str
    effective_precision: str
    files: tuple[FileRecord, ...]
    parity: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    quantization: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.parity.get("status") not in ("passed", "failed", "not_run"):
            raise ConfigError(f"The parity of {self.target} has no status that is passed, failed or not_run.")

    @property
    def nbytes(self) -> int:
        return sum(record.size for record in self.files)


_MODEL = {"class": str, "config": Mapping, "parameters": int}


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself. `model` holds at least its `class`, its `config`, and how many `parameters`."""

    spec: StepSpec
    fingerprint: str
    model: Mapping[str, Any]
    artifacts: tuple[Artifact, ...]
    files: tuple[FileRecord, ...]
    versions: Mapping[str, str]
    command: str
    created: str
    format_version: int = field(default=FORMAT_VERSION)

    def __post_init__(self) -> None:
        wrong = [name for name, kind in _MODEL.items() if not isinstance(self.model.get(name), kind)]
        if wrong:
            raise ConfigError(
                f"The model's {wrong[0]} is {self.model.get(wrong[0])!r}; expected is {_MODEL[wrong[0]].__name__}."
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """Inverse of `to_json`.

        Raises:
            BundleVersionError: another format version.
            BundleError: something is missing or of the wrong kind.
        """
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise BundleVersionError(
                f"The bundle has format version {version!r}; this nsm reads version {FORMAT_VERSION}. "
                "Export it again with this version, or install the nsm that wrote it."
            )
        return decode(cls, data, MANIFEST)


class Bundle:
    """A bundle on disk. `written` are the bytes of its manifest.

    Raises:
        InputError: there is no directory at `path`.
        BundleError: it is no bundle, is damaged, or is of another version (exit code 6).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(f"There is no bundle {self.path}: expected is a directory written by nsm-export.")
        try:
            self.written = _read_json(self.path / MANIFEST)
            text = self.written.decode()
        except (OSError, UnicodeDecodeError) as error:
            raise BundleDamagedError(f"{self.path} is not a bundle: {MANIFEST} cannot be read ({error}).") from error
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleDamagedError(
                f"{self.path / MANIFEST} is not JSON ({error}). Export the bundle again."
            ) from error
        if not isinstance(data, dict):
            raise BundleDamagedError(f"{self.path / MANIFEST} holds no JSON object. Export the bundle again.")
        self.manifest = Manifest.from_json(data)

    def artifact(self, target: str | None = None) -> Artifact:
        """The artifact of `target`, or the first one that can be run anywhere."""
        artifacts = self.manifest.artifacts
        if not artifacts and target is None:
            raise InputError(f"{self.path} holds no artifact. Build one with: nsm build {self.path} --target openvino")
        if target is None:
            return next((item for item in artifacts if item.parity["status"] == "passed"), artifacts[0])
        for item in artifacts:
            if item.target == target:
                return item
        held = ", ".join(item.target for item in artifacts) or "none"
        raise InputError(
            f"{self.path} holds no artifact for {target!r}; it holds: {held}. "
            f"Build it with: nsm build {self.path} --target {target}"
        )

    def verify(self, records: tuple[FileRecord, ...] | None = None) -> None:
        """Check that files (default: all) are there with their recorded size and hash.

        Raises:
            BundleDamagedError: names the first file that is not, and what is wrong with it.
        """
        for record in self._records() if records is None else records:
            path = self.file(record.path)
            size = path.stat().st_size
            if size != record.size:
                raise BundleDamagedError(
                    f"{self.path} is damaged: {record.path} has {size} bytes, recorded are {record.size}. "
                    "Copy or export it again."
                )
            if sha256(path) != record.sha256:
                raise BundleDamagedError(
                    f"{self.path} is damaged: the content of {record.path} does not have the recorded SHA-256. "
                    "Copy or export it again."
                )

    def recorded(self) -> tuple[str, ...]:
        """The paths of all files that the manifest lists, relative to the bundle, each once."""
        return tuple(dict.fromkeys(PurePosixPath(record.path).as_posix() for record in self._records()))

    def file(self, relative: str) -> Path:
        """Where a recorded file lies.

        Raises:
            BundleDamagedError: it is missing, or outside the bundle.
        """
        path = self.locate(relative)
        if not _is_file(path):
            raise BundleDamagedError(f"{self.path} is damaged: {relative} is missing. Export it again.")
        return path

    def locate(self, relative: str) -> Path:
        """Where a recorded file lies; a path that leads out of the bundle is refused."""
        pure = PurePosixPath(relative)
        path = self.path.joinpath(*pure.parts)
        try:
            inside = path.resolve().is_relative_to(self.path.resolve())
        except (OSError, RuntimeError, ValueError):  # too long, a link to itself, a NUL byte
            inside = False
        if pure.is_absolute() or ".." in pure.parts or not inside:
            raise BundleDamagedError(f"{self.path}: the manifest names {relative!r}, which is outside the bundle.")
        return path

    def state_init(self) -> Arrays:
        """Initial values of the states, by name, lanes included. Verified, and of the shapes that the spec has.

        Raises:
            BundleDamagedError: one is not there, or of another shape or dtype.
        """
        path = self._shared(STATE_INIT)
        arrays = load_arrays(path)
        for state in self.manifest.spec.states:
            held = arrays.get(state.name)
            if held is None or held.shape != state.shape or held.dtype != state.numpy_dtype:
                found = "nothing" if held is None else f"{list(held.shape)} of {held.dtype}"
                raise BundleDamagedError(
                    f"{path} holds {found} for {state.name}; the manifest has {list(state.shape)} of {state.dtype}. "
                    "Was it edited by hand? Export the bundle again."
                )
        return arrays

    def trace(self) -> Trace:
        """The golden trace. Verified."""
        return Trace.load(self._shared(GOLDEN))

    def json(self, name: str) -> Any:
        """The content of a shared JSON file, None where the bundle has no such file. Verified."""
        if all(record.path != name for record in self.manifest.files):
            return None
        written = _read_json(self._shared(name))
        try:
            return json.loads(written.decode())
        except (ValueError, RecursionError) as error:
            raise BundleDamagedError(f"{self.path / name} is not JSON ({error}). Export the bundle again.") from error

    def _records(self) -> tuple[FileRecord, ...]:
        shared = {record.path: record for record in self.manifest.files}
        return tuple({**shared, **{r.path: r for a in self.manifest.artifacts for r in a.files}}.values())

    def _shared(self, name: str) -> Path:
        records = tuple(record for record in self.manifest.files if record.path == name)
        if not records:
            raise BundleDamagedError(f"{self.path}: the manifest does not list {name}. Export the bundle again.")
        self.verify(records)
        return self.locate(name)


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


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON beside `path` and rename it, so that a reader sees the old text or the new one."""
    with replacing(path) as file:
        file.write((json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def file_record(directory: Path, relative: str) -> FileRecord:
    """Size and hash of a file in the bundle directory."""
    path = directory / relative
    return FileRecord(relative, path.stat().st_size, sha256(path))


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> bytes:
    """The bytes of a JSON file.

    Raises:
        OSError: it cannot be read, or is no regular file, which might have no end or never give anything.
        BundleDamagedError: no export writes one of that size: parsed, it takes many times as much.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    size = path.stat().st_size
    if size > JSON_LIMIT:
        raise BundleDamagedError(f"{path} has {size:,} bytes; expected are at most {JSON_LIMIT:,}. Export it again.")
    return path.read_bytes()


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, say
        return False


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
        return _read_json(directory / MANIFEST) == manifest
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
