"""`nsm build`: another target for a bundle that is there, from its ONNX. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from nsm.bundle import GRAPHS, Bundle
from nsm.export.build import check_request, merge_parity, require_all
from nsm.export.guard import Limits, build_checked
from nsm.manifest import Artifact
from nsm.quantization.policy import find_policy
from nsm.quantization.recipe import read_calibration
from nsm.runtimes.parity import Progress
from nsm.runtimes.targets import find_target
from nsm.staging import staged_copy, write_manifest


def add_target(
    path: Path,
    name: str,
    device: str | None = None,
    progress: Progress | None = None,
    precision: str = "fp32",
    limits: Limits | None = None,
) -> Artifact:
    """Build a target from a bundle's ONNX into the bundle, on the machine that will run it. An artifact for the
    same target is replaced; until the new one is complete and checked, the bundle stays as it is.

    Raises:
        InputError: the bundle holds no calibration, and the precision needs one.
        BuildError, ParityError, SlowerError, and the errors of `check_request` and `Bundle`.
    """
    target = find_target(name)
    check_request([target], precision, device)
    bundle = Bundle(path)
    bundle.verify()
    policy = find_policy(target.name, precision)
    calibration = read_calibration(bundle) if policy is not None and policy.form == "static" else None
    with staged_copy(path) as stage:
        bundle = Bundle(stage)
        artifact, report = build_checked(
            bundle, target, device, precision, calibration, limits or Limits(), bundle.trace(), progress
        )
        kept = tuple(item for item in bundle.manifest.artifacts if item.target != target.name)
        _remove_unused(stage, bundle.manifest.artifacts, (*kept, artifact))
        merge_parity(bundle, [] if report is None else [report])
        failed = tuple(item for item in bundle.manifest.failed if item.target != target.name)
        write_manifest(stage, replace(bundle.manifest, artifacts=(*kept, artifact), failed=failed))
        require_all([artifact], [] if report is None else [report], False)
    return artifact


def _remove_unused(stage: Path, before: Iterable[Artifact], after: Iterable[Artifact]) -> None:
    """Remove the files of artifacts that none has any more; the portable graphs stay."""
    gone = {record.path for item in before for record in item.files}
    gone -= {record.path for item in after for record in item.files}
    for path in sorted(stage / name for name in gone if PurePosixPath(name).parts[0] != GRAPHS):
        path.unlink(missing_ok=True)
        if path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()
