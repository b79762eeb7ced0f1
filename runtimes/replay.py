"""The runs of a comparison: a golden trace is replayed on a session, and what comes out goes into the findings.

Every run is a generator that yields after each step, for whoever shows progress.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np

from nsm.runtimes.findings import Findings
from nsm.runtimes.session import Session
from nsm.spec import VALID
from nsm.trace import Array, Arrays, Trace

SPLIT_STEPS = 4
"""Steps that are run again in pieces."""


def groups(streams: int, batch: int) -> list[Array]:
    """The streams in groups of up to `batch`, to run side by side."""
    return [np.arange(start, min(start + batch, streams)) for start in range(0, streams, batch)]


def free_run(
    trace: Trace, session: Session, streams: Array, found: Findings, replaced: Collection[str] = ()
) -> Iterator[None]:
    """From the initial state to the last step, on the target's own state.

    Args:
        trace: of the reference.
        session: over the target.
        streams: [n], which streams, at most one a lane.
        found: where the errors go.
        replaced: states that are replaced by the reference's after each sampled step, when they have been compared.
    """
    lanes = np.resize(streams, session.batch)  # spare lanes repeat a stream, and are not looked at
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
    """One step from each sampled state of the reference."""
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
        if found.decides or step in sampled:
            state = session.read_state()
            found.add_decisions("split", streams, step, state)
        if step in sampled:
            found.add_states("split", streams, sampled[step], state)
        yield


def _had(session: Session, steps: int) -> Array:
    """[B] tokens that lanes have had after so many calls of `step`."""
    return np.full(session.batch, steps * session.spec.entry("step").tokens)


def _step(trace: Trace, session: Session, lanes: Array, step: int) -> Arrays:
    inputs = {name: value[lanes, step] for name, value in trace.inputs.items()}
    valid = inputs.pop(VALID, None)
    (tokens,) = inputs.values()
    return session.step(tokens, valid)
