"""Several targets in one export: keep the targets that passed; the manifest lists the others with the reason."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from nsm.bundle import GRAPHS
from nsm.errors import NsmError, ParityError
from nsm.export.verify.artifact import Acceptance, write_parity
from nsm.manifest import Artifact, FailedTarget, Manifest
from nsm.staging import FAILED_SUFFIX, staged, write_manifest


@dataclass(frozen=True)
class Outcome:
    """The outcome of one target.

    Args:
        target: name of the target.
        accepted: the artifact with its report; None if it was not built.
        error: why the target is not kept; None if it is kept.
    """

    target: str
    accepted: Acceptance | None = None
    error: NsmError | None = None

    @classmethod
    def of(cls, accepted: Acceptance, require_parity: bool) -> Outcome:
        """Return the outcome of a built target, with the error of a failed or missing required comparison."""
        try:
            accepted.require(require_parity)
        except ParityError as error:
            return cls(accepted.artifact.target, accepted, error)
        return cls(accepted.artifact.target, accepted)


def settle(stage: Path, output: Path, manifest: Manifest, outcomes: Sequence[Outcome], strict: bool) -> NsmError | None:
    """Write the manifest and the reports of the kept targets.

    If other targets failed the comparison, all files are also kept as `{output}.failed`, beside the bundle.

    Args:
        stage: folder in which the bundle is written.
        output: final path of the bundle.
        manifest: the manifest without artifacts.
        outcomes: outcomes of all targets. If no target is kept, all are written, and the caller moves them aside.
        strict: keep no target if one failed.

    Returns:
        The error of the first failed target, or None.

    Raises:
        NsmError: no target is kept. The first `ParityError` is raised, which has evidence; otherwise the first error.
    """
    good = [item for item in outcomes if item.error is None]
    bad = [item for item in outcomes if item.error is not None]
    if not good or (strict and bad):
        _write(stage, manifest, outcomes)
        raise next((item.error for item in bad if isinstance(item.error, ParityError)), None) or _first(bad)
    if not bad:
        _write(stage, manifest, good)
        return None
    error = _first(bad)
    kept_as = ""
    if any(item.accepted is not None for item in bad):
        aside = output.with_name(output.name + FAILED_SUFFIX)
        with staged(aside, force=True) as evidence:
            shutil.copytree(stage, evidence, copy_function=_link, dirs_exist_ok=True)
            _write(evidence, manifest, outcomes)
        kept_as = f" The targets that failed the comparison are kept in {aside}."
    _remove_unused(stage, [item.accepted.artifact for item in good if item.accepted is not None])
    failed = tuple(FailedTarget(item.target, str(item.error), _code(item)) for item in bad)
    _write(stage, replace(manifest, failed=failed), good)
    others = "".join(f" {item.target} failed too: {item.error}" for item in bad[1:])
    error.args = (
        f"{bad[0].target}: {error}{others}{kept_as} {output} was written with the targets that passed: "
        f"{', '.join(item.target for item in good)}. --strict writes all targets or none.",
    )
    return error


def _first(bad: Sequence[Outcome]) -> NsmError:
    error = bad[0].error
    assert error is not None
    return error


def _code(item: Outcome) -> int:
    assert item.error is not None
    return item.error.exit_code


def _write(directory: Path, manifest: Manifest, outcomes: Sequence[Outcome]) -> None:
    accepted = [item.accepted for item in outcomes if item.accepted is not None]
    write_parity(directory, [item.report for item in accepted if item.report is not None])
    write_manifest(directory, replace(manifest, artifacts=tuple(item.artifact for item in accepted)))


def _remove_unused(stage: Path, artifacts: Sequence[Artifact]) -> None:
    """Remove the files of failed targets; the portable graphs stay."""
    used = {record.path for artifact in artifacts for record in artifact.files}
    for folder, _, names in os.walk(stage, topdown=False):
        inside = PurePosixPath(Path(folder).relative_to(stage))
        if inside.parts and inside.parts[0] != GRAPHS:
            for name in names:
                if (inside / name).as_posix() not in used:
                    Path(folder, name).unlink()
            if not os.listdir(folder):
                Path(folder).rmdir()


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
