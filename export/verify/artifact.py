"""Building a target's artifact from a bundle's ONNX, and checking it. Nothing here needs torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
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
from nsm.quantization import find_policy
from nsm.runtimes import Progress, Target, find_target
from nsm.runtimes.opening import open_artifact
from nsm.runtimes.parity import ParityReport, compare, find_budget, thresholds_of
from nsm.spec import StepSpec
from nsm.trace import Trace

CULPRITS = "most of the "
"""How the note begins that names the products at fault, of an artifact in low precision that failed."""

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8-weights")
"""Values of `--precision`; `nsm.quantization.policy` lists them by target."""


def check_request(targets: list[Target], precision: str, device: str | None) -> None:
    """Refuse a request that cannot be built, before any work is done.

    Raises:
        InputError: unknown precision or device, or none of the targets.
        UnsupportedError: a precision that one of the targets is not built in.
        MissingDependencyError: a target's package is not installed.
    """
    if not targets:
        raise InputError("No target was given. Name one with --target, for instance: --target openvino")
    check_precision(precision)
    for target in targets:
        find_policy(target.name, precision)
    if device is not None and not any(_knows(target, device) for target in targets):
        known = "; ".join(f"{target.name}: {', '.join(target.devices)}" for target in targets)
        raise InputError(f"None of the targets has a device {device!r}. Devices of {known}.")
    for target in targets:
        target.require()


def check_precision(name: str) -> None:
    """Raise `InputError` for a precision that there is not."""
    if name not in PRECISIONS:
        raise InputError(f"There is no precision {name!r}. Precisions: {', '.join(PRECISIONS)}.")


def _knows(target: Target, device: str) -> bool:
    return device.lower() in target.devices


def build_target(
    directory: Path,
    spec: StepSpec,
    target: Target,
    device: str | None,
    precision: str = "fp32",
    low: Path | None = None,
    folder: Path | None = None,
) -> Artifact:
    """Build one target's files in the bundle directory; its parity is not yet known.

    Args:
        directory: of the bundle, with its graphs.
        spec: of the model.
        target: to build.
        device: of the target, None for the builder's default.
        precision: of the artifact.
        low: where the graphs in that precision lie (default: the bundle's own are built).
        folder: where the files go (default: the target's own folder of that precision in the bundle).

    Raises:
        UnsupportedError: the target lacks an operator of the graphs.
        BuildError: the converter or builder failed; its log is kept and named. Or its process crashed; names the
            signal.
    """
    folder = folder or directory / target.place(precision)
    if folder not in (directory / GRAPHS, low):
        # A builder writes new files: those of a bundle that is being replaced may be links to files in use.
        shutil.rmtree(folder, ignore_errors=True)
    asked = device.lower() if device is not None and _knows(target, device) else None
    served = target.served(spec)
    options: Mapping[str, str] = {}
    target.require()
    if target.in_process:
        built: Built = target.builder_module().build(Request(directory, folder, served, asked, low))
    else:
        places = (str(directory), str(folder), None if low is None else str(low))
        tried = try_target(Trial(target, served, *places, asked, precision, target.trial_threads))
        built, options = _built(target, tried), tried.options
    return Artifact(
        target=target.name,
        device=built.device,
        precision=precision,
        effective_precision="unknown",  # until a session reads it back
        files=tuple(file_record(directory, name) for name in built.files),
        parity={"status": "not_run", "reason": "it was not compared yet"},
        notes=built.notes,
        options=options,
    )


def _built(target: Target, tried: Tried) -> Built:
    """The result of a child process; the notes mention a crash, and the compile options that avoid it."""
    reply = tried.reply
    if not tried.crash:
        return Built(reply.files, reply.device, reply.notes)
    note = (
        f"without {shown_options(tried.options)} the compiler of {target.name} crashed here ({tried.crash}): with this "
        "compile option every session opens it, and so must any other program that loads its files"
    )
    return Built(reply.files, reply.device, (*reply.notes, note))


def try_artifact(bundle: Bundle, artifact: Artifact) -> None:
    """Open an artifact in a child process, where its target says so: in another place its compiler may crash.

    Raises:
        BuildError: it crashed; names the signal.
    """
    target = find_target(artifact.target)
    if target.in_process or target.installed() is None:
        return
    places = (str(bundle.path.resolve()), str(bundle.path.resolve() / target.place(artifact.precision)), None)
    files = tuple(record.path for record in artifact.files)
    spec, threads = target.served(bundle.manifest.spec), target.trial_threads
    device, options = artifact.device, artifact.options
    try_opening(Trial(target, spec, *places, device, artifact.precision, threads, files, options))


def check_artifact(
    bundle: Bundle, artifact: Artifact, trace: Trace, progress: Progress | None = None
) -> tuple[Artifact, ParityReport | None]:
    """Replay the golden trace on an artifact, where its hardware is present.

    Returns:
        The artifact with its parity and effective precision; the report, None where it could not run.
    """
    try:
        session = open_artifact(bundle, artifact)
    except (DeviceUnavailableError, MissingDependencyError) as error:
        return replace(artifact, parity={"status": "not_run", "reason": str(error)}), None
    with session:
        thresholds = thresholds_of(bundle.manifest.model.get("config", {}))
        report = compare(trace, session, find_budget(artifact.precision), progress, thresholds)
        checked = replace(artifact, effective_precision=session.effective_precision, parity=summary(report))
    return checked, report


def summary(report: ParityReport) -> dict[str, Any]:
    """The part of a report that stands in the manifest."""
    data = report.to_json()
    keys = (
        "status",
        "source",
        "streams",
        "steps",
        "state_streams",
        "sampled_steps",
        "one_step",
        "free_run",
        "free_run_mean",
        "split",
        "staggered",
        "argmax_agreement",
        "unexcused_argmax_changes",
    )
    return {key: data[key] for key in keys}


def require_all(artifacts: list[Artifact], reports: list[ParityReport], require_parity: bool) -> None:
    """Raise `ParityError` if a comparison failed, or was not made although it was required."""
    for report in reports:
        if not report.passed:
            culprits = [note for item in artifacts if item.target == report.target for note in item.notes]
            culprits = [note for note in culprits if note.startswith(CULPRITS)]
            raise ParityError(" ".join([report.verdict(), *(f"{note[0].upper()}{note[1:]}." for note in culprits)]))
    missing = [item for item in artifacts if item.parity["status"] == "not_run"]
    if require_parity and missing:
        raise ParityError(
            f"--require-parity: {', '.join(item.target for item in missing)} could not be compared. "
            + missing[0].parity["reason"]
        )


def write_parity(directory: Path, reports: list[ParityReport]) -> None:
    """Write `parity.json`: the full reports."""
    _write_results(directory, [report.to_json() for report in reports])


def merge_parity(bundle: Bundle, reports: list[ParityReport]) -> None:
    """Update `parity.json`; the reports of other targets and precisions are kept.

    Raises:
        BundleDamagedError: it holds something else than reports.
    """
    new = {(report.target, report.precision): report.to_json() for report in reports}
    held = bundle.json(PARITY)
    old = [] if held is None else held.get("results") if isinstance(held, dict) else None
    if not isinstance(old, list) or not all(map(_is_report, old)):
        raise BundleDamagedError(
            f"{bundle.path / PARITY} is no object with the list results, of reports with target, precision and status. "
            "Was it edited by hand? Export the bundle again."
        )
    kept = [item for item in old if (item["target"], item["precision"]) not in new]
    _write_results(bundle.path, [*kept, *new.values()])


def _is_report(item: object) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("target", "precision", "status"))


def _write_results(directory: Path, results: list[dict[str, Any]]) -> None:
    passed = all(item["status"] == "passed" for item in results)
    write_json(directory / PARITY, {"passed": passed, "results": results})
