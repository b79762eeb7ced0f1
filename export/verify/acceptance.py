"""The acceptance check: build an artifact, compare it over whole streams and, in low precision, measure its speed.

If the error of low precision is over budget, the check keeps the linear ops that contribute most to the error in fp32,
one after the other, up to `max_fp32_share`. If low precision is not faster than fp32 by the rule of
`nsm.runtimes.bench.rounds.not_faster`, the check rejects it.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from nsm.bundle import GRAPHS, Bundle
from nsm.decode import encode
from nsm.errors import InputError, MissingDependencyError, SlowerError
from nsm.export.verify.artifact import Acceptance, TargetPlan, build_target, check_artifact
from nsm.manifest import Artifact
from nsm.quantization import Calibration, check_trace
from nsm.results import AcceptedBudget, QuantizationResult, Ratio
from nsm.runtimes import Progress
from nsm.runtimes.bench import bench, not_faster, paired_ratio
from nsm.runtimes.opening import CPU_DOT, int8_dot_products, open_artifact
from nsm.runtimes.parity import ParityReport
from nsm.spec import VALID
from nsm.trace import Array, Trace

DRIFT_STEPS = 200
"""Calls per stream in the check of low precision: fewer do not show whether the error grows with the stream."""
SPEED_STEPS = 250
"""Timed calls per artifact in the speed check: ten rounds, enough for an interval."""
SENSITIVITY_STEPS = 48
"""Calls per stream over which the error of a single linear op is measured."""
_LOW, _BASE, _TRIAL = ".low", ".fp32", ".trial"


@dataclass(frozen=True)
class Limits:
    """Limits that an artifact must keep.

    Args:
        max_fp32_share: largest share of the weights, 0 .. 1, that the acceptance check may keep in fp32.
        allow_slower: accept an artifact that is not faster than fp32.
        accepted: parity budgets of single tensors, of any precision.

    Raises:
        InputError: the share is not in 0 .. 1.
    """

    max_fp32_share: float = 0.3
    allow_slower: bool = False
    accepted: tuple[AcceptedBudget, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_fp32_share <= 1.0:
            raise InputError(f"--max-fp32-share must be in 0 .. 1; given {self.max_fp32_share}.")


def build_checked(
    bundle: Bundle,
    planned: TargetPlan,
    calibration: Calibration | None,
    limits: Limits,
    trace: Trace,
    progress: Progress | None = None,
) -> Acceptance:
    """Build a target in a bundle's directory, compare it with the trace, and measure its speed.

    Args:
        bundle: the bundle with the portable graphs.
        planned: the artifact to build.
        calibration: scales for static quantization; None for other schemes.
        limits: limits on the cost of low precision.
        trace: the golden trace.
        progress: called with (done, total) while comparing.

    Returns:
        The artifact and its parity report, passed or not.

    Raises:
        BuildError: the converter or builder failed.
        UnsupportedError: the model has no op for low precision, or its states explode.
        MissingDependencyError: onnx is not installed.
        SlowerError: the artifact is not faster than the same target in fp32.
    """
    if planned.policy is None:
        artifact = build_target(bundle.path, bundle.manifest.spec, planned.target, planned.device)
        return check_artifact(bundle, replace(artifact, accepted=limits.accepted), trace, progress)
    check_trace(trace)
    maker = Maker(bundle, planned, calibration)
    try:
        accepted = maker.within_budget(trace, limits, progress)
        artifact, report = accepted.artifact, accepted.report
        if report is not None and trace.steps < min(DRIFT_STEPS, _most_steps(bundle)):
            artifact = replace(artifact, notes=(*artifact.notes, judged_briefly(trace.steps)))
        if report is not None and report.passed:
            speed = maker.speed(artifact, trace)
            assert artifact.quantization is not None
            artifact = replace(artifact, quantization=replace(artifact.quantization, speed=speed))
            short = not_faster(speed["step"], speed.get("decode"))
            if short and not limits.allow_slower:
                raise SlowerError(maker.complaint(short), [encode(artifact)])
    finally:
        maker.clean()
    return replace(accepted, artifact=artifact)


def _most_steps(bundle: Bundle) -> int:
    """Return the most calls of a stream: `DRIFT_STEPS`, or the model's capacity in calls."""
    spec = bundle.manifest.spec
    return DRIFT_STEPS if spec.capacity is None else spec.capacity // spec.entry("step").tokens


