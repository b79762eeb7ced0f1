"""Parity: whether the artifact is the model that was recorded, over whole streams.

Two errors are measured against a golden trace. *One-step*: the target is stepped from the reference's state, so
the error is that of one call. *Free-run*: the target lives on its own state from the first step to the last, as it
will in the field, so the error is what rounding has become by then. Both are relative,

    ||target - reference|| / max(||reference||, 0.01 * rms over the trace of ||reference||),

per stream, step and tensor, for every output and every state. A comparison of nothing is a failure.

Where the artifact has more entries than `step`, the first steps are run a third time, *split*: token by token through
`decode` and `commit`, in turn with `step`; outputs and states must be those of the trace within the free-run budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from nsm.errors import InputError, NonFiniteError
from nsm.runtimes.budgets import Budget
from nsm.runtimes.drift import drift_exponent
from nsm.runtimes.measures import kl_divergence, quantile, relative_error, rms_norm, slot_errors
from nsm.runtimes.report import Divergence, ParityReport, Quantiles
from nsm.runtimes.session import Session
from nsm.spec import VALID, StepSpec
from nsm.trace import Array, Arrays, Trace

SPLIT_STEPS = 4
"""Steps that are run again in pieces."""

Progress = Callable[[int, int], None]
"""(steps done, steps in all) of a comparison."""


def compare(trace: Trace, session: Session, budget: Budget, progress: Progress | None = None) -> ParityReport:
    """Replay a trace on a session and report; the session's streams are reset before and after.

    Args:
        trace: recorded from the reference.
        session: over the artifact, with any number of lanes.
        budget: of the artifact's precision.
        progress: called after every step.

    Raises:
        InputError: the trace is of another model or of another shape than the session takes, or is empty.
    """
    _check_comparable(trace, session)
    found = _Findings(trace, session.spec)
    free, stepped = _groups(trace.streams, session.batch), _groups(trace.state_streams, session.batch)
    runs = [(_free_run, free), (_one_step, stepped)]
    total = len(free) * trace.steps + len(stepped) * len(trace.sampled)
    if session.spec.has("decode"):
        # One group of streams is enough: the lanes of a graph do the same.
        runs.append((_split_run, free[:1]))
        total += min(trace.steps, SPLIT_STEPS)
    done = 0
    try:
        for run, groups in runs:
            for streams in groups:
                for _ in run(trace, session, streams, found):
                    done += 1
                    if progress is not None:
                        progress(done, total)
    except NonFiniteError as error:
        found.failures.append(f"the target produced NaN or infinity ({error})")
    finally:
        session.reset()
    if not session.is_fresh():
        found.failures.append("a reset does not return to the initial state")
    return found.report(session, budget)


def _groups(streams: int, batch: int) -> list[Array]:
    """The streams in groups of up to `batch`, to run side by side."""
    return [np.arange(start, min(start + batch, streams)) for start in range(0, streams, batch)]


def _free_run(trace: Trace, session: Session, streams: Array, found: _Findings) -> Iterator[None]:
    """From the initial state to the last step, on the target's own state."""
    lanes = np.resize(streams, session.batch)  # spare lanes repeat a stream, and are not looked at
    sampled = {int(step): index for index, step in enumerate(trace.sampled)}
    session.reset()
    for step in range(trace.steps):
        found.add_outputs("free_run", streams, step, _step(trace, session, lanes, step))
        if step in sampled:
            found.add_states("free_run", streams, sampled[step], session.read_state())
        yield


def _one_step(trace: Trace, session: Session, streams: Array, found: _Findings) -> Iterator[None]:
    """One step from each sampled state of the reference."""
    lanes = np.resize(streams, session.batch)
    for index, step in enumerate(trace.sampled):
        session.load_state({name: value[lanes, index] for name, value in trace.before.items()})
        found.add_outputs("one_step", streams, int(step), _step(trace, session, lanes, int(step)))
        found.add_states("one_step", streams, index, session.read_state())
        yield


