"""The capacity of a model and the limits of its artifacts: found before streams are recorded, held by every session."""

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
    """How far a model counts.

    Args:
        capacity: tokens a lane takes from one reset to the next, None where there is no end.
        counters: states that grow with the tokens, up to the capacity; None without any.
        tokens: [T, B, K, ...], of the calls that it was found with.
        bounded: states that grow at first and were seen to turn, as the place in a ring.
    """

    capacity: int | None
    counters: Counters | None
    tokens: Array
    bounded: frozenset[str] = frozenset()

    def of(self, spec: StepSpec) -> StepSpec:
        """The spec with the capacity and with the states that count tokens."""
        grows = {} if self.counters is None else self.counters.per_token()
        states = tuple(replace(state, per_token=grows.get(state.name)) for state in spec.states)
        return replace(spec, states=states, capacity=self.capacity)


def may_count(spec: StepSpec, bounded: Collection[str] = ()) -> bool:
    """Whether an integer state may grow, other than those of our own streams and `bounded`, which end by themselves."""
    whole = {state.name for state in spec.states if state.numpy_dtype.kind in "iu"}
    return bool(whole - {OFFSET, FILLED, CHUNK, *bounded})


def find_reach(source: Source, spec: StepSpec, sequences: Sequence[Array]) -> Reach:
    """Find the counters of the reference, and the position at which each one ends.

    Args:
        source: the model.
        spec: of the export, with the capacity where one was declared.
        sequences: real ones, or made up.

    Raises:
        ConfigError: the reference fails before the capacity that was declared.
        UnsupportedError: a call has more tokens than the model takes.
    """
    free = replace(spec, capacity=None)
    tokens = shuffled(checked_sequences(source, sequences), free)
    if not may_count(spec):
        return Reach(spec.capacity, None, tokens)
    session = source.reference(free)
    assert session is not None
    with session:
        return reach_of(session, tokens, spec.capacity)


def reach_of(session: Session, tokens: Array, declared: int | None = None) -> Reach:
    """The same over a session without a capacity."""
    counters, failed = observe(session, tokens, declared)
    if counters is None:
        if failed is not None and tokens.shape[2] > 1:
            raise UnsupportedError(
                f"The model fails in a call of {tokens.shape[2]} tokens, or soon after it: {failed} If its table or "
                "cache is shorter than that, ask for fewer tokens a call (--tokens-per-call 1)."
            ) from failed
        return Reach(declared, None, tokens)
    capacity: int | None = counters.position
    kept: Counters | None = counters
    if failed is None:
        kept, capacity = reach(session, counters, tokens[0])
    if declared is not None and capacity is not None and capacity < declared:
        raise ConfigError(
            f"The capacity is declared as {declared:,} tokens, and the model itself fails after {capacity:,}: its "
            f"table or cache ends there. Declare {capacity} or less, or leave it out: it is found."
        )
    bounded = frozenset(counters.growth) - frozenset(() if kept is None else kept.growth)
    return Reach(capacity if declared is None else declared, kept, tokens, bounded)


def with_limit(bundle: Bundle, artifact: Artifact, reference: Session | None, found: Reach) -> Artifact:
    """The artifact with the limit that its target has beside the model's capacity.

    Args:
        bundle: that holds it.
        artifact: with its parity.
        reference: to compare with, which is closed then; of the same lanes and tokens a call, without a capacity.
        found: counters of the model.
    """
    if found.counters is None:
        return artifact
    if reference is None or artifact.parity["status"] == "not_run":
        return with_assumed_limit(artifact, found.counters, found.capacity)
    budget = find_budget(artifact.precision)
    with reference, open_artifact(bundle, artifact) as session:
        limit = find_limit(reference, session, found.counters, found.tokens[0], budget, found.capacity)
    return _limited(artifact, limit, found.capacity)


def with_assumed_limit(artifact: Artifact, counters: Counters | None, capacity: int | None) -> Artifact:
    """An artifact that cannot be compared here, with the limit up to which integers are exact on every target."""
    return _limited(artifact, None if counters is None else assumed_limit(counters), capacity)


def declared_counters(spec: StepSpec, initial: Mapping[str, Array]) -> Counters | None:
    """The counters that a spec declares, at the beginning of a stream."""
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
    note = f"behind {limit.tokens:,} tokens of a stream {limit.cause}; a session asks for a reset before that"
    return replace(artifact, limit=limit.tokens, notes=(*artifact.notes, note))


def shuffled(sequences: Sequence[Array], spec: StepSpec) -> Array:
    """Calls [T, B, K, ...] tokens of the sequences in a random order, so that ids that rise are no counter."""
    pool = np.concatenate(list(sequences))
    count = spec.entry("step").tokens
    drawn = np.random.default_rng(0).integers(0, len(pool), (_CALLS, spec.batch, count))
    tokens: Array = pool[drawn]
    return tokens
