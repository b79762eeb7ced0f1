"""The capacity of a model and the limits of its artifacts, which every session enforces."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nsm.bundle import Bundle
from nsm.errors import ConfigError, UnsupportedError
from nsm.export.sources import Source
from nsm.export.verify.golden import checked_sequences
from nsm.manifest import Artifact
from nsm.runtimes.limits import Counters, Limit, assumed_limit, find_limit, observe, reach
from nsm.runtimes.opening import open_artifact
from nsm.runtimes.parity import find_budget
from nsm.runtimes.session import Session
from nsm.spec import CHUNK, FILLED, OFFSET, StepSpec
from nsm.trace import Array

_CALLS = 16


@dataclass(frozen=True)
class Reach:
    """The capacity and the counters of a model, as found by experiment.

    Args:
        capacity: tokens that a lane takes between two resets; None if unlimited.
        counters: states that grow with the tokens, up to the capacity; None if the model has none.
        tokens: [T, B, K, ...], the inputs of the experiment.
        bounded: states that grow at first and then wrap around, such as the position in a ring buffer.
    """

    capacity: int | None
    counters: Counters | None
    tokens: Array
    bounded: frozenset[str] = frozenset()

    def of(self, spec: StepSpec) -> StepSpec:
        """Return `spec` with the capacity, and with the growth per token of each counter."""
        grows = {} if self.counters is None else self.counters.per_token()
        states = tuple(replace(state, per_token=grows.get(state.name)) for state in spec.states)
        return replace(spec, states=states, capacity=self.capacity)


def may_count(spec: StepSpec, bounded: Collection[str] = ()) -> bool:
    """Whether a model has integer states that may grow, other than nsm's own stream states and `bounded`."""
    integers = {state.name for state in spec.states if state.numpy_dtype.kind in "iu"}
    return bool(integers - {OFFSET, FILLED, CHUNK, *bounded})


def find_reach(source: Source, spec: StepSpec, sequences: Sequence[Array]) -> Reach:
    """Find the counters of the reference, and the capacity that they imply.

    Args:
        source: the model.
        spec: the spec of the export, with the declared capacity if any.
        sequences: recorded or synthetic sequences.

    Raises:
        ConfigError: the reference fails before the declared capacity.
        UnsupportedError: a call has more tokens than the model takes.
    """
    free = replace(spec, capacity=None)
    tokens = shuffled(checked_sequences(source, sequences), free)
    if not may_count(spec):
        return Reach(spec.capacity, None, tokens)
    session = source.reference(free)
    with session:
        return reach_of(session, tokens, spec.capacity)


def reach_of(session: Session, tokens: Array, declared: int | None = None) -> Reach:
    """Do as `find_reach`, on a session whose spec has no capacity."""
    counters, failed = observe(session, tokens, declared)
    if counters is None:
        if failed is not None and tokens.shape[2] > 1:
            raise UnsupportedError(
                f"The model fails in a call of {tokens.shape[2]} tokens, or soon after it: {failed} If its table or "
                "cache is shorter, give fewer tokens per call (--tokens-per-call 1)."
            ) from failed
        return Reach(declared, None, tokens)
    capacity: int | None = counters.position
    kept: Counters | None = counters
    if failed is None:
        kept, capacity = reach(session, counters, tokens[0])
    if declared is not None and capacity is not None and capacity < declared:
        raise ConfigError(
            f"The declared capacity is {declared:,} tokens, but the model fails after {capacity:,}: its table or cache "
            f"ends there. Declare {capacity} or less, or leave it out, and the export finds it."
        )
    bounded = frozenset(counters.growth) - frozenset(() if kept is None else kept.growth)
    return Reach(capacity if declared is None else declared, kept, tokens, bounded)


def with_limit(bundle: Bundle, artifact: Artifact, reference: Session, found: Reach) -> Artifact:
    """Return the artifact with the limit that its target adds to the model's capacity.

    Args:
        bundle: the bundle with the artifact.
        artifact: the artifact, with its parity.
        reference: session to compare with, of the same lanes and tokens per call, without a capacity. It is closed.
        found: counters of the model.
    """
    if found.counters is None:
        return artifact
    if artifact.parity.status == "not_run":
        return with_assumed_limit(artifact, found.counters, found.capacity)
    budget = find_budget(artifact.precision)
    with reference, open_artifact(bundle, artifact) as session:
        limit = find_limit(reference, session, found.counters, found.tokens[0], budget, found.capacity)
    return _limited(artifact, limit, found.capacity)


def with_assumed_limit(artifact: Artifact, counters: Counters | None, capacity: int | None) -> Artifact:
    """Return an artifact that cannot be compared here, limited to integers that are exact on every target."""
    return _limited(artifact, None if counters is None else assumed_limit(counters), capacity)


def declared_counters(spec: StepSpec, initial: Mapping[str, Array]) -> Counters | None:
    """Return the counters that a spec declares, with their values at the beginning of a stream."""
    length = spec.entry("step").tokens
    growth = {
        state.name: np.full(state.shape, state.per_token * length, state.numpy_dtype)
        for state in spec.states
        if state.per_token is not None
    }
    return Counters(0, dict(initial), growth, frozenset(growth), length) if growth else None


def _limited(artifact: Artifact, limit: Limit | None, capacity: int | None) -> Artifact:
    if limit is None or (capacity is not None and limit.tokens >= capacity):
        return artifact
    note = f"after {limit.tokens:,} tokens of a stream {limit.cause}; a session requires a reset before that"
    return replace(artifact, limit=limit.tokens, notes=(*artifact.notes, note))


def shuffled(sequences: Sequence[Array], spec: StepSpec) -> Array:
    """Return calls [T, B, K, ...] of randomly drawn tokens, so that rising ids do not look like a counter."""
    pool = np.concatenate(list(sequences))
    count = spec.entry("step").tokens
    drawn = np.random.default_rng(0).integers(0, len(pool), (_CALLS, spec.batch, count))
    tokens: Array = pool[drawn]
    return tokens
