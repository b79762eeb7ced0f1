"""The bundle: a directory with a manifest, the portable graphs, each target's files, and the golden trace.

    manifest.json  graphs/  openvino/ tensorrt/ ...  state_init.npz  golden.npz  parity.json

Every payload file is recorded with size and SHA-256 and checked again when it is loaded. `nsm.staging` writes bundles.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from nsm.errors import BundleDamagedError, InputError
from nsm.files import abandoned, followed, json_bytes, sha256
from nsm.manifest import MANIFEST, Artifact, FileRecord, Manifest
from nsm.trace import Arrays, Trace, load_arrays

GRAPHS = "graphs"
WEIGHTS = "weights.bin"
"""Name of the weights file beside the graphs that share it, ours and OpenVINO's."""
STATE_INIT = "state_init.npz"
GOLDEN = "golden.npz"
PARITY = "parity.json"
CALIBRATION = "calibration.json"


def graph_file(entry: str) -> str:
    """Return the name of the ONNX file of an entry, in `GRAPHS` or in the folder of a low precision."""
    return f"{entry}.onnx"


class Bundle:
    """A bundle on disk. `written` are the bytes of its manifest.

    Raises:
        InputError: there is no directory at `path`.
        BundleError: it is no bundle, is damaged, or is of another version (exit code 6).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            put_back(followed(self.path))
        if not self.path.is_dir():
            raise InputError(f"There is no bundle {self.path}: expected a directory written by nsm-export.")
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

    def artifact(self, target: str | None = None, precision: str | None = None) -> Artifact:
        """One artifact: of this target, or of the first that passed; in this precision, or in fp32, or in its only one.

        Raises:
            InputError: there is none; or there are several, none of them in fp32, and no precision was given.
        """
        found = self.artifacts(() if target is None else (target,), () if precision is None else (precision,))
        if target is None:
            first = next((item for item in found if item.parity.status == "passed"), found[0])
            found = [item for item in found if item.target == first.target]
        return self.preferred(found)

    def artifacts(self, targets: Collection[str] = (), precisions: Collection[str] = ()) -> list[Artifact]:
        """The artifacts of these targets, in their order, in these precisions; () stands for all.

        Raises:
            InputError: there is none, or none of one of the targets.
        """
        held = self.manifest.artifacts
        found = [item for item in held if item.target in (targets or {item.target})]
        found = [item for item in found if item.precision in (precisions or {item.precision})]
        lacking = [target for target in targets if all(item.target != target for item in found)]
        if lacking or not found:
            raise InputError(self._lacking(lacking, precisions))
        order = list(targets)
        return sorted(found, key=lambda item: order.index(item.target)) if order else found

    def _lacking(self, targets: Sequence[str], precisions: Collection[str]) -> str:
        """The message for a missing artifact of the first of these targets, in one of these precisions."""
        held = self.manifest.artifacts
        target = targets[0] if targets else held[0].target if held else "openvino"
        wanted = f" for {target!r}" if targets else ""
        wanted += f" in {' or '.join(precisions)}" if precisions else ""
        option = f" --precision {next(iter(precisions))}" if precisions else ""
        return (
            f"{self.path} holds no artifact{wanted}; it holds: {', '.join(item.label for item in held) or 'none'}. "
            f"Build it with: nsm build {self.path} --target {target}{option}"
        )

    def holds(self, target: str, precision: str) -> bool:
        """Whether there is an artifact of this target in this precision."""
        return any((item.target, item.precision) == (target, precision) for item in self.manifest.artifacts)

    def preferred(self, found: Sequence[Artifact]) -> Artifact:
        """Of a target's artifacts the one in fp32, or the only one.

        Raises:
            InputError: there are several, none of them in fp32.
        """
        exact = [item for item in found if item.precision == "fp32"] or found
        if len(exact) > 1:
            raise InputError(
                f"{self.path} holds {found[0].target} in {', '.join(item.precision for item in found)}. Name one: "
                f"precision={found[0].precision!r}, or --precision {found[0].precision} on the command line."
            )
        return exact[0]

    def verify(self, records: tuple[FileRecord, ...] | None = None) -> None:
        """Check that files (default: all) are there with their recorded size and hash.

        Raises:
            BundleDamagedError: names the first damaged file, and the damage.
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

    def others(self) -> list[PurePosixPath]:
        """Files and links in the directory that the manifest does not list.

        Relative to the bundle; of a folder with nothing else in it, the folder. Empty folders do not count.
        """
        own = {PurePosixPath(MANIFEST), *map(PurePosixPath, self.recorded())}
        shared = {folder for path in own for folder in path.parents}
        return _others(self.path, PurePosixPath(), own, shared)

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


def put_back(path: Path) -> None:
    """Give a bundle its name again where a process was killed that had just set it aside to replace it.

    Raises:
        InputError: it cannot be renamed.
    """
    with abandoned(path, "replaced") as found:
        if not found or os.path.lexists(path):
            return
        try:
            os.rename(found[0], path)
        except OSError as error:
            raise InputError(
                f"There is no bundle {path}: a command that was killed left it as {found[0]}, and it cannot be renamed "
                f"({error}). Rename it to {path.name}."
            ) from error


def _others(
    root: Path, folder: PurePosixPath, own: Collection[PurePosixPath], shared: Collection[PurePosixPath]
) -> list[PurePosixPath]:
    """See `Bundle.others`; `shared` are the folders that hold some of `own`."""
    found: list[PurePosixPath] = []
    for name in sorted(os.listdir(root / folder)):
        path = folder / name
        if path in own:
            continue
        place = root / path
        if place.is_symlink() or not place.is_dir():
            found.append(path)
            continue
        inside = _others(root, path, own, shared)
        found += inside if path in shared or not inside else [path]
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, say
        return False
