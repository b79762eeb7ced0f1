"""ParityReport: what a comparison found, and whether that is within budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from nsm.errors import ParityError
from nsm.runtimes.budgets import Budget
from nsm.runtimes.drift import Drift


@dataclass(frozen=True)
class Quantiles:
    """Of the worst tensor: the one with the largest 99th percentile."""

    p50: float
    p99: float
    max: float
    tensor: str


@dataclass(frozen=True)
class Divergence:
    """Where the error first exceeds the budget."""

    stream: int
    step: int
    tensor: str
    error: float


@dataclass(frozen=True)
class ParityReport:
    """What a comparison found; `failures` is empty where it passed.

    Errors are relative; `split` is that of calls in pieces, None where the artifact has one entry only; `state_error`
    is per active slot of the banks (per tensor in models without one), over the free run; KL is in nats.
    `argmax_agreement` counts every flip, `excused_flips` those within the reference's own margin. `mask_mismatches`
    counts entries of masks and counters that differ.
    """

    target: str
    precision: str
    effective_precision: str
    source: str
    streams: int
    steps: int
    one_step: Quantiles
    free_run: Quantiles
    split: Quantiles | None
    per_tensor: Mapping[str, Mapping[str, float]]
    drift: Drift | None
    state_error_p99: float
    state_error_max: float
    argmax_agreement: float
    excused_flips: int
    unexcused_flips: int
    kl_mean: float
    kl_p999: float
    mask_mismatches: int
    first_divergence: Divergence | None
    reference_floor: float
    budget: Budget
    failures: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        return not self.failures

    def require(self) -> None:
        """Raise `ParityError` unless the comparison passed."""
        if not self.passed:
            raise ParityError(f"Parity failed on {self.target} {self.precision}: " + "; ".join(self.failures) + ".")

    def to_json(self) -> dict[str, Any]:
        """The report under the keys that other tools rely on; numbers that are not finite become null."""
        drift = self.drift
        data: dict[str, Any] = _finite(
            {
                "target": self.target,
                "precision": self.precision,
                "effective_precision": self.effective_precision,
                "status": "passed" if self.passed else "failed",
                "failures": list(self.failures),
                "source": self.source,
                "streams": self.streams,
                "steps": self.steps,
                "one_step": asdict(self.one_step),
                "free_run": asdict(self.free_run),
                "split": None if self.split is None else asdict(self.split),
                "gain": _ratio(self.free_run.p50, self.one_step.p50),
                "drift_exponent": None if drift is None else drift.exponent,
                "drift_interval": None if drift is None else [drift.low, drift.high],
                "state_error": {"p99": self.state_error_p99, "max": self.state_error_max},
                "argmax_agreement": self.argmax_agreement,
                "excused_flips": self.excused_flips,
                "unexcused_flips": self.unexcused_flips,
                "kl": {"mean": self.kl_mean, "p999": self.kl_p999},
                "mask_mismatches": self.mask_mismatches,
                "first_divergence": None if self.first_divergence is None else asdict(self.first_divergence),
                "reference_floor": self.reference_floor,
                "per_tensor": {name: dict(values) for name, values in self.per_tensor.items()},
                "budget": asdict(self.budget),
            }
        )
        return data


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
