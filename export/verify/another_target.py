"""`nsm build`: add a target to an existing bundle, built from its ONNX graphs. Does not need torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from nsm.bundle import GRAPHS, Bundle
from nsm.errors import OutputExistsError
from nsm.export.verify.acceptance import Limits, build_checked
from nsm.export.verify.artifact import build_target, merge_parity, plan_targets
from nsm.export.verify.capacity import declared_counters, may_count, reach_of, shuffled, with_assumed_limit, with_limit
from nsm.manifest import Artifact
from nsm.quantization import read_calibration
from nsm.runtimes import Progress, find_target
from nsm.runtimes.opening import open_artifact
from nsm.runtimes.parity import check_budgets
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
    """Build a target from a bundle's ONNX graphs and add it to the bundle.

    Artifacts of other targets and precisions are kept. With `force`, the new artifact replaces an artifact of the same
    target and precision after it is complete and checked.

    Args:
        path: the bundle.
        name: name or alias of the target.
        device: one of the target's devices; None for the builder's default.
        progress: called with (done, total) while comparing.
        precision: precision of the artifact.
        limits: limits on the cost of low precision; None for the defaults.
        force: replace an existing artifact.

    Returns:
        The new artifact.

    Raises:
        InputError: the precision needs a calibration, and the bundle has none.
        OutputExistsError: the bundle has an artifact of this target and precision, and `force` is not set.
        BuildError: the target cannot be built.
        ParityError: the artifact is over budget.
        SlowerError: the artifact is not faster than fp32.
        NsmError: see `plan_targets` and `Bundle`.
    """
    (planned,) = plan_targets([name], precision, device)
    target = planned.target
    bundle = Bundle(path)
    bundle.verify()
    if limits is not None:
        check_budgets(limits.accepted, bundle.manifest.spec)
    if bundle.holds(target.name, precision) and not force:
        raise OutputExistsError(
            f"{path} already has an artifact for {target.name} in {precision}. Give --force to replace it."
        )
    static = planned.policy is not None and planned.policy.scheme == "static"
    calibration = read_calibration(bundle) if static else None
    with staged_copy(path) as stage:
        bundle = Bundle(stage)
        accepted = build_checked(bundle, planned, calibration, limits or Limits(), bundle.trace(), progress)
        artifact = accepted.artifact if accepted.failed else _limited(bundle, accepted.artifact)
        before = {item.label: item for item in bundle.manifest.artifacts}
        after = {**before, artifact.label: artifact}  # a replaced artifact keeps its position
        _remove_unused(stage, before.values(), after.values())
        merge_parity(bundle, [] if accepted.report is None else [accepted.report])
        failed = tuple(item for item in bundle.manifest.failed if item.target != target.name)
        write_manifest(stage, replace(bundle.manifest, artifacts=tuple(after.values()), failed=failed))
        accepted.require()
    return artifact


def _limited(bundle: Bundle, artifact: Artifact) -> Artifact:
    """Return the artifact with the limit of its counters, measured against the portable graph."""
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
    """Remove files that no artifact uses any more; the portable graphs stay."""
    gone = {record.path for item in before for record in item.files}
    gone -= {record.path for item in after for record in item.files}
    for path in sorted(stage / name for name in gone if PurePosixPath(name).parts[0] != GRAPHS):
        path.unlink(missing_ok=True)
        if path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()
