"""ParityReport: the result of a comparison, and whether it is within the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from nsm.decode import encode
from nsm.errors import ParityError
from nsm.manifest import artifact_label
from nsm.results import AcceptedBudget, ParityResult, Quantiles
from nsm.runtimes.parity.budgets import Budget
from nsm.runtimes.parity.drift import Drift
from nsm.trace import Array

_NAMES = {
    "one_step": "one-step error p99 of {}",
    "free_run": "free-run error p99 of {}",
    "split": "error p99 of {} in split calls",
    "staggered": "error p99 of {} in lanes of different age",
}
_WRONG = 100.0
"""An fp32 error of this many limits is not caused by rounding."""

MASK_DECISIONS_PER_1000 = 1.0
"""Limit of excused mask decisions per 1000 steps in fp32."""


FLOORS = 4.0
"""In fp32 a tensor passes if its error is within the budget or within this many of its conditioning floors."""
WORST_FLOOR = 1e-2
"""Largest conditioning floor of a model that can be compared: beyond it, any two implementations differ."""


@dataclass(frozen=True)
class Spread:
    """Median, 99th percentile and maximum of errors."""

    p50: float
    p99: float
    max: float


@dataclass(frozen=True)
class AgeError:
    """Free-run error of the active slots that are `start` to `end` steps old, both inclusive."""

    start: int
    end: int
    p50: float
    p99: float


@dataclass(frozen=True)
class Curves:
    """Data of the diagrams in the HTML report, too large for its JSON. NaN where nothing was compared.

    Args:
        free_run_p50, free_run_p99: [T], of the first output over the streams, by step.
        sampled: [n], the steps at which single steps and states were compared.
        one_step_p50: [n], of the first output over the streams whose states were kept.
        states: by state name, [n]: the largest free-run error over the streams.
        one_step: by state name, [n]: the same of the one-step error.
        margins: [decisions], the reference's margin of the argmax, in units of the rms of its first output.
        argmax_changes: [decisions] bool, True where the target has another argmax.
        excused_margin: an argmax change at a margin up to this is excused; same unit.
    """

    free_run_p50: Array
    free_run_p99: Array
    sampled: Array
    one_step_p50: Array
    states: Mapping[str, Array]
    one_step: Mapping[str, Array]
    margins: Array
    argmax_changes: Array
    excused_margin: float


@dataclass(frozen=True)
class Divergence:
    """Position at which the error first exceeds the budget."""

    stream: int
    step: int
    tensor: str
    error: float


@dataclass(frozen=True)
class Gain:
    """Largest ratio over the tensors of median free-run error to median one-step error, on the same samples."""

    ratio: float
    tensor: str


@dataclass(frozen=True)
class ArgmaxChange:
    """A token for which target and reference have different argmaxes; see `nsm.runtimes.parity.argmax`.

    Args:
        stream, step: position in the trace, counted from 0.
        token: index of the token in the call.
        decision: index of the argmax among those of the token; 0 if it has one.
        reference, target: their argmaxes.
        margin: margin of the reference, in units of the rms of its output.
        excused: whether the margin is within the bound from the budget.
    """

    stream: int
    step: int
    token: int
    decision: int
    reference: int
    target: int
    margin: float
    excused: bool

    def __str__(self) -> str:
        which = f", decision {self.decision}" if self.decision else ""
        return (
            f"stream {self.stream}, step {self.step}, token {self.token}{which}: {self.target} instead of "
            f"{self.reference} (margin {self.margin:.2e})"
        )


@dataclass(frozen=True)
class ParityReport:
    """The result of a comparison; `failures` is empty if it passed.

    Outputs of the free run are compared for all `streams` at all `steps`; one-step errors, and errors of states, for
    the first `state_streams` of them at the `sampled_steps`, counted from 0.
    Errors are relative. `split` is that of calls in pieces, None where the artifact has one entry only. `staggered` is
    that of lanes of different age, None where it has one lane. `state_error` is per active slot of the banks (per
    tensor in models without one), over the free run; KL is in nats.
    `free_run_mean` is the mean over streams and steps of the free-run error of the first output.
    `state_error_by_layer` and `state_error_by_age` split the error of the banks' active slots; see
    `nsm.runtimes.parity.slot_age`. `per_tensor` holds by name the 99th percentiles and the gain of every output and
    state, `gain` the largest of these; None where single steps have no error.
    The argmax is over the last axis of the first output: one per token, or several if a token has several rows.
    `argmax_agreement` counts every argmax change, `excused_argmax_changes` those within the reference's own margin;
    `argmax_changes` lists the first ones, unexcused before excused. `mask_mismatches` counts entries of masks and
    counters that differ without excuse, at every step that is compared; `mask_decisions` the excused mask decisions of
    the free run that differ, `mask_decisions_per_1000_steps` the same per 1000 of its calls; see
    `nsm.runtimes.parity.mask_decisions`.
    `limits` has the limit of the 99th percentile by kind of error and tensor: the budget, or in fp32 `FLOORS`
    conditioning floors if that is more. `accepted` are budgets that the user set instead; with an absolute one, the
    errors of the tensor are absolute. `conditioning_floor` is the largest free-run floor of the other tensors, None if
    the trace has none; `per_tensor` has all of them. `bound` is the limit of the free-run error of the first output,
    relative to what is usual for it: argmax changes and KL depend on it.
    """

    target: str
    precision: str
    effective_precision: str
    source: str
    streams: int
    steps: int
    state_streams: int
    sampled_steps: tuple[int, ...]
    one_step: Quantiles
    free_run: Quantiles
    split: Quantiles | None
    staggered: Quantiles | None
    per_tensor: Mapping[str, Mapping[str, float]]
    free_run_mean: float
    gain: Gain | None
    drift: Drift | None
    state_error_p99: float
    state_error_max: float
    state_error_by_layer: Mapping[str, Spread]
    state_error_by_age: tuple[AgeError, ...]
    argmax_agreement: float
    excused_argmax_changes: int
    unexcused_argmax_changes: int
    argmax_changes: tuple[ArgmaxChange, ...]
    kl_mean: float
    kl_p999: float
    mask_mismatches: int
    mask_decisions: int
    mask_decisions_per_1000_steps: float
    first_divergence: Divergence | None
    limits: Mapping[str, Mapping[str, float]]
    conditioning_floor: float | None
    accepted: tuple[AcceptedBudget, ...]
    bound: float
    budget: Budget
    curves: Curves = field(repr=False, compare=False)
    failures: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def coverage(self) -> str:
        """The extent of the comparison, as text."""
        return (
            f"{_counted(self.streams, 'stream')} of {_counted(self.steps, 'step')} ({self.source}), states of "
            f"{self.state_streams} at {len(self.sampled_steps)} of the steps"
        )

    @property
    def argmax_changes_left_off(self) -> int:
        """The number of argmax changes that are not listed."""
        return max(0, self.unexcused_argmax_changes + self.excused_argmax_changes - len(self.argmax_changes))

    def require(self) -> None:
        """Raise `ParityError` unless the comparison passed."""
        if not self.passed:
            raise ParityError(self.verdict())

    @property
    def label(self) -> str:
        """The name of the artifact in its bundle."""
        return artifact_label(self.target, self.precision)

    def verdict(self) -> str:
        """Return a one-sentence summary; for a failure, also the likely cause."""
        if self.passed:
            return f"Parity passed on {self.target} {self.precision}."
        found = f"Parity failed on {self.target} {self.precision}: " + "; ".join(self.failures) + "."
        return " ".join(filter(None, (found, self._cause())))

    def _cause(self) -> str:
        """Return the likely cause of errors over the limits; "" if there are none."""
        shares = [
            self.per_tensor[name][f"{kind}_p99"] / limit
            for kind, limits in self.limits.items()
            for name, limit in limits.items()
        ]
        worst = max((math.inf if math.isnan(share) else share for share in shares), default=0.0)
        if worst <= 1.0:
            return ""
        if self.conditioning_floor is not None and self.conditioning_floor > WORST_FLOOR:
            return (
                "The model amplifies rounding over these streams. Compare over as many tokens as it was trained on "
                "(--golden-steps), or train it on longer streams."
            )
        if self.source == "synthetic":
            return (
                "The sequences are random, and may drive the model where real data never does: give real sequences "
                "with --data."
            )
        if self.precision == "fp32" and worst > _WRONG:
            return (
                "Rounding does not cause an error of this size, so an operator is probably wrong on this target. Find "
                "it in the bundle that was kept: nsm parity BUNDLE.failed --bisect"
            )
        return ""

    @property
    def excused_by_conditioning(self) -> tuple[str, ...]:
        """Tensors whose error is over the budget and passes because of their conditioning floor."""
        budgets = {"one_step": self.budget.one_step_p99}
        accepted = [item.tensor for item in self.accepted]
        return tuple(
            sorted(
                {
                    name
                    for kind, limits in self.limits.items()
                    for name, limit in limits.items()
                    if name not in accepted
                    and budgets.get(kind, self.budget.free_run_p99) < self.per_tensor[name][f"{kind}_p99"] <= limit
                }
            )
        )

    def result(self) -> ParityResult:
        """Return the part of the report that the manifest records."""
        return ParityResult(
            "passed" if self.passed else "failed",
            source=self.source,
            streams=self.streams,
            steps=self.steps,
            state_streams=self.state_streams,
            sampled_steps=self.sampled_steps,
            one_step=self.one_step,
            free_run=self.free_run,
            free_run_mean=self.free_run_mean,
            split=self.split,
            staggered=self.staggered,
            argmax_agreement=self.argmax_agreement,
            unexcused_argmax_changes=self.unexcused_argmax_changes,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the report with stable keys as a JSON object; non-finite numbers become null."""
        drift = self.drift
        data: dict[str, Any] = encode(
            {
                "target": self.target,
                "precision": self.precision,
                "effective_precision": self.effective_precision,
                "status": "passed" if self.passed else "failed",
                "failures": list(self.failures),
                "source": self.source,
                "streams": self.streams,
                "steps": self.steps,
                "state_streams": self.state_streams,
                "sampled_steps": list(self.sampled_steps),
                "one_step": asdict(self.one_step),
                "free_run": asdict(self.free_run),
                "split": None if self.split is None else asdict(self.split),
                "staggered": None if self.staggered is None else asdict(self.staggered),
                "free_run_mean": self.free_run_mean,
                "gain": None if self.gain is None else asdict(self.gain),
                "drift_exponent": None if drift is None else drift.exponent,
                "drift_interval": None if drift is None else [drift.low, drift.high],
                "state_error": {"p99": self.state_error_p99, "max": self.state_error_max},
                "state_error_by_layer": {name: asdict(item) for name, item in self.state_error_by_layer.items()},
                "state_error_by_age": [
                    {"from": item.start, "to": item.end, "p50": item.p50, "p99": item.p99}
                    for item in self.state_error_by_age
                ],
                "argmax_agreement": self.argmax_agreement,
                "excused_argmax_changes": self.excused_argmax_changes,
                "unexcused_argmax_changes": self.unexcused_argmax_changes,
                "argmax_changes": [asdict(change) for change in self.argmax_changes],
                "argmax_changes_left_off": self.argmax_changes_left_off,
                "kl": {"mean": self.kl_mean, "p999": self.kl_p999},
                "mask_mismatches": self.mask_mismatches,
                "mask_decisions": self.mask_decisions,
                "mask_decisions_per_1000_steps": self.mask_decisions_per_1000_steps,
                "first_divergence": None if self.first_divergence is None else asdict(self.first_divergence),
                "conditioning_floor": self.conditioning_floor,
                "excused_by_conditioning": list(self.excused_by_conditioning),
                "per_tensor": {name: dict(values) for name, values in self.per_tensor.items()},
                "budget": asdict(self.budget),
                "accepted": [asdict(item) for item in self.accepted],
            }
        )
        return data


