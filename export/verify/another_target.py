"""`nsm build`: another target for a bundle that is there, from its ONNX. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from nsm.bundle import GRAPHS, Bundle
from nsm.errors import OutputExistsError
from nsm.export.verify.acceptance import Limits, build_checked
from nsm.export.verify.artifact import build_target, check_request, merge_parity, require_all
from nsm.export.verify.capacity import declared_counters, may_count, reach_of, shuffled, with_assumed_limit, with_limit
from nsm.manifest import Artifact
from nsm.quantization import find_policy, read_calibration
from nsm.runtimes import Progress, find_target
from nsm.runtimes.opening import open_artifact
from nsm.spec import VALID
from nsm.staging import staged_copy, write_manifest


def add_target(
    path: Path,
    name: str,
    device: str | None = None,
    progress: Progress | None = None,
    precision: str = "fp32",
    limits: Limits | None = None,
    force: bool = False,
) -> Artifact:
    """Build a target in a precision from a bundle's ONNX into the bundle, on the machine that will run it.

    Artifacts of other targets and precisions are kept. With `force`, an artifact of the same target and precision is
    replaced, after the new one is complete and checked.

    Raises:
        InputError: the bundle holds no calibration, and the precision needs one.
        OutputExistsError: the bundle holds such an artifact, and `force` is not set.
        BuildError, ParityError, SlowerError, and the errors of `check_request` and `Bundle`.
    """
    target = find_target(name)
    check_request([target], precision, device)
    bundle = Bundle(path)
    bundle.verify()
    if bundle.holds(target.name, precision) and not force:
        raise OutputExistsError(
            f"{path} holds an artifact for {target.name} in {precision} already. Give --force to replace it."
        )
    policy = find_policy(target.name, precision)
    calibration = read_calibration(bundle) if policy is not None and policy.scheme == "static" else None
    with staged_copy(path) as stage:
        bundle = Bundle(stage)
        artifact, report = build_checked(
            bundle, target, device, precision, calibration, limits or Limits(), bundle.trace(), progress
        )
        if report is None or report.passed:
            artifact = _limited(bundle, artifact)
        before = {item.label: item for item in bundle.manifest.artifacts}
        after = {**before, artifact.label: artifact}  # one that is replaced keeps its place
        _remove_unused(stage, before.values(), after.values())
        merge_parity(bundle, [] if report is None else [report])
        failed = tuple(item for item in bundle.manifest.failed if item.target != target.name)
        write_manifest(stage, replace(bundle.manifest, artifacts=tuple(after.values()), failed=failed))
        require_all([artifact], [] if report is None else [report], False)
    return artifact


def _limited(bundle: Bundle, artifact: Artifact) -> Artifact:
    """The artifact with the limit of its counters, beside the portable graph as it is written."""
    spec = bundle.manifest.spec
    if not may_count(spec):
        return artifact
    plain = find_target("onnx")
    if plain.installed() is None:
        return with_assumed_limit(artifact, declared_counters(spec, bundle.state_init()), spec.capacity)
    (tokens,) = (value for name, value in bundle.trace().inputs.items() if name != VALID)
    free = Bundle(bundle.path)
    free.manifest = replace(bundle.manifest, spec=replace(spec, capacity=None))
    with open_artifact(free, build_target(bundle.path, spec, plain, None)) as reference:
        calls = shuffled(list(tokens.reshape(len(tokens), -1, *tokens.shape[3:])), spec)
        return with_limit(bundle, artifact, reference, reach_of(reference, calls, spec.capacity))


def _remove_unused(stage: Path, before: Iterable[Artifact], after: Iterable[Artifact]) -> None:
    """Remove the files of artifacts that none has any more; the portable graphs stay."""
    gone = {record.path for item in before for record in item.files}
    gone -= {record.path for item in after for record in item.files}
    for path in sorted(stage / name for name in gone if PurePosixPath(name).parts[0] != GRAPHS):
        path.unlink(missing_ok=True)
        if path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()
