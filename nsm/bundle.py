"""The bundle: a directory with a manifest, the portable graphs, each target's files, and the golden trace.

    manifest.json  graphs/  openvino/ tensorrt/ ...  state_init.npz  golden.npz  parity.json

Every payload file is recorded with size and SHA-256 and checked again when it is loaded. `nsm.staging` writes bundles.
"""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

from nsm.errors import BundleDamagedError, InputError
from nsm.files import json_bytes, sha256
from nsm.manifest import MANIFEST, Artifact, FileRecord, Manifest
from nsm.trace import Arrays, Trace, load_arrays

GRAPHS = "graphs"
STATE_INIT = "state_init.npz"
GOLDEN = "golden.npz"
PARITY = "parity.json"
CALIBRATION = "calibration.json"


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
            self.written = json_bytes(self.locate(MANIFEST))
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
            raise BundleDamagedError(f"{self.path} names {relative!r}, which is outside the bundle.")
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
        written = json_bytes(self._shared(name))
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


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, say
        return False