def _split_run(trace: Trace, session: Session, streams: Array, found: _Findings) -> Iterator[None]:
    """The first steps again, every other one token by token."""
    lanes = np.resize(streams, session.batch)
    sampled = {int(step): index for index, step in enumerate(trace.sampled)}
    session.reset()
    for step in range(min(trace.steps, SPLIT_STEPS)):
        inputs = {name: value[lanes, step] for name, value in trace.inputs.items()}
        counts = inputs.pop(VALID, None)
        (tokens,) = inputs.values()
        if step % 2:
            outputs = session.feed(tokens, counts)
        else:
            parts = []
            for index in range(tokens.shape[1]):
                valid = None if counts is None else (counts > index).astype(np.int64)
                valid = valid if session.spec.entry("decode").input(VALID) is not None else None
                parts.append(session.decode(tokens[:, index : index + 1], valid))
            outputs = {name: np.concatenate([part[name] for part in parts], 1) for name in parts[0]}
        found.add_outputs("split", streams, step, {found.logits: outputs[found.logits]})
        if step in sampled:
            found.add_states("split", streams, sampled[step], session.read_state())
        yield


def _step(trace: Trace, session: Session, lanes: Array, step: int) -> Arrays:
    inputs = {name: value[lanes, step] for name, value in trace.inputs.items()}
    valid = inputs.pop(VALID, None)
    (tokens,) = inputs.values()
    return session.step(tokens, valid)


