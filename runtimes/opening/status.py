"""Parity status of an artifact: refuse a failed one, warn of one that was never compared."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

from nsm.errors import ParityError, UncheckedWarning
from nsm.manifest import Artifact


def refuse_failed(path: Path, artifact: Artifact) -> None:
    """Raise `ParityError` if an artifact of the bundle at `path` failed its parity check."""
    if artifact.parity.status != "failed":
        return
    error = artifact.parity.free_run
    measured = "" if error is None or not math.isfinite(error.p99) else f" (free-run error {error.p99:.2g})"
    raise ParityError(
        f"The artifact {artifact.label} in {path} failed its parity check{measured}: its outputs are not those of the "
        f"model. See nsm parity {path} --target {artifact.target}, and export the model again. To open it anyway, "
        "for example to find the fault: nsm.open(..., allow_failed=True), nsm run --allow-failed."
    )


def warn_unchecked(path: Path, artifact: Artifact, stacklevel: int) -> None:
    """Warn of an artifact that was never compared; `stacklevel` as for `warnings.warn` in the caller."""
    if artifact.parity.status == "not_run":
        warnings.warn(
            f"The artifact {artifact.label} in {path} was never compared with its reference: "
            f"{artifact.parity.reason} Compare it here: nsm parity {path} --target {artifact.target}",
            UncheckedWarning,
            stacklevel=stacklevel + 1,
        )
