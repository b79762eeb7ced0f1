"""nsm.open: from a bundle on disk to a session."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

from nsm.bundle import Bundle
from nsm.errors import (
    BundleDamagedError,
    DeviceUnavailableError,
    InputError,
    MissingDependencyError,
    RunError,
    UncheckedWarning,
    UnsupportedError,
)
from nsm.manifest import Artifact
from nsm.runtimes.base import Loader
from nsm.runtimes.opening.cpu_features import require_device
from nsm.runtimes.opening.status import refuse_failed, warn_unchecked
from nsm.runtimes.opening.threads import chosen_threads
from nsm.runtimes.session import Session
from nsm.runtimes.targets import TARGETS, Target, find_target
from nsm.spec import StepSpec


def open_bundle(
    bundle: str | os.PathLike[str] | Bundle,
    target: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    *,
    precision: str | None = None,
    allow_failed: bool = False,
) -> Session:
    """Open a bundle as a session with all streams at their start.

    Args:
        bundle: the directory written by nsm-export.
        target: a target that `nsm doctor` lists, or an alias (default: the first target in the bundle that passed
            its parity check and can be opened on this machine).
        device: device, for targets with several (default: the one the artifact was built for).
        threads: threads of the backend (default: one for a small model, which a second thread does not speed up; the
            backend's choice for others).
        precision: precision of the artifact: fp32, fp16, bf16, int8 or int8-weights (default: fp32 if the bundle has
            the target in fp32, otherwise the only one).
        allow_failed: whether to open an artifact that failed its parity check.

    Returns:
        A `Session`; use it in a `with` block or close it.

    Warns:
        UncheckedWarning: the artifact was never compared with its reference, for example because the hardware was
            missing.

    Raises:
        InputError: the bundle does not exist; it has no artifact for the target in that precision; or it has the
            target in several precisions without fp32, and `precision` is not given.
        ParityError: the artifact failed its parity check.
        BundleError: the bundle is damaged, or has another format version.
        MissingDependencyError: the backend is not installed; names the extra that installs it.
        DeviceUnavailableError: this machine lacks the hardware.
        NsmError: `target` is not given and none can be opened; this is the error of the first target.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads is at least 1; given {threads}.")
    opened = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    unavailable: UnsupportedError | None = None
    for artifact in _candidates(opened, target, precision):
        if not allow_failed:
            refuse_failed(opened.path, artifact)
        opened.verify(artifact.files)
        try:
            session = open_artifact(opened, artifact, device, threads)
        except (DeviceUnavailableError, MissingDependencyError) as error:
            unavailable = unavailable or error
            continue
        try:
            warn_unchecked(opened.path, artifact, stacklevel=2)
        except UncheckedWarning:  # a warning filter may turn warnings into errors
            session.close()
            raise
        return session
    assert unavailable is not None
    raise unavailable


def chosen_artifact(bundle: Bundle, target: str | None, precision: str | None = None) -> Artifact:
    """Return the artifact of a target and precision; see `open_bundle` for the defaults.

    Without a target, it is the first that passed and can run here. Targets with `asked_only` come last.

    Raises:
        InputError: the bundle has none; or it has several precisions of the target without fp32, and none is given.
        BundleDamagedError: a candidate that has to be opened for this choice is damaged.
    """
    first: Artifact | None = None
    for artifact in _candidates(bundle, target, precision):
        if target is not None or _fits_here(bundle, artifact):
            return artifact
        first = first or artifact
    assert first is not None
    return first


def _candidates(bundle: Bundle, target: str | None, precision: str | None) -> Iterator[Artifact]:
    """Return the candidates to open, one per target, the preferred first; at least one."""
    if target is not None:
        yield bundle.artifact(find_target(target).name, precision)
        return
    held = bundle.artifacts((), () if precision is None else (precision,))
    known = [item for item in held if item.parity.status == "passed" and item.target in TARGETS]
    if not known:
        unchecked = (item for item in held if item.parity.status == "not_run" and item.target in TARGETS)
        yield next(unchecked, None) or bundle.artifact(None, precision)
    for name in sorted(dict.fromkeys(item.target for item in known), key=lambda name: TARGETS[name].asked_only):
        yield bundle.preferred([item for item in known if item.target == name])


def _fits_here(bundle: Bundle, artifact: Artifact) -> bool:
    """Return whether the backend is installed and the processor fits; a GPU is checked by opening."""
    try:
        find_target(artifact.target).require()
        require_device(artifact.device, artifact.precision)
        if not artifact.device.lower().startswith("cpu"):
            bundle.verify(artifact.files)
            open_artifact(bundle, artifact).close()
    except (DeviceUnavailableError, MissingDependencyError):
        return False
    return True


def open_artifact(bundle: Bundle, artifact: Artifact, device: str | None = None, threads: int | None = None) -> Session:
    """Open a session on one artifact with verified files."""
    target = find_target(artifact.target)
    if device is not None and device.lower() not in target.devices:
        raise InputError(
            f"The target {target.name} has no device {device!r}. Its devices: {', '.join(target.devices)}."
        )
    require_device(artifact.device, artifact.precision)  # the artifact's own device, because it was built for it
    load = loader(target, artifact.options)
    spec = limited(target.served(bundle.manifest.spec), artifact.limit)
    recorded = entry_files(target, spec, [record.path for record in artifact.files], bundle.path)
    files = {entry: bundle.locate(path) for entry, path in recorded.items()}
    initial = bundle.state_init()  # before the runtime takes memory for states of the manifest's shapes
    threads = chosen_threads(threads, bundle.manifest.work)
    runtime = load(files, spec, (device or artifact.device).lower(), threads, artifact.precision)
    try:
        return Session(runtime, spec, initial, bundle.manifest.fingerprint, target.name, threads)
    except BaseException:
        with contextlib.suppress(RunError):  # the first error is the useful one
            runtime.close()
        raise


def loader(target: Target, options: Mapping[str, str]) -> Loader:
    """Return the target's function `load`, with these compile options.

    Raises:
        BundleDamagedError: the options are not in the target's `remedies`. A bundle may come from an untrusted source,
            and some compiler options name files.
    """
    load: Loader = target.runtime_module().load
    if not options:
        return load
    if dict(options) not in [dict(item) for item in target.remedies]:
        raise BundleDamagedError(
            f"The manifest gives the artifact of {target.name} the compile options {dict(options)}; expected "
            f"{' or '.join(str(dict(item)) for item in ({}, *target.remedies))}. Was it edited by hand? Export the "
            "bundle again."
        )
    return partial(target.runtime_module().load, options=options)


def limited(spec: StepSpec, limit: int | None) -> StepSpec:
    """Return the spec with its capacity reduced to this limit."""
    return spec if limit is None else replace(spec, capacity=min(limit, spec.capacity or limit))


def entry_files(target: Target, spec: StepSpec, written: Sequence[str], where: Path) -> dict[str, str]:
    """Return the file that a target opens for each entry.

    Args:
        target: target of the artifact.
        spec: spec of a session on the target.
        written: files of the artifact, relative to the bundle.
        where: the bundle, for the message.

    Raises:
        BundleDamagedError: a file is missing.
    """
    files = {}
    for entry in spec.entries:
        name = target.file(entry.name)
        path = next((path for path in written if PurePosixPath(path).name == name), None)
        if path is None:
            raise BundleDamagedError(
                f"{where}: the manifest lists no {name} for {target.name}. Export the bundle again."
            )
        files[entry.name] = path
    return files