class _Findings:
    """Errors by kind ("one_step", "free_run") and tensor, as [stream, step] arrays that start as NaN."""

    def __init__(self, trace: Trace, spec: StepSpec) -> None:
        self.trace = trace
        self.failures: list[str] = []
        self.logits = spec.entry("step").outputs[0].name
        self.exact = [s.name for s in spec.states if s.numpy_dtype.kind != "f"]
        self.inexact = [s.name for s in spec.states if s.numpy_dtype.kind == "f"]
        self.masks = {s.name: s.name.rsplit(".", 1)[0] + ".mask" for s in spec.states if s.name.endswith(".bank")}
        self.floors = {name: 0.01 * rms_norm(value) for name, value in ({**trace.outputs, **trace.after}).items()}
        shape = (trace.streams, trace.steps)
        kinds = ("one_step", "free_run", "split") if spec.has("decode") else ("one_step", "free_run")
        self.errors = {
            # Calls in pieces give what `decode` gives: the first output, and none for debugging.
            kind: {n: np.full(shape, np.nan) for n in ([self.logits] if kind == "split" else trace.outputs)}
            | {n: np.full(shape, np.nan) for n in self.inexact}
            for kind in kinds
        }
        self.slots: list[Array] = []
        self.kl: list[Array] = []
        self.flips: list[Array] = []
        self.margins: list[Array] = []
        self.mismatches = 0
        self.changed = False

    def add_outputs(self, kind: str, streams: Array, step: int, outputs: Arrays) -> None:
        trace = self.trace
        for name in outputs:
            reference = trace.outputs[name]
            for lane, stream in enumerate(streams):
                kept = self._kept(stream, step)
                wanted = reference[stream, step][kept].astype(np.float64)
                given = outputs[name][lane][trace.positions[kept]].astype(np.float64)
                self.errors[kind][name][stream, step] = relative_error(given, wanted, self.floors[name])
                if kind == "free_run" and name == self.logits and wanted.size:
                    self.kl.append(kl_divergence(wanted, given))
                    self.flips.append(wanted.argmax(-1) != given.argmax(-1))
                    ordered = np.sort(wanted, -1)
                    self.margins.append(ordered[..., -1] - ordered[..., -2:-1].max(-1, initial=-np.inf))

    def add_states(self, kind: str, streams: Array, index: int, states: Arrays) -> None:
        trace, step = self.trace, int(self.trace.sampled[index])
        for name, reference in trace.after.items():
            for lane, stream in enumerate(streams[streams < trace.state_streams]):
                wanted, given = reference[stream, index], states[name][lane]
                if name in self.exact:
                    self.mismatches += int((wanted != given).sum())
                    continue
                self.errors[kind][name][stream, step] = relative_error(given, wanted, self.floors[name])
                self.changed |= bool((given != trace.before[name][stream, index]).any())
                if kind == "free_run" and name in self.masks:
                    active = trace.after[self.masks[name]][stream, index]
                    slots = (np.moveaxis(bank, -2, 0)[active].reshape(active.sum(), -1) for bank in (given, wanted))
                    self.slots.append(slot_errors(*slots))

    def report(self, session: Session, budget: Budget) -> ParityReport:
        trace = self.trace
        worst = {kind: _worst(errors) for kind, errors in self.errors.items()}
        flips = np.concatenate(self.flips) if self.flips else np.ones(1, bool)
        margins = np.concatenate(self.margins) if self.margins else np.zeros(1)
        # The bound comes from the budget: one from the measured error would excuse every flip.
        rms = max(float(np.sqrt(np.mean(np.square(v, dtype=np.float64)))) for v in trace.outputs.values())
        excused = flips & (margins <= 2 * budget.free_run_p99 * rms)
        kl = np.concatenate(self.kl) if self.kl else np.full(1, np.nan)
        first_output = next(iter(trace.outputs))
        slots = np.concatenate(self.slots) if self.slots else self._state_errors()
        report = ParityReport(
            target=session.target,
            precision=budget.precision,
            effective_precision=session.effective_precision,
            source=trace.source,
            streams=trace.streams,
            steps=trace.steps,
            one_step=worst["one_step"],
            free_run=worst["free_run"],
            split=worst.get("split"),
            per_tensor={
                name: {f"{kind}_p99": quantile(part[name], 0.99) for kind, part in self.errors.items() if name in part}
                for name in self.errors["free_run"]
            },
            drift=drift_exponent(self.errors["free_run"][first_output]),
            state_error_p99=quantile(slots, 0.99),
            state_error_max=quantile(slots, 1.0),
            argmax_agreement=1.0 - float(flips.mean()),
            excused_flips=int(excused.sum()),
            unexcused_flips=int((flips & ~excused).sum()),
            kl_mean=float(kl.mean()),
            kl_p999=quantile(kl, 0.999),
            mask_mismatches=self.mismatches,
            first_divergence=self._first_divergence(budget),
            reference_floor=trace.floor,
            budget=budget,
        )
        failures = [*self.failures, *self._vacuous(), *_over_budget(report, len(flips))]
        return ParityReport(**{**report.__dict__, "failures": tuple(failures)})

    def _kept(self, stream: int, step: int) -> Array:
        """Which of the recorded positions hold a token that counts."""
        positions = self.trace.positions
        valid = self.trace.inputs.get(VALID)
        return np.ones(len(positions), bool) if valid is None else positions < valid[stream, step]

    def _state_errors(self) -> Array:
        values = [self.errors["free_run"][name] for name in self.inexact]
        return np.stack(values) if values else np.full(1, np.nan)

    def _vacuous(self) -> list[str]:
        """What was not compared although it should have been."""
        reasons = []
        for kind, tensors in self.errors.items():
            for name, errors in tensors.items():
                if np.isnan(errors).all():
                    reasons.append(f"{name} was never compared ({kind})")
        if self.inexact and not self.changed:
            reasons.append("no state ever changed")
        return reasons

    def _first_divergence(self, budget: Budget) -> Divergence | None:
        candidates = [
            Divergence(int(stream), int(step), name, float(errors[stream, step]))
            for name, errors in self.errors["free_run"].items()
            for stream, step in np.argwhere(errors > budget.free_run_p99)
        ]
        return min(candidates, key=lambda item: (item.step, item.stream), default=None)


