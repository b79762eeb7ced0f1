"""nsm.open: from a bundle on disk to a session."""

from __future__ import annotations

import os
from pathlib import PurePosixPath

from nsm.bundle import Artifact, Bundle
from nsm.errors import BundleDamagedError, InputError
from nsm.runtimes.base import Loader
from nsm.runtimes.session import Session
from nsm.runtimes.targets import find_target


def open_bundle(
    bundle: str | os.PathLike[str] | Bundle,
    target: str | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> Session:
    """Open a bundle and start its streams.

    Args:
        bundle: the directory written by nsm-export.
        target: onnx, onnxruntime, openvino or tensorrt, or an alias (default: the first in the bundle that passed
            its parity check).
        device: for targets that run on several (default: the one the artifact was built for).
        threads: threads of the backend (default: its own choice).

    Returns:
        A `Session`; use it in a `with` block or close it.

    Raises:
        InputError: no such bundle, or it has no artifact for the target.
        BundleError: damaged, or of another format version.
        MissingDependencyError: the backend is not installed; names the extra that installs it.
        DeviceUnavailableError: the hardware is not in this machine.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads is at least 1; given {threads}.")
    opened = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    artifact = opened.artifact(None if target is None else find_target(target).name)
    opened.verify(artifact.files)
    return open_artifact(opened, artifact, device, threads)


def open_artifact(bundle: Bundle, artifact: Artifact, device: str | None = None, threads: int | None = None) -> Session:
    """The session of one artifact, whose files have been verified."""
    target = find_target(artifact.target)
    if device is not None and device.lower() not in target.devices:
        raise InputError(
            f"The target {target.name} has no device {device!r}. Its devices: {', '.join(target.devices)}."
        )
    load: Loader = target.runtime_module().load
    spec = bundle.manifest.spec
    recorded = [record.path for record in artifact.files]
    files = {}
    for entry in spec.entries:
        name = f"{entry.name}{target.suffix}"
        path = next((path for path in recorded if PurePosixPath(path).name == name), None)
        if path is None:
            raise BundleDamagedError(
                f"{bundle.path}: the manifest lists no {name} for {target.name}. Export the bundle again."
            )
        files[entry.name] = bundle.locate(path)
    initial = bundle.state_init()  # before the runtime takes memory for states of the manifest's shapes
    runtime = load(files, spec, (device or artifact.device).lower(), threads, artifact.precision)
    return Session(runtime, spec, initial, bundle.manifest.fingerprint, target.name)