def judged_briefly(steps: int) -> str:
    """Return the note for low precision that was checked over fewer calls than `DRIFT_STEPS`."""
    return (
        f"checked over {steps} calls per stream: fewer than {DRIFT_STEPS} do not show whether its error grows with the "
        f"stream. For longer streams, export with --golden-steps {DRIFT_STEPS} or more"
    )


@dataclass(frozen=True)
class Alone:
    """The error of one linear op in low precision, with all others in fp32.

    Args:
        drift: mean free-run error of the first output.
        per_tensor: 99th percentiles, see `ParityReport`.
    """

    drift: float
    per_tensor: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Over:
    """The measurement of a report that is furthest over its budget.

    Args:
        kind: "one_step", "free_run", "split" or "staggered"; "" if no tensor is over budget, but argmax changes or KL.
        tensor: name of the tensor; "" if `kind` is "".
    """

    kind: str
    tensor: str

    @classmethod
    def of(cls, report: ParityReport) -> Over:
        """Return the tensor and kind of error with the largest ratio of error to budget."""
        shares = {
            (kind, name): _infinite_if_nan(report.per_tensor[name][f"{kind}_p99"]) / limit
            for kind, limits in report.limits.items()
            for name, limit in limits.items()
        }
        kind, tensor = max(shares, key=lambda key: shares[key])
        return cls(kind, tensor) if shares[kind, tensor] > 1.0 else cls("", "")

    def share(self, alone: Alone) -> float:
        """Return the error of this kind that one linear op causes alone; infinity if unknown."""
        error = alone.per_tensor.get(self.tensor, {}).get(f"{self.kind}_p99", np.nan) if self.kind else alone.drift
        return _infinite_if_nan(error)

    def __str__(self) -> str:
        return f"{self.kind.replace('_', '-')} error of {self.tensor}" if self.kind else "drift"