def _check_comparable(trace: Trace, session: Session) -> None:
    if trace.fingerprint != session.fingerprint:
        raise InputError("The golden trace was recorded from another model than the session runs.")
    states = set(session.spec.state_names)
    if set(trace.before) != states or set(trace.after) != states:
        raise InputError(f"The trace holds other states than the model: {sorted(states ^ set(trace.after))}.")
    outputs = {item.name for item in session.spec.entry("step").outputs}
    if set(trace.outputs) != outputs:
        raise InputError(f"The trace holds other outputs than the model: {sorted(outputs ^ set(trace.outputs))}.")
    entry = session.spec.entry("step")
    different = {item.name for item in entry.inputs} ^ set(trace.inputs)
    # Without `valid` every token of the trace counts.
    if different - {VALID} or (VALID in trace.inputs and entry.input(VALID) is None):
        raise InputError(f"The trace holds other inputs than the model: {sorted(different)}.")
    if not trace.streams or not trace.steps or not len(trace.sampled) or not len(trace.positions):
        raise InputError("The trace is empty: there is nothing to compare. Record at least one step of one stream.")
    if trace.positions.max() >= entry.inputs[0].shape[1] or trace.sampled.max() >= trace.steps:
        raise InputError("The trace keeps positions or steps outside its own calls; it is damaged. Record it again.")
    for name, shape, wanted in _shapes(trace, session.spec):
        if shape != wanted:
            raise InputError(f"The trace holds {name} of shape {list(shape)}; the model gives {list(wanted)}.")


def _shapes(trace: Trace, spec: StepSpec) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Name, shape in the trace, and shape of the model for every tensor; the lane axis is gone from both."""
    entry = spec.entry("step")
    calls = (trace.streams, trace.steps)
    for item in entry.inputs:
        if item.name not in trace.inputs:
            continue
        yield item.name, trace.inputs[item.name].shape, (*calls, *item.shape[1:])
    for item in entry.outputs:
        yield item.name, trace.outputs[item.name].shape, (*calls, len(trace.positions), *item.shape[2:])
    for state in spec.states:
        shape = state.shape[: state.batch_axis] + state.shape[state.batch_axis + 1 :]
        for part in (trace.before, trace.after):
            yield state.name, part[state.name].shape, (trace.state_streams, len(trace.sampled), *shape)


def _over_budget(report: ParityReport, tokens: int) -> list[str]:
    budget = report.budget
    allowed_agreement = 1.0 - report.unexcused_flips / tokens
    checks = [
        (f"one-step error p99 of {report.one_step.tensor}", report.one_step.p99, budget.one_step_p99),
        (f"free-run error p99 of {report.free_run.tensor}", report.free_run.p99, budget.free_run_p99),
        *(
            [(f"error p99 of {report.split.tensor} in split calls", report.split.p99, budget.free_run_p99)]
            if report.split is not None
            else []
        ),
        ("KL mean", report.kl_mean, budget.kl_mean),
        ("KL p99.9", report.kl_p999, budget.kl_p999),
    ]
    # `not <=` instead of `>`: NaN is over every budget.
    failures = [f"{name} is {value:.3g}, the budget {limit:.3g}" for name, value, limit in checks if not value <= limit]
    if not allowed_agreement >= budget.agreement:
        failures.append(
            f"{report.unexcused_flips} of {tokens} tokens have another argmax without excuse "
            f"(agreement {allowed_agreement:.4%}, the budget {budget.agreement:.2%})"
        )
    if report.mask_mismatches:
        failures.append(f"{report.mask_mismatches} entries of masks or counters differ")
    if report.effective_precision != report.precision:
        failures.append(f"the backend computes in {report.effective_precision} instead of {report.precision}")
    return failures


def _worst(errors: Mapping[str, Array]) -> Quantiles:
    tensor = max(errors, key=lambda name: np.nan_to_num(quantile(errors[name], 0.99), nan=-1.0))
    values = errors[tensor]
    return Quantiles(quantile(values, 0.5), quantile(values, 0.99), quantile(values, 1.0), tensor)
