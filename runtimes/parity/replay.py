"""The runs of a comparison: replay a golden trace on a session, and collect the results as findings.

Every run is a generator that yields after each step, so that the caller can show progress.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np

from nsm.runtimes.parity.collector import Findings
from nsm.runtimes.session import Session
from nsm.spec import VALID
from nsm.trace import Array, Arrays, Trace

SPLIT_STEPS = 4
"""Number of steps of the split and the staggered run."""
STAGGER = 4
"""Number of different lane ages in the staggered run."""


def groups(streams: int, batch: int) -> list[Array]:
    """Split the streams into groups of up to `batch`, to run side by side."""
    return [np.arange(start, min(start + batch, streams)) for start in range(0, streams, batch)]


def free_run(
    trace: Trace, session: Session, streams: Array, found: Findings, replaced: Collection[str] = ()
) -> Iterator[None]:
    """Free run: all steps from the initial state, on the target's own state.

    Args:
        trace: golden trace of the reference.
        session: session on the target.
        streams: [n], the streams to run, at most one per lane.
        found: collects the errors.
        replaced: states to replace by the reference's after each sampled step, once they are compared.
    """
    lanes = np.resize(streams, session.batch)  # unused lanes are padded; their results are ignored
    sampled = {int(step): index for index, step in enumerate(trace.sampled)}
    session.reset()
    for step in range(trace.steps):
        found.add_outputs("free_run", streams, step, _step(trace, session, lanes, step))
        if found.decides or step in sampled:
            state = session.read_state()
            found.add_decisions("free_run", streams, step, state)
        if step in sampled:
            found.add_states("free_run", streams, sampled[step], state)
            if replaced:
                state |= {name: trace.after[name][lanes, sampled[step]] for name in replaced}
                session.load_state(state, _had(session, step + 1))
        yield


def one_step(trace: Trace, session: Session, streams: Array, found: Findings) -> Iterator[None]:
    """One-step run: one step from each sampled state of the reference."""
    lanes = np.resize(streams, session.batch)
    for index, step in enumerate(trace.sampled):
        before = {name: value[lanes, index] for name, value in trace.before.items()}
        session.load_state(before, _had(session, int(step)))
        found.add_outputs("one_step", streams, int(step), _step(trace, session, lanes, int(step)))
        state = session.read_state()
        found.add_decisions("one_step", streams, int(step), state)
        found.add_states("one_step", streams, index, state)
        yield


def split_run(trace: Trace, session: Session, streams: Array, found: Findings) -> Iterator[None]:
    """Split run: the first steps, every other one token by token."""
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
        if found.decides or step in sampled:
            state = session.read_state()
            found.add_decisions("split", streams, step, state)
        if step in sampled:
            found.add_states("split", streams, sampled[step], state)
        yield


def _had(session: Session, steps: int) -> Array:
    """[B], the tokens of the lanes after the given number of `step` calls."""
    return np.full(session.batch, steps * session.spec.entry("step").tokens)


def staggered_run(trace: Trace, session: Session, streams: Array, found: Findings) -> Iterator[None]:
    """Staggered run: the first steps, with lane k starting k steps later, up to `STAGGER` - 1.

    Each lane is reset when it starts. Until then it gets other tokens, so the run also tests that a reset is complete.
    """
    lanes, places = np.resize(streams, session.batch), np.arange(session.batch)
    late = places % STAGGER
    sampled = {int(step): index for index, step in enumerate(trace.sampled)}
    steps = min(trace.steps, SPLIT_STEPS)
    session.reset()
    for call in range(staggered_calls(trace, session.batch)):
        for index in np.flatnonzero(late == call).tolist() if call else ():
            session.reset(index)
        own = call - late  # the step of each lane's stream; arbitrary before its start and after its end
        runs = (own >= 0) & (own < steps)
        outputs = _step(trace, session, lanes, own % trace.steps, runs)
        state = session.read_state()
        for lane in np.flatnonzero(runs & (places < len(streams))).tolist():
            stream, step = streams[lane : lane + 1], int(own[lane])
            alone = {s.name: np.moveaxis(state[s.name], s.batch_axis, 0)[lane : lane + 1] for s in session.spec.states}
            found.add_outputs("staggered", stream, step, {n: v[lane : lane + 1] for n, v in outputs.items()})
            found.add_decisions("staggered", stream, step, alone)
            if step in sampled:
                found.add_states("staggered", stream, sampled[step], alone)
        yield


def staggered_calls(trace: Trace, batch: int) -> int:
    """Number of calls of the staggered run; 0 with one lane."""
    return min(trace.steps, SPLIT_STEPS) + min(batch, STAGGER) - 1 if batch > 1 else 0


def _step(trace: Trace, session: Session, lanes: Array, step: int | Array, runs: Array | None = None) -> Arrays:
    """One call; where the trace says how many tokens count, none of a lane's do that is not in `runs`."""
    inputs = {name: value[lanes, step] for name, value in trace.inputs.items()}
    valid = inputs.pop(VALID, None)
    valid = valid if valid is None or runs is None else np.where(runs, valid, 0)
    (tokens,) = inputs.values()
    return session.step(tokens, valid)
