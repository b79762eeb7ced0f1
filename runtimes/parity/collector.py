"""Findings: collect the measurements of a comparison and make the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from nsm.results import AcceptedBudget, Quantiles
from nsm.runtimes.parity.argmax import Agreement, Answers
from nsm.runtimes.parity.budgets import Budget
from nsm.runtimes.parity.drift import drift_exponent
from nsm.runtimes.parity.mask_decisions import Decisions, decided_masks
from nsm.runtimes.parity.metrics import absolute_error, gain, mean, quantile, relative_error, rms_norm, slot_errors
from nsm.runtimes.parity.report import FLOORS, AgeError, Curves, Divergence, Gain, ParityReport, Spread, over_budget
from nsm.runtimes.parity.slot_age import errors_by_age, recorded_ages
from nsm.runtimes.session import Session
from nsm.spec import VALID, StepSpec
from nsm.trace import Array, Arrays, Trace


class _Slots(NamedTuple):
    """Ages and free-run errors of the active slots of one bank, at one sampled step of one stream; [slots] each."""

    bank: str
    ages: Array
    errors: Array


class Findings:
    """Errors by kind (such as "one_step") and tensor, as [stream, step] arrays that start as NaN.

    Args:
        trace: golden trace of the reference.
        spec: spec of the model.
        budget: budget of the artifact's precision.
        thresholds: thresholds of the model's mask decisions; see `nsm.runtimes.parity.mask_decisions`.
        accepted: budgets of single tensors that replace those of `budget`.
    """

    def __init__(
        self,
        trace: Trace,
        spec: StepSpec,
        budget: Budget,
        thresholds: Sequence[float] = (),
        accepted: Sequence[AcceptedBudget] = (),
    ) -> None:
        self.trace = trace
        self._accepted = {item.tensor: item for item in accepted}
        self.budget = budget
        self.failures: list[str] = []
        self.logits = spec.entry("step").outputs[0].name
        self._usual = {name: rms_norm(value) for name, value in ({**trace.outputs, **trace.after}).items()}
        self._floors = trace.conditioning if budget.precision == "fp32" else {}
        bound = self._bound()
        self._decisions = Decisions(trace, decided_masks(spec), thresholds, bound)
        kinds = ["one_step", "free_run", *(["split"] if spec.has("decode") else [])]
        kinds += ["staggered"] if spec.batch > 1 else []
        self._inexact = [s.name for s in spec.states if s.numpy_dtype.kind == "f"]
        self._exact = [
            s.name for s in spec.states if s.name not in self._inexact and s.name not in self._decisions.masks
        ]
        shape = (trace.streams, trace.steps)
        self._errors = {
            # Split calls have the outputs of `decode`: the first one, without debug outputs.
            kind: {n: np.full(shape, np.nan) for n in ([self.logits] if kind == "split" else trace.outputs)}
            | {n: np.full(shape, np.nan) for n in self._inexact}
            for kind in kinds
        }
        masks = {name: name.removesuffix(".bank") + ".mask" for name in spec.state_names if name.endswith(".bank")}
        self._masks = {bank: mask for bank, mask in masks.items() if mask in spec.state_names}
        self._ages = {bank: recorded_ages(trace, mask) for bank, mask in self._masks.items()}
        self._slots: list[_Slots] = []
        self._answers = Answers(trace.outputs[self.logits], bound)
        self._mismatches = 0
        self._changed = False
        self._mask_decisions = 0
        self._steps_run = 0
        # Steps after an excused mask decision, where the stream differs from the reference and is not compared.
        self._dropped = {kind: np.zeros(shape, bool) for kind in kinds}
        self._strayed = {kind: np.zeros(trace.streams, bool) for kind in kinds}

    @property
    def decides(self) -> bool:
        """Whether the model makes mask decisions, so that its masks are compared after every step."""
        return bool(self._decisions.masks)

    # -- collecting ----------------------------------------------------------------------------------------------

    def add_outputs(self, kind: str, streams: Array, step: int, outputs: Arrays) -> None:
        """Compare the outputs of a call. Lane i ran `streams[i]`; further lanes are ignored."""
        trace = self.trace
        for lane, stream in enumerate(streams.tolist()):
            if self._dropped[kind][stream, step]:
                continue
            self._steps_run += kind == "free_run"
            kept = self._kept(stream, step)
            for name in outputs:
                wanted = trace.outputs[name][stream, step][kept].astype(np.float64)
                given = outputs[name][lane][trace.positions[kept]].astype(np.float64)
                self._errors[kind][name][stream, step] = self._error(name, given, wanted)
                if kind == "free_run" and name == self.logits and wanted.size:
                    self._answers.add(stream, step, trace.positions[kept], wanted, given)

    def add_decisions(self, kind: str, streams: Array, step: int, states: Arrays) -> None:
        """Compare the decided masks after a step; call it before `add_states` of the same step."""
        # A single step starts from the reference's state. In the other runs a stream that has diverged stays excluded.
        alone = kind == "one_step"
        for lane, stream in enumerate(streams.tolist()):
            if self._dropped[kind][stream, step]:
                continue
            given = {name: states[name][lane] for name in self._decisions.masks}
            differing = self._decisions.differing(stream, step, given)
            if not differing:
                continue
            if (alone or not self._strayed[kind][stream]) and self._decisions.excused(stream, step, differing):
                self._mask_decisions += kind == "free_run"
                self._dropped[kind][stream, step : step + 1 if alone else None] = True
            else:
                self._strayed[kind][stream] = True
                self._mismatches += sum(int(slots.sum()) for slots in differing.values())

    def add_states(self, kind: str, streams: Array, index: int, states: Arrays) -> None:
        """Compare the states after the sampled step `index`."""
        trace, step = self.trace, int(self.trace.sampled[index])
        for lane, stream in enumerate(streams[streams < trace.state_streams].tolist()):
            given = {name: states[name][lane] for name in trace.after}
            for name in self._exact:
                self._mismatches += int((trace.after[name][stream, index] != given[name]).sum())
                self._changed |= bool((given[name] != trace.before[name][stream, index]).any())
            if self._dropped[kind][stream, step]:
                continue
            for name in self._inexact:
                wanted = trace.after[name][stream, index]
                self._errors[kind][name][stream, step] = self._error(name, given[name], wanted)
                self._changed |= bool((given[name] != trace.before[name][stream, index]).any())
                if kind == "free_run" and name in self._masks:
                    self._add_slots(name, stream, index, given[name])

    def _add_slots(self, name: str, stream: int, index: int, given: Array) -> None:
        active = self.trace.after[self._masks[name]][stream, index]
        banks = (given, self.trace.after[name][stream, index])
        slots = (np.moveaxis(bank, -2, 0)[active].reshape(active.sum(), -1) for bank in banks)
        self._slots.append(_Slots(name, self._ages[name][stream, index][active], slot_errors(*slots)))

    def _kept(self, stream: int, step: int) -> Array:
        """Return which of the recorded positions are valid tokens."""
        positions = self.trace.positions
        valid = self.trace.inputs.get(VALID)
        return np.ones(len(positions), bool) if valid is None else positions < valid[stream, step]

    # -- reporting -----------------------------------------------------------------------------------------------

    @property
    def mismatches(self) -> int:
        """Number of mask and counter entries that differ and are not excused."""
        return self._mismatches

    def errors(self, kind: str) -> Arrays:
        """Relative errors by tensor, [N, T]; NaN where nothing was compared."""
        return {name: np.where(self._dropped[kind], np.nan, value) for name, value in self._errors[kind].items()}

    def worst(self, kind: str) -> Quantiles:
        """Return the quantiles of the tensor with the largest 99th percentile of relative errors."""
        errors = self.errors(kind)
        relative = {name: error for name, error in errors.items() if not self._absolute(name)}
        errors = relative or errors
        tensor = max(errors, key=lambda name: np.nan_to_num(quantile(errors[name], 0.99), nan=-1.0))
        return Quantiles(*_quantiles(errors[tensor]), tensor)

    def report(self, session: Session) -> ParityReport:
        """Return the report of all measurements, with those over budget as failures."""
        trace, answers = self.trace, self._answers.agreement(self._dropped["free_run"])
        errors = {kind: self.errors(kind) for kind in self._errors}
        logits = errors["free_run"][self.logits]
        slots = np.concatenate([item.errors for item in self._slots]) if self._slots else self._state_errors()
        gains = {name: gain(part, errors["one_step"][name]) for name, part in errors["free_run"].items()}
        report = ParityReport(
            target=session.target,
            precision=self.budget.precision,
            effective_precision=session.effective_precision,
            source=trace.source,
            streams=trace.streams,
            steps=trace.steps,
            state_streams=trace.state_streams,
            sampled_steps=tuple(trace.sampled.tolist()),
            one_step=self.worst("one_step"),
            free_run=self.worst("free_run"),
            split=self.worst("split") if "split" in errors else None,
            staggered=self.worst("staggered") if "staggered" in errors else None,
            per_tensor={
                name: {f"{kind}_p99": quantile(part[name], 0.99) for kind, part in errors.items() if name in part}
                | {"gain": gains[name]}
                | {f"{kind}_floor": part[name] for kind, part in trace.conditioning.items() if name in part}
                for name in errors["free_run"]
            },
            free_run_mean=mean(logits),
            gain=max(
                (Gain(ratio, name) for name, ratio in gains.items() if not np.isnan(ratio)),
                key=lambda item: item.ratio,
                default=None,
            ),
            drift=drift_exponent(logits[~self._dropped["free_run"].any(1)]),
            state_error_p99=quantile(slots, 0.99),
            state_error_max=quantile(slots, 1.0),
            state_error_by_layer=self._by_layer(),
            state_error_by_age=self._by_age(),
            argmax_agreement=1.0 - float(answers.argmax_changes.mean()),
            excused_argmax_changes=int(answers.excused.sum()),
            unexcused_argmax_changes=int((answers.argmax_changes & ~answers.excused).sum()),
            argmax_changes=answers.listed,
            kl_mean=float(answers.kl.mean()),
            kl_p999=quantile(answers.kl, 0.999),
            mask_mismatches=self._mismatches,
            mask_decisions=self._mask_decisions,
            mask_decisions_per_1000_steps=1000 * self._mask_decisions / max(self._steps_run, 1),
            first_divergence=self._first_divergence(),
            limits={kind: {name: self._limit(kind, name) for name in part} for kind, part in errors.items()},
            conditioning_floor=max(
                (c for name, c in trace.conditioning.get("free_run", {}).items() if name not in self._accepted),
                default=None,
            ),
            accepted=tuple(self._accepted.values()),
            bound=self._bound(),
            budget=self.budget,
            curves=self._curves(answers),
        )
        failures = [*self.failures, *self._vacuous(), *over_budget(report, len(answers.argmax_changes))]
        return replace(report, failures=tuple(failures))

    def _limit(self, kind: str, tensor: str) -> float:
        """Return the limit of an error: the accepted budget, else that of the precision or, in fp32, four floors."""
        if tensor in self._accepted:
            return self._accepted[tensor].limit
        own = self.budget.one_step_p99 if kind == "one_step" else self.budget.free_run_p99
        floor = self._floors.get("one_step" if kind == "one_step" else "free_run", {}).get(tensor, 0.0)
        return max(own, FLOORS * floor)

    def _bound(self) -> float:
        """Return the limit of the free-run error of the first output, relative to what is usual for it."""
        limit, usual = self._limit("free_run", self.logits), self._usual[self.logits]
        return limit / usual if self._absolute(self.logits) and usual else limit

    def _absolute(self, tensor: str) -> bool:
        return tensor in self._accepted and self._accepted[tensor].absolute

    def _error(self, tensor: str, given: Array, wanted: Array) -> float:
        if self._absolute(tensor):
            return absolute_error(given, wanted)
        return relative_error(given, wanted, self._usual[tensor])

    def furthest(self, kind: str) -> tuple[Quantiles, float]:
        """Return the quantiles of the tensor with the largest share of its limit, and the limit."""
        errors = self.errors(kind)
        shares = {name: quantile(part, 0.99) / self._limit(kind, name) for name, part in errors.items()}
        tensor = max(shares, key=lambda name: np.nan_to_num(shares[name], nan=-1.0))
        return Quantiles(*_quantiles(errors[tensor]), tensor), self._limit(kind, tensor)

    def _by_layer(self) -> Mapping[str, Spread]:
        parts = {name: [item.errors for item in self._slots if item.bank == name] for name in self._masks}
        return {name: Spread(*_quantiles(np.concatenate(errors))) for name, errors in parts.items() if errors}

    def _by_age(self) -> tuple[AgeError, ...]:
        return errors_by_age([item.ages for item in self._slots], [item.errors for item in self._slots])

    def _state_errors(self) -> Array:
        values = [self.errors("free_run")[name] for name in self._inexact]
        return np.stack(values) if values else np.full(1, np.nan)

    def _vacuous(self) -> list[str]:
        """Required comparisons that were not made."""
        reasons = []
        for kind in self._errors:
            for name, errors in self.errors(kind).items():
                if np.isnan(errors).all():
                    reasons.append(f"{name} was never compared ({kind})")
        if self._inexact and not self._changed:
            reasons.append("no state ever changed")
        return reasons

    def _first_divergence(self) -> Divergence | None:
        candidates = [
            Divergence(int(stream), int(step), name, float(errors[stream, step]))
            for name, errors in self.errors("free_run").items()
            for stream, step in np.argwhere(errors > self._limit("free_run", name))
        ]
        return min(candidates, key=lambda item: (item.step, item.stream), default=None)

    def _curves(self, answers: Agreement) -> Curves:
        free_run, one_step = self.errors("free_run"), self.errors("one_step")
        by_step = free_run[self.logits].T
        return Curves(
            free_run_p50=np.array([quantile(values, 0.5) for values in by_step]),
            free_run_p99=np.array([quantile(values, 0.99) for values in by_step]),
            sampled=self.trace.sampled,
            one_step_p50=np.array([quantile(values, 0.5) for values in one_step[self.logits].T[self.trace.sampled]]),
            states={name: self._largest(free_run[name]) for name in self._inexact},
            one_step={name: self._largest(one_step[name]) for name in self._inexact},
            margins=answers.margins,
            argmax_changes=answers.argmax_changes,
            excused_margin=answers.bound,
        )

    def _largest(self, errors: Array) -> Array:
        """[n], over the streams, at the sampled steps."""
        return np.array([quantile(values, 1.0) for values in errors.T[self.trace.sampled]])


def _quantiles(values: Array) -> tuple[float, float, float]:
    return quantile(values, 0.5), quantile(values, 0.99), quantile(values, 1.0)