class Maker:
    """Builds one artifact in low precision, with some linear ops kept in fp32."""

    def __init__(self, bundle: Bundle, planned: TargetPlan, calibration: Calibration | None) -> None:
        assert planned.policy is not None
        self.bundle, self.calibration = bundle, calibration
        self.target, self.device, self.precision = planned.target, planned.device, planned.precision
        self.policy = planned.policy
        self.lowered = None
        if self.policy.scheme != "backend":
            if importlib.util.find_spec("onnx") is None:
                raise MissingDependencyError(
                    f"{self.precision} rewrites the bundle's graphs with the package onnx, which is not installed. "
                    'Install it with: pip install "nsm-toolkit[quantize]"'
                )
            from nsm.export.graphs import check_step, linear_ops_of_step

            check_step(bundle, self.target.name, self.precision, self.policy)
            self.lowered = linear_ops_of_step(bundle.path, self.policy)

    def build(self, excluded: Mapping[str, str], folder: str | None = None) -> Artifact:
        """Build the artifact with the linear ops of `excluded` (key -> reason) kept in fp32."""
        directory, spec = self.bundle.path, self.bundle.manifest.spec
        place = directory / (folder or self.target.place(self.precision))
        if self.lowered is None:
            artifact = build_target(directory, spec, self.target, self.device, self.precision, folder=place)
            return replace(artifact, quantization=QuantizationResult(self.policy.scheme), notes=self._notes(artifact))
        from nsm.export.graphs import write_graphs

        low = place if self.target.folder == GRAPHS else directory / _LOW
        write_graphs(directory, low, spec, self.policy, self.calibration, excluded)
        artifact = build_target(directory, spec, self.target, self.device, self.precision, low, place)
        names = {linear_op.key: linear_op.node for linear_op in self.lowered.low}
        kept = {**self.lowered.kept, **{names[key]: reason for key, reason in excluded.items()}}
        static = self.policy.scheme == "static" and self.calibration is not None
        result = QuantizationResult(
            self.policy.scheme,
            tuple(linear_op.node for linear_op in self.lowered.low if linear_op.key not in excluded),
            kept,
            self.calibration.summary() if static and self.calibration is not None else None,
        )
        return replace(artifact, quantization=result, notes=self._notes(artifact))

    def within_budget(self, trace: Trace, limits: Limits, progress: Progress | None) -> Acceptance:
        """Keep linear ops in fp32, worst first, until the artifact is within budget or at the limit."""
        excluded: dict[str, str] = {}
        alone: Mapping[str, Alone] = {}
        while True:
            artifact = replace(self.build(excluded), accepted=limits.accepted)
            accepted = check_artifact(self.bundle, artifact, trace, progress)
            report = accepted.report
            if report is None or report.passed or self.lowered is None:
                return accepted
            if report.effective_precision != self.precision:  # keeping ops in fp32 does not fix a wrong precision
                return accepted
            alone = alone or self._alone(trace)
            over = Over.of(report)
            candidates = [
                key
                for key in alone
                if key not in excluded and self.lowered.fp32_share({*excluded, key}) <= limits.max_fp32_share
            ]
            if not candidates:
                culprits = self._culprits(over, alone)
                artifact = accepted.artifact
                return Acceptance(replace(artifact, notes=(*artifact.notes, culprits)), report, culprits)
            worst = max(candidates, key=lambda key: over.share(alone[key]))
            excluded[worst] = f"alone it causes a {over} of {over.share(alone[worst]):.2g}"

    def speed(self, artifact: Artifact, trace: Trace) -> dict[str, Ratio]:
        """Measure the speed of `step` and `decode` relative to the target's fp32, in one process, in turns."""
        directory, spec = self.bundle.path, self.bundle.manifest.spec
        folder = directory / (GRAPHS if self.target.folder == GRAPHS else _BASE)
        base = build_target(directory, spec, self.target, self.device, folder=folder)
        with open_artifact(self.bundle, base) as exact, open_artifact(self.bundle, artifact) as low:
            before, after = bench([exact, low], SPEED_STEPS, _calls(trace, spec.batch))
        found = {"step": paired_ratio(before.rounds_us, after.rounds_us)}
        if before.decode is not None and after.decode is not None:
            found["decode"] = paired_ratio(before.decode.rounds_us, after.decode.rounds_us)
        return found

    def complaint(self, short: Mapping[str, Ratio]) -> str:
        """Return the error message for an artifact that is not faster than fp32 in these entries."""
        found = ", ".join(f"{entry} {ratio}" for entry, ratio in short.items())
        in_int8 = self.policy.scheme in ("static", "dynamic") and "cpu" in self.target.devices
        reason = (
            "The likely cause: this processor has neither VNNI nor dotprod, the instructions for fast int8 linear ops. "
            if in_int8 and int8_dot_products() is False
            else ""
        )
        return (
            f"{self.target.name} in {self.precision} is not faster than in fp32 on this machine: {found}. {reason}Use "
            "fp32, try another precision, or give --allow-slower if you need the smaller size."
        )

    def clean(self) -> None:
        """Remove intermediate files."""
        for name in (_LOW, _BASE, _TRIAL):
            shutil.rmtree(self.bundle.path / name, ignore_errors=True)

    def _alone(self, trace: Trace) -> dict[str, Alone]:
        """Measure the error of each linear op alone in low precision; by key."""
        assert self.lowered is not None
        short = trace.first(min(trace.steps, SENSITIVITY_STEPS))
        found = {}
        for linear_op in self.lowered.low:
            others = {other.key: "" for other in self.lowered.low if other.key != linear_op.key}
            # Build in a separate folder: the artifact that is over budget stays unchanged.
            report = check_artifact(self.bundle, self.build(others, _TRIAL), short).report
            found[linear_op.key] = (
                Alone(np.nan, {}) if report is None else Alone(report.free_run_mean, report.per_tensor)
            )
        return found

    def _culprits(self, over: Over, alone: Mapping[str, Alone]) -> str:
        assert self.lowered is not None
        names = {linear_op.key: linear_op.node for linear_op in self.lowered.low}
        ranked = sorted(alone, key=lambda key: -over.share(alone[key]))
        worst = ", ".join(f"{names[key]} ({over.share(alone[key]):.2g})" for key in ranked[:3])
        return f"most of the {over} comes from {worst}"

    def _notes(self, artifact: Artifact) -> tuple[str, ...]:
        notes = [*artifact.notes, self.policy.note]
        if self.policy.saturation_safe and self.policy.scheme in ("static", "dynamic") and int8_dot_products():
            notes.append(
                f"for processors with VNNI or dotprod only, --device {CPU_DOT} is more exact, and may keep fewer "
                "linear ops in fp32"
            )
        return tuple(note for note in notes if note)


def _infinite_if_nan(value: float) -> float:
    return value if np.isfinite(value) else np.inf


def _calls(trace: Trace, batch: int) -> Array:
    """Return the recorded inputs for the benchmark, [T, B, K, ...]."""
    (tokens,) = (value for name, value in trace.inputs.items() if name != VALID)
    lanes = tokens[np.resize(np.arange(len(tokens)), batch)]
    return np.moveaxis(lanes, 0, 1)
