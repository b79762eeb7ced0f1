"""Build a target's artifact from a bundle's ONNX graphs, and check it. Does not need torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nsm.bundle import GRAPHS, PARITY, Bundle
from nsm.errors import (
    BundleDamagedError,
    DeviceUnavailableError,
    InputError,
    MissingDependencyError,
    ParityError,
)
from nsm.export.builders import Built, Request
from nsm.export.verify.isolation import Trial, Tried, shown_options, try_opening, try_target
from nsm.files import write_json
from nsm.manifest import Artifact, file_record
from nsm.quantization import Policy, find_policy
from nsm.results import ParityResult
from nsm.runtimes import Progress, Target, find_target
from nsm.runtimes.opening import open_artifact
from nsm.runtimes.parity import ParityReport, compare, find_budget, thresholds_of
from nsm.spec import StepSpec
from nsm.trace import Trace

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8-weights")
"""Values of `--precision`; `nsm.quantization.policy` lists them by target."""


@dataclass(frozen=True)
class TargetPlan:
    """One artifact to build.

    Args:
        target: the target.
        device: one of the target's devices; None for the builder's default.
        precision: one of `PRECISIONS`.
        policy: quantization policy; None for fp32.
    """

    target: Target
    device: str | None
    precision: str
    policy: Policy | None


@dataclass(frozen=True)
class Acceptance:
    """The result of building and checking one artifact.

    Args:
        artifact: the artifact, with its parity.
        report: the parity report; None if the artifact cannot run here.
        culprits: for low precision over budget, a phrase that names the linear ops with the largest error; else "".
    """

    artifact: Artifact
    report: ParityReport | None
    culprits: str = ""

    @property
    def failed(self) -> bool:
        return self.report is not None and not self.report.passed

    def require(self, require_parity: bool = False) -> None:
        """Raise `ParityError` if the comparison failed or, with `require_parity`, was not made."""
        if self.report is None:
            if require_parity:
                raise ParityError(
                    f"--require-parity: {self.artifact.target} could not be compared. {self.artifact.parity.reason}"
                )
        elif not self.report.passed:
            culprits = f" {self.culprits[0].upper()}{self.culprits[1:]}." if self.culprits else ""
            raise ParityError(self.report.verdict() + culprits)


def plan_targets(names: Sequence[str], precision: str, device: str | None) -> tuple[TargetPlan, ...]:
    """Check that targets, precision and device can be built, before any work is done.

    Args:
        names: names or aliases of targets; a target that is named twice is built once.
        precision: one of `PRECISIONS`.
        device: a device of at least one of the targets; the others use their default.

    Raises:
        InputError: no target, or an unknown precision or device.
        UnsupportedError: a target does not support the precision.
        MissingDependencyError: a target's package is not installed.
    """
    targets = [find_target(name) for name in dict.fromkeys(find_target(name).name for name in names)]
    if not targets:
        raise InputError("No target was given. Give one, for instance: --target openvino")
    check_precision(precision)
    asked = None if device is None else device.lower()
    devices = [asked if asked in target.devices else None for target in targets]
    policies = [find_policy(target.name, precision, own) for target, own in zip(targets, devices, strict=True)]
    if device is not None and not any(devices):
        known = "; ".join(f"{target.name}: {', '.join(target.devices)}" for target in targets)
        raise InputError(f"No target has the device {device!r}. Expected one of {known}.")
    for target in targets:
        target.require()
    found = zip(targets, devices, policies, strict=True)
    return tuple(TargetPlan(target, own, precision, policy) for target, own, policy in found)


def check_precision(name: str) -> None:
    """Raise `InputError` for an unknown precision."""
    if name not in PRECISIONS:
        raise InputError(f"Unknown precision {name!r}. Expected one of: {', '.join(PRECISIONS)}.")


def build_target(
    directory: Path,
    spec: StepSpec,
    target: Target,
    device: str | None,
    precision: str = "fp32",
    low: Path | None = None,
    folder: Path | None = None,
) -> Artifact:
    """Build one target's files in the bundle directory; do not compare them yet.

    Args:
        directory: the bundle's directory, with its graphs.
        spec: the spec of the model.
        target: the target to build.
        device: one of the target's devices; None for the builder's default.
        precision: precision of the artifact.
        low: folder of the graphs in that precision (default: the bundle's fp32 graphs).
        folder: output folder (default: the target's folder for that precision in the bundle).

    Returns:
        The artifact, with parity "not_run".

    Raises:
        UnsupportedError: the target lacks an operator of the graphs.
        BuildError: the converter or builder failed (the message names its log), or its process crashed (the message
            names the signal).
    """
    folder = folder or directory / target.place(precision)
    if folder not in (directory / GRAPHS, low):
        # Delete the files instead of overwriting them: they may be hard links to files of a bundle in use.
        shutil.rmtree(folder, ignore_errors=True)
    served = target.served(spec)
    options: Mapping[str, str] = {}
    target.require()
    if target.in_process:
        built: Built = target.builder_module().build(Request(directory, folder, served, device, low))
    else:
        places = (str(directory), str(folder), None if low is None else str(low))
        tried = try_target(Trial(target, served, *places, device, precision, target.trial_threads))
        built, options = _built(target, tried), tried.options
    return Artifact(
        target=target.name,
        device=built.device,
        precision=precision,
        effective_precision="unknown",  # until a session reads it back
        files=tuple(file_record(directory, name) for name in built.files),
        parity=ParityResult.not_run("not compared yet"),
        notes=built.notes,
        options=options,
    )


def _built(target: Target, tried: Tried) -> Built:
    """Return the result of a child process, with a note if compile options avoided a crash."""
    reply = tried.reply
    if not tried.crash:
        return Built(reply.files, reply.device, reply.notes)
    note = (
        f"without {shown_options(tried.options)} the compiler of {target.name} crashed here ({tried.crash}): every "
        "session sets this compile option, and any other program that loads the files must set it too"
    )
    return Built(reply.files, reply.device, (*reply.notes, note))


def try_artifact(bundle: Bundle, artifact: Artifact) -> None:
    """Open an artifact in a child process: on another machine the target's compiler may crash.

    Targets with `in_process` set compile nothing, and are not tried.

    Raises:
        BuildError: the child crashed; the message names the signal.
    """
    target = find_target(artifact.target)
    if target.in_process or target.installed() is None:
        return
    places = (str(bundle.path.resolve()), str(bundle.path.resolve() / target.place(artifact.precision)), None)
    files = tuple(record.path for record in artifact.files)
    spec, threads = target.served(bundle.manifest.spec), target.trial_threads
    device, options = artifact.device, artifact.options
    try_opening(Trial(target, spec, *places, device, artifact.precision, threads, files, options))


def check_artifact(bundle: Bundle, artifact: Artifact, trace: Trace, progress: Progress | None = None) -> Acceptance:
    """Replay the golden trace on an artifact, if its hardware is present.

    Args:
        bundle: the bundle with the artifact.
        artifact: the artifact to check.
        trace: the golden trace.
        progress: called with (done, total) while comparing.

    Returns:
        The artifact with its parity and effective precision, and the report.
    """
    try:
        session = open_artifact(bundle, artifact)
    except (DeviceUnavailableError, MissingDependencyError) as error:
        return Acceptance(replace(artifact, parity=ParityResult.not_run(str(error))), None)
    with session:
        thresholds = thresholds_of(bundle.manifest.model.get("config", {}))
        budget = find_budget(artifact.precision)
        report = compare(trace, session, budget, progress, thresholds, artifact.accepted)
        checked = replace(artifact, effective_precision=session.effective_precision, parity=report.result())
    return Acceptance(checked, report)


def write_parity(directory: Path, reports: list[ParityReport]) -> None:
    """Write the full reports to `parity.json`."""
    _write_results(directory, [report.to_json() for report in reports])


def merge_parity(bundle: Bundle, reports: list[ParityReport]) -> None:
    """Update `parity.json`; keep the reports of other targets and precisions.

    Raises:
        BundleDamagedError: the file does not contain reports.
    """
    new = {(report.target, report.precision): report.to_json() for report in reports}
    held = bundle.json(PARITY)
    old = [] if held is None else held.get("results") if isinstance(held, dict) else None
    if not isinstance(old, list) or not all(map(_is_report, old)):
        raise BundleDamagedError(
            f"Invalid {bundle.path / PARITY}: expected an object with the list results, whose items have target, "
            "precision and status. Export the bundle again."
        )
    kept = [item for item in old if (item["target"], item["precision"]) not in new]
    _write_results(bundle.path, [*kept, *new.values()])


def _is_report(item: object) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("target", "precision", "status"))


def _write_results(directory: Path, results: list[dict[str, Any]]) -> None:
    passed = all(item["status"] == "passed" for item in results)
    write_json(directory / PARITY, {"passed": passed, "results": results})
