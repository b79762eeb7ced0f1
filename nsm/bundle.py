"""The bundle: a directory with a manifest, the portable graphs, each target's files, and the golden trace.

    manifest.json  graphs/  openvino/ tensorrt/ ...  state_init.npz  golden.npz  parity.json

A bundle is written beside its final place and renamed at the end, so a crash never leaves half of one under the
asked name. Every payload file is recorded with size and SHA-256 and checked again when it is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from nsm.decode import decode
from nsm.errors import (
    BundleDamagedError,
    BundleVersionError,
    ConfigError,
    InputError,
    OutputExistsError,
    ParityError,
)
from nsm.files import replacing
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


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself."""

    spec: StepSpec
    fingerprint: str
    model: Mapping[str, Any]
    artifacts: tuple[Artifact, ...]
    files: tuple[FileRecord, ...]
    versions: Mapping[str, str]
    command: str
    created: str
    format_version: int = field(default=FORMAT_VERSION)

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
    """A bundle on disk.

    Raises:
        InputError: there is no directory at `path`.
        BundleError: it is no bundle, is damaged, or is of another version (exit code 6).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(f"There is no bundle {self.path}: expected is a directory written by nsm-export.")
        try:
            _check_size(self.path / MANIFEST)
            text = (self.path / MANIFEST).read_text(encoding="utf-8")
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
        if records is None:
            shared = {record.path: record for record in self.manifest.files}
            records = tuple({**shared, **{r.path: r for a in self.manifest.artifacts for r in a.files}}.values())
        for record in records:
            path = self.locate(record.path)
            if not _is_file(path):
                raise BundleDamagedError(f"{self.path} is damaged: {record.path} is missing. Export it again.")
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
        path = self._shared(name)
        _check_size(path)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise BundleDamagedError(f"{self.path / name} is not JSON ({error}). Export the bundle again.") from error

    def _shared(self, name: str) -> Path:
        records = tuple(record for record in self.manifest.files if record.path == name)
        if not records:
            raise BundleDamagedError(f"{self.path}: the manifest does not list {name}. Export the bundle again.")
        self.verify(records)
        return self.locate(name)


def check_output(output: Path, force: bool = False) -> None:
    """Raise `OutputExistsError` where `staged` would not replace what is there."""
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
    An existing `output` stays in place, untouched, until the new one is complete.

    Raises:
        OutputExistsError: `output` exists and `force` is not set (before any work is done).
        InputError: the directory cannot be made.
    """
    check_output(output, force)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.", suffix=".partial"))
    except OSError as error:
        raise InputError(f"The output {output} cannot be written: {error}.") from error
    try:
        yield stage
        check_output(output, force)  # something may have come to be there during the work
        _put(stage, output)
    except ParityError as error:
        failed = output.with_name(output.name + FAILED_SUFFIX)
        _put(stage, failed)
        raise ParityError(f"{error} The bundle is kept as {failed}, with its report in {PARITY}.") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def staged_copy(bundle: Path) -> Iterator[Path]:
    """A copy of a bundle to change, that takes the bundle's place when the block ends well; see `staged`.

    Files are linked, not copied, where the file system can: replace a file in the stage, never write into one.
    """
    with staged(bundle, force=True) as stage:
        shutil.copytree(bundle, stage, dirs_exist_ok=True, copy_function=_link)
        yield stage


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, atomically; its list of shared files is filled in from what lies in the directory."""
    names = [name for name in (STATE_INIT, GOLDEN, PARITY, CALIBRATION) if (directory / name).is_file()]
    graphs = sorted(
        path.relative_to(directory).as_posix() for path in (directory / GRAPHS).rglob("*") if path.is_file()
    )
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


def _check_size(path: Path) -> None:
    """Raise `BundleDamagedError` for a JSON file that no export writes: parsed, it takes many times its size."""
    size = path.stat().st_size
    if size > JSON_LIMIT:
        raise BundleDamagedError(f"{path} has {size:,} bytes; expected are at most {JSON_LIMIT:,}. Export it again.")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, say
        return False


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _put(stage: Path, output: Path) -> None:
    """Rename `stage` to `output`, moving an older one out of the way and then deleting it."""
    output = output.resolve() if output.is_symlink() else output
    stage.chmod(0o755)
    for path in stage.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    old = stage.with_suffix(".old")
    if output.exists():
        os.replace(output, old)
    try:
        os.replace(stage, output)
    except OSError:
        if old.exists():
            os.replace(old, output)
        raise
    shutil.rmtree(old, ignore_errors=True)
