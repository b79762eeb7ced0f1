"""Results of checks that a bundle records: parity, quantization, speed; and messages for the user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nsm.errors import ConfigError


@dataclass(frozen=True)
class Message:
    """A message for the user: one or more sentences. A warning names a possible fault, an info states a fact."""

    text: str
    severity: Literal["info", "warning"] = "info"

    def __str__(self) -> str:
        return f"WARNING: {self.text}" if self.severity == "warning" else self.text


@dataclass(frozen=True)
class Quantiles:
    """Error quantiles of the worst tensor, the one with the largest 99th percentile."""

    p50: float
    p99: float
    max: float
    tensor: str


@dataclass(frozen=True)
class Ratio:
    """Median over rounds of one time over another, and its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x as fast [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class AcceptedBudget:
    """A budget of one tensor that the user accepted with `--budget`.

    Args:
        tensor: name of an output or a state.
        limit: limit of the 99th percentile of its errors: one-step, free-run, split and staggered.
        absolute: whether the limit, and the errors of the tensor, are largest absolute differences and not relative.
    """

    tensor: str
    limit: float
    absolute: bool = False

    def __str__(self) -> str:
        return f"{self.tensor}={'abs:' if self.absolute else ''}{self.limit:g}"


@dataclass(frozen=True)
class ParityResult:
    """The result of the parity check of an artifact, as the manifest records it; `parity.json` has all of it.

    Args:
        status: whether the artifact passed; "not_run" if it could not be compared on the machine of the export.
        reason: why it was not compared; None otherwise.
        others: see `nsm.runtimes.parity.ParityReport`; None if it was not compared. `split` and `staggered` are None
            as well for an artifact without such calls.

    Raises:
        ConfigError: "not_run" without a reason.
    """

    status: Literal["passed", "failed", "not_run"]
    reason: str | None = None
    source: str | None = None
    streams: int | None = None
    steps: int | None = None
    state_streams: int | None = None
    sampled_steps: tuple[int, ...] = ()
    one_step: Quantiles | None = None
    free_run: Quantiles | None = None
    free_run_mean: float | None = None
    split: Quantiles | None = None
    staggered: Quantiles | None = None
    argmax_agreement: float | None = None
    unexcused_argmax_changes: int | None = None

    def __post_init__(self) -> None:
        if self.status == "not_run" and not self.reason:
            raise ConfigError("The parity is not_run, without a reason.")

    @classmethod
    def not_run(cls, reason: str) -> ParityResult:
        """Return the result of an artifact that was not compared."""
        return cls("not_run", reason)


@dataclass(frozen=True)
class QuantizationResult:
    """The quantization of an artifact in low precision.

    Args:
        scheme: see `nsm.quantization.policy.Scheme`.
        quantized: names of the quantized linear ops; () if the backend chooses them.
        kept_in_fp32: reason by name of the linear op.
        calibration: summary of the calibration of a static scheme; None for others.
        speed: by entry, the time in fp32 over the time of the artifact; {} if it was not measured.
    """

    scheme: str
    quantized: tuple[str, ...] = ()
    kept_in_fp32: Mapping[str, str] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None
    speed: Mapping[str, Ratio] = field(default_factory=dict)

    def by_reason(self) -> dict[str, list[str]]:
        """Return the linear ops kept in fp32, grouped by reason."""
        found: dict[str, list[str]] = {}
        for name, reason in self.kept_in_fp32.items():
            found.setdefault(reason, []).append(name)
        return found
