"""Parity: compare an artifact with the recorded reference over whole streams.

The comparison measures two errors against a golden trace. *One-step*: the target steps from the reference's state, so
the error is that of one call. *Free-run*: the target carries its own state from the first step to the last, as in
use, so the error accumulates. Both are relative,

    ||target - reference|| / max(||reference||, rms over the trace of ||reference||),

per stream, step and tensor, for every output and every state: relative to the larger of the step's own norm and what is
usual for the tensor, so that a probability near 0, or a level in dB that crosses 0, is not compared with itself alone.
In fp32 a tensor passes as well if its error is within four of its conditioning floors; see
`nsm.runtimes.parity.conditioning`. A comparison of nothing is a failure.

If the artifact has more entries than `step`, the first steps run a third time, *split*: token by token through `decode`
and `commit`, in turn with `step`; outputs and states must match the trace within the free-run budget. If it has several
lanes, they run again *staggered*: each lane starts later than the previous one, so the lanes differ in age.

`nsm.runtimes.parity.replay` has the runs, `collector` the measurements, `mask_decisions` the decisions of adaptive
banks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from nsm.errors import InputError, NonFiniteError
from nsm.results import AcceptedBudget
from nsm.runtimes.base import Progress
from nsm.runtimes.parity.budgets import Budget
from nsm.runtimes.parity.collector import Findings
from nsm.runtimes.parity.mask_decisions import decided_states
from nsm.runtimes.parity.replay import (
    SPLIT_STEPS,
    free_run,
    groups,
    one_step,
    split_run,
    staggered_calls,
    staggered_run,
)
from nsm.runtimes.parity.report import ParityReport
from nsm.runtimes.session import Session
from nsm.spec import VALID, StepSpec
from nsm.trace import Array, Trace

_Run = Callable[[Trace, Session, Array, Findings], Iterator[None]]


def compare(
    trace: Trace,
    session: Session,
    budget: Budget,
    progress: Progress | None = None,
    thresholds: Sequence[float] = (),
    accepted: Sequence[AcceptedBudget] = (),
) -> ParityReport:
    """Replay a trace on a session and return the report; reset the streams before and after.

    Args:
        trace: golden trace of the reference.
        session: session on the artifact, with any number of lanes.
        budget: budget of the artifact's precision.
        progress: called after every step.
        thresholds: thresholds of the model's mask decisions, from `nsm.runtimes.parity.mask_decisions.thresholds_of`.
            Without thresholds, every mask difference fails.
        accepted: budgets of single tensors that replace those of `budget`.

    Raises:
        InputError: the trace is empty, or is of another model or shape than the session.
    """
    check_comparable(trace, session)
    found = Findings(trace, session.spec, budget, thresholds, accepted)
    free, stepped = groups(trace.streams, session.batch), groups(trace.state_streams, session.batch)
    # One group of streams is enough for the split run: all lanes of a graph compute the same.
    split = free[:1] if session.spec.has("decode") else []
    staggered = free[:1] if session.batch > 1 else []
    runs: list[tuple[_Run, Array]] = [(free_run, part) for part in free]
    runs += [(one_step, part) for part in stepped]
    runs += [(split_run, part) for part in split]
    runs += [(staggered_run, part) for part in staggered]
    total = len(free) * trace.steps + len(stepped) * len(trace.sampled) + len(split) * min(trace.steps, SPLIT_STEPS)
    total += staggered_calls(trace, session.batch)
    done = 0
    try:
        for run, streams in runs:
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
    return found.report(session)


def check_comparable(trace: Trace, session: Session) -> None:
    """Raise `InputError` if the trace is empty or is not of the session's model."""
    if trace.fingerprint != session.fingerprint:
        raise InputError("The golden trace was recorded from another model than the session runs.")
    states = set(session.spec.state_names)
    if set(trace.before) != states or set(trace.after) != states:
        raise InputError(f"The trace and the model have different states: {sorted(states ^ set(trace.after))}.")
    decided = decided_states(session.spec)
    if set(trace.decisions) != set(decided):
        raise InputError(
            f"The trace contains the mask decisions {sorted(trace.decisions)} of every step; the model decides about "
            f"{', '.join(decided) or 'none'}. A bundle of an older nsm has none: export it again."
        )
    outputs = {item.name for item in session.spec.entry("step").outputs}
    if set(trace.outputs) != outputs:
        raise InputError(f"The trace and the model have different outputs: {sorted(outputs ^ set(trace.outputs))}.")
    entry = session.spec.entry("step")
    different = {item.name for item in entry.inputs} ^ set(trace.inputs)
    # Without `valid`, every token of the trace is valid.
    if different - {VALID} or (VALID in trace.inputs and entry.input(VALID) is None):
        raise InputError(f"The trace and the model have different inputs: {sorted(different)}.")
    if not trace.streams or not trace.steps or not len(trace.sampled) or not len(trace.positions):
        raise InputError("The trace is empty: there is nothing to compare. Record at least one step of one stream.")
    if trace.positions.max() >= entry.inputs[0].shape[1] or trace.sampled.max() >= trace.steps:
        raise InputError("The trace is damaged: it has positions or steps outside its own calls. Record it again.")
    for name, shape, wanted in _shapes(trace, session.spec):
        if shape != wanted:
            raise InputError(f"The trace has {name} of shape {list(shape)}; the model expects {list(wanted)}.")


def _shapes(trace: Trace, spec: StepSpec) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yield name, shape in the trace and shape in the model of every tensor, without the lane axis."""
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
        if state.name in trace.decisions:
            yield state.name, trace.decisions[state.name].shape, (trace.streams, trace.steps + 1, *shape)