@dataclass(frozen=True)
class Bisection:
    """The operation or state at fault.

    Args:
        kind: "operation", "state", or "none" where nothing is over budget.
        name: the tensor: of the portable graph for an operation, else an output or a state.
        error: its one-step error (p99), for a state the free-run error (p99) of the worst tensor.
        budget: the limit of that error.
        explanation: a sentence or two for people.
        op, node: type and name of the operation that gives the tensor, None where none can be named.
        replaced: by state name, the free-run error (p99 of the worst tensor) with that state replaced.
        all_replaced: the same with all of them replaced: the residual error accumulated between samples.
    """

    kind: Literal["operation", "state", "none"]
    name: str
    error: float
    budget: float
    explanation: str
    op: str | None = None
    node: str | None = None
    replaced: Mapping[str, float] = field(default_factory=dict)
    all_replaced: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the finding as a JSON object; non-finite numbers become null."""
        data: dict[str, Any] = encode(self)
        return data


def over_budget(report: ParityReport, decisions: int) -> list[str]:
    """Return one sentence per measurement over budget; `decisions` is the number of compared argmaxes."""
    budget = report.budget
    allowed_agreement = 1.0 - report.unexcused_argmax_changes / decisions
    checks = [(_NAMES[kind].format(*worst[:1]), *worst[1:]) for kind, worst in _worst(report).items()]
    # KL is about half the squared error of the first output.
    scale = (report.bound / budget.free_run_p99) ** 2
    checks.append(("KL mean", report.kl_mean, budget.kl_mean * scale))
    checks.append(("KL p99.9", report.kl_p999, budget.kl_p999 * scale))
    # `not <=` instead of `>`: NaN is over every budget.
    failures = [f"{name} is {value:.3g}, the budget {limit:.3g}" for name, value, limit in checks if not value <= limit]
    floor = report.conditioning_floor
    if budget.precision == "fp32" and floor is not None and not floor <= WORST_FLOOR:
        failures.append(
            f"the model amplifies rounding: its conditioning floor is {floor:.2g}, so no fp32 implementation can "
            f"reproduce these streams (at most {WORST_FLOOR:g} is allowed)"
        )
    if not allowed_agreement >= budget.agreement:
        failures.append(
            f"{report.unexcused_argmax_changes} of {decisions} decisions have another argmax without excuse "
            f"(agreement {allowed_agreement:.4%}, the budget {budget.agreement:.2%})"
        )
    if report.mask_mismatches:
        failures.append(f"{report.mask_mismatches} entries of masks or counters differ")
    if budget.precision == "fp32" and not report.mask_decisions_per_1000_steps <= MASK_DECISIONS_PER_1000:
        failures.append(
            f"differing mask decisions: {report.mask_decisions:,}, {report.mask_decisions_per_1000_steps:.3g} per 1000 "
            f"steps; at most {MASK_DECISIONS_PER_1000:g} is allowed (a trace needs 1000 steps in all to allow one)"
        )
    if report.effective_precision != report.precision:
        failures.append(f"the backend computes in {report.effective_precision} instead of {report.precision}")
    return failures


def _worst(report: ParityReport) -> dict[str, tuple[str, float, float]]:
    """Return by kind the tensor with the largest share of its limit, its 99th percentile and its limit."""
    found = {}
    for kind, limits in report.limits.items():
        errors = {name: report.per_tensor[name][f"{kind}_p99"] for name in limits}
        # A tensor that was not compared is reported elsewhere.
        known = {name: error for name, error in errors.items() if not math.isnan(error)}
        if known:
            name = max(known, key=lambda tensor: known[tensor] / limits[tensor])
            found[kind] = name, known[name], limits[name]
    return found


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"
