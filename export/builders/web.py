"""The target web: a browser client in the bundle, which any static file server can serve."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from nsm.errors import BuildError, MissingDependencyError
from nsm.export.builders.base import Built, Request
from nsm.files import sha256
from nsm.runtimes.backends.web import CLIENT, ORT, client_files

VERSION = "1.30.0"
"""Version of onnxruntime-web."""

PACKAGE = "NSM_ONNXRUNTIME_WEB"
"""Environment variable that names a folder with the npm package onnxruntime-web."""


def build(request: Request) -> Built:
    """Copy the client, the page and ONNX Runtime Web to the folder `web`; they load the bundle's graphs.

    Raises:
        MissingDependencyError: onnxruntime-web is not installed, and npm cannot download it.
        BuildError: the downloaded package has unexpected files.
    """
    folder = request.directory / CLIENT
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(find_package() / "dist", folder / "ort", ignore=_all_but(ORT))
    for name, item in client_files().items():
        (folder / name).write_bytes(item.read_bytes())
    files = sorted(path for place in (folder, request.graphs) for path in place.rglob("*") if path.is_file())
    notes = (f"serve the bundle's folder, and open /{CLIENT}/ there: python -m http.server -d BUNDLE",)
    return Built(tuple(path.relative_to(request.directory).as_posix() for path in files), "wasm", notes)


def find_package() -> Path:
    """Return the folder of the npm package onnxruntime-web, in the tested version.

    Searches the folder of the environment variable `PACKAGE`, then `node_modules` in the working directory, then the
    user's cache; downloads the package to the cache with npm if all lack it. The files are identified by their hashes.

    Raises:
        MissingDependencyError: the variable names a folder without the package, or npm cannot download it.
        BuildError: the downloaded package has unexpected files.
    """
    named = os.environ.get(PACKAGE)
    if named and not _is_package(Path(named)):
        raise MissingDependencyError(
            f"{PACKAGE}={named}: expected {', '.join(ORT)} of onnxruntime-web {VERSION} in its folder dist. Set it to "
            "a folder that has them, or unset the variable."
        )
    for place in _places():
        if _is_package(place):
            return place
    return _fetched(_cache())


def _is_package(place: Path) -> bool:
    files = {place / "dist" / name: digest for name, digest in ORT.items()}
    return all(path.is_file() and sha256(path) == digest for path, digest in files.items())


def _places() -> Iterator[Path]:
    if os.environ.get(PACKAGE):
        yield Path(os.environ[PACKAGE])
    yield Path("node_modules", "onnxruntime-web")
    yield _cache()


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nsm" / f"onnxruntime-web-{VERSION}"


def _fetched(place: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise MissingDependencyError(
            f"The target web needs the npm package onnxruntime-web {VERSION}, and npm is not installed. Install "
            f"Node.js with npm, or set the environment variable {PACKAGE} to a folder with the package."
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        command = [npm, "pack", "--silent", f"onnxruntime-web@{VERSION}"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        archives = list(Path(folder).glob("*.tgz"))
        if result.returncode or not archives:
            last = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise MissingDependencyError(
                f"npm could not download onnxruntime-web {VERSION}: {last}. Install it (npm install "
                f"onnxruntime-web@{VERSION}) and run the command again, or set the environment variable {PACKAGE} to "
                "its folder."
            )
        with tarfile.open(archives[0]) as archive:
            archive.extractall(folder, filter="data")
        found = Path(folder) / "package"
        if not _is_package(found):
            raise BuildError(
                f"The package onnxruntime-web {VERSION} from npm does not have {', '.join(ORT)} with the expected "
                "hashes. Check which registry npm is configured to use: npm config get registry"
            )
        shutil.rmtree(place, ignore_errors=True)
        os.replace(found, place)
    return place


def _all_but(names: Collection[str]) -> Callable[[str, list[str]], list[str]]:
    def ignored(_folder: str, found: list[str]) -> list[str]:
        return [name for name in found if name not in names]

    return ignored
