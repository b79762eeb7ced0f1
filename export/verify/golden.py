"""Record the golden trace: outputs and states of the reference over whole streams. Does not need torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nsm.errors import InputError, NonFiniteError
from nsm.export.sources import Source
from nsm.runtimes import Progress
from nsm.runtimes.parity import conditioning_calls, conditioning_floor, decided_states, groups, thresholds_of
from nsm.runtimes.session import Session
from nsm.spec import StepSpec
from nsm.trace import Array, Arrays, Origin, Trace

MIN_SAMPLED, MAX_SAMPLED = 8, 16
"""Steps with recorded states: fewer do not show how an error grows, more take space that streams need."""
MIN_TRACE_BYTES = 4_000_000
"""Size limit of a small model's trace; a larger model's trace may be as large as the model."""
MIN_STATE_STREAMS = 2
"""Streams with recorded states, even beyond the size limit: one stream alone may be a special case."""
MAX_EXTRA_BYTES = 64_000_000
"""Most bytes of states beyond the size limit: the trace must fit in a repository (100 MB per file on GitHub)."""


def record(
    source: Source,
    sequences: Sequence[ArrayLike],
    steps: int = 64,
    tokens_per_call: int | None = None,
    origin: Origin = "recorded",
    progress: Progress | None = None,
    debug_outputs: bool = False,
) -> Trace:
    """Run the model over sequences in fp32, and record the outputs and states that parity needs.

    Every stream gets `steps` calls from the initial state without a reset; a shorter sequence is repeated. Full states
    are recorded around 8 to 16 steps, log-spaced, including the first and the last. The size limit is max(4 MB, the
    model's size). Over the limit, the trace has outputs of fewer tokens per call, then states around fewer steps and
    of fewer streams.

    A minimum is recorded regardless of size: the inputs, the outputs of one token per call, and the states of 2
    streams around 8 steps. If these states are over 64 MB and over the limit, the trace has states of one stream only,
    around as many steps as the larger of the two limits allows, at least 2. The masks that a model changes at run
    time, and the values that decide them, are recorded at every step of every stream.

    Args:
        source: the model.
        sequences: one per stream, [T] ids or [T, *token] vectors.
        steps: calls per stream.
        tokens_per_call: K, a multiple of the chunk size (default: one chunk).
        origin: "recorded" for real sequences, "synthetic" for random sequences.
        progress: called with (done, total) after every step.
        debug_outputs: record the debug outputs too; see `Source.spec`.

    Returns:
        The trace.

    Raises:
        InputError: no sequences, or sequences that the model does not accept.
        NonFiniteError: the reference produces NaN or infinity.
    """
    if not len(sequences) or steps < 1:
        raise InputError(f"A trace needs at least one sequence and one step; given {len(sequences)} and {steps}.")
    spec = source.spec(source.lanes or len(sequences), tokens_per_call, debug_outputs)
    entry = spec.entry("step")
    count = entry.inputs[0].shape[1]
    tokens = np.stack([_stretch(sequence, steps * count) for sequence in checked_sequences(source, sequences)])
    batched = tokens.reshape(len(tokens), steps, count, *tokens.shape[2:])
    limit = max(MIN_TRACE_BYTES, source.parameters * 4)
    width = sum(int(np.prod(item.shape[2:])) for item in entry.outputs)
    decided = sum(state.nbytes // spec.batch for state in spec.states_of(decided_states(spec)))
    room = limit - len(tokens) * (steps + 1) * decided
    positions, kept, sampled = kept_of(spec, len(tokens), steps, width, room)
    calls = conditioning_calls(len(tokens), steps, kept, len(sampled), spec.batch)
    advance = _counter(progress, steps * len(_groups(tokens, spec)) + calls)
    try:
        rolled = _roll(source.reference(spec), batched, positions, sampled, kept, advance)
    except NonFiniteError as error:
        raise NonFiniteError(
            "The reference produces NaN or infinity on the golden sequences, so parity cannot be checked. Check the "
            f"weights and the sequences. {error}"
        ) from error
    trace = Trace(
        inputs={"tokens": batched},
        outputs=rolled.outputs,
        positions=positions,
        sampled=sampled,
        before=rolled.before,
        after=rolled.after,
        fingerprint=source.fingerprint,
        source=origin,
        decisions=rolled.decisions,
    )
    thresholds = thresholds_of(source.config)
    floors = conditioning_floor(trace, functools.partial(source.reference, spec), thresholds, advance)
    return replace(trace, conditioning=floors)


def synthetic(source: Source, streams: int, length: int, seed: int = 0) -> list[Array]:
    """Return random sequences: uniform ids [length], or standard normal vectors [length, *token]."""
    spec = source.token_spec
    generator = np.random.default_rng(seed)
    shape = (length, *spec.shape)
    if spec.maximum is not None:
        return [generator.integers(0, spec.maximum + 1, shape) for _ in range(streams)]
    return [generator.standard_normal(shape).astype(np.float32) for _ in range(streams)]


def checked_sequences(source: Source, sequences: Sequence[ArrayLike]) -> list[Array]:
    """Convert sequences to the model's input: [T] int64 or [T, *token] float32 each.

    Raises:
        InputError: the model does not accept a sequence; the message gives the index and the reason.
    """
    spec, checked = source.token_spec, []
    for index, sequence in enumerate(sequences):
        array = np.asarray(sequence)
        kinds = "iu" if spec.dtype == "int64" else "f"
        if array.dtype.kind not in kinds or array.ndim != 1 + len(spec.shape) or array.shape[1:] != spec.shape:
            wanted = f"{spec.dtype} {['T', *spec.shape]}"
            raise InputError(
                f"Sequence {index}: The model takes sequences of {wanted}; given {array.dtype}{list(array.shape)}."
            )
        array = array.astype(spec.dtype)
        if not np.isfinite(array).all():
            raise InputError(f"Sequence {index} contains NaN or infinity. Remove or correct it.")
        try:
            source.check_sequence(array)
        except InputError as error:
            raise InputError(f"Sequence {index}: {error}") from error
        checked.append(array)
    return checked


class _Rolled(NamedTuple):
    """Results of a run over all streams.

    Args:
        outputs: [N, T, P, ...], of all steps.
        before, after: states [kept, n, ...] before and after the sampled steps.
        decisions: [N, T + 1, ...], masks and deciding values at the beginning and after every step.
    """

    outputs: Arrays
    before: Arrays
    after: Arrays
    decisions: Arrays


def _roll(
    session: Session,
    tokens: Array,
    positions: Array,
    sampled: Array,
    kept: int,
    advance: Callable[[], None],
) -> _Rolled:
    """Run all streams."""
    decided = decided_states(session.spec)
    parts: list[_Rolled] = []
    with session:
        for streams in _groups(tokens, session.spec):
            lanes = np.resize(streams, session.batch)  # unused lanes are padded; their results are ignored
            count = len(streams)
            outputs: list[Arrays] = []
            before: list[Arrays] = []
            after: list[Arrays] = []
            decisions: list[Arrays] = []
            session.reset()
            if decided:
                decisions.append(_named(session.read_state(), decided))
            for step in range(tokens.shape[1]):
                if step in sampled:
                    before.append(session.read_state())
                given = session.step(tokens[lanes, step])
                outputs.append({name: value[:count, positions] for name, value in given.items()})
                if step in sampled:
                    after.append(session.read_state())
                if decided:
                    decisions.append(_named(session.read_state(), decided))
                advance()
            parts.append(
                _Rolled(_stack(outputs), _stack(before, count), _stack(after, count), _stack(decisions, count))
            )
    outputs_of, before_of, after_of, decisions_of = zip(*parts, strict=True)
    return _Rolled(_joined(outputs_of), _joined(before_of, kept), _joined(after_of, kept), _joined(decisions_of))


def _named(arrays: Arrays, names: Sequence[str]) -> Arrays:
    return {name: arrays[name] for name in names}


def _groups(tokens: Array, spec: StepSpec) -> list[Array]:
    return groups(len(tokens), spec.batch)


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return advance


def _stack(steps: list[Arrays], count: int | None = None) -> Arrays:
    """Stack steps to [lanes, steps, ...] by name; keep the first `count` lanes."""
    return {name: np.stack([step[name][:count] for step in steps], 1) for name in steps[0]} if steps else {}


def _joined(parts: Sequence[Arrays], count: int | None = None) -> Arrays:
    """Concatenate groups of streams by name; keep the first `count` streams."""
    return {name: np.concatenate([group[name] for group in parts])[:count] for name in parts[0]}


def _stretch(sequence: Array, length: int) -> Array:
    return sequence[np.arange(length) % len(sequence)]


def kept_of(spec: StepSpec, streams: int, steps: int, width: int, limit: int) -> tuple[Array, int, Array]:
    """Choose the parts of a trace to record within a size limit.

    Outputs take at most half the limit, and leave enough for the states of `MIN_STATE_STREAMS` streams, or of one
    stream if these do not fit. States take the rest: at least half, and more if those streams need it.

    Args:
        spec: the spec of the model.
        streams: N, number of streams.
        steps: T, calls per stream.
        width: number of output values per token.
        limit: size limit in bytes.

    Returns:
        Positions of outputs in a call [P], number of streams with states M <= N, and steps with states [n].
    """
    count = spec.entry("step").inputs[0].shape[1]
    per_position = streams * steps * width * 4
    per_sample = 2 * spec.state_nbytes // spec.batch
    fewest, most = min(MIN_SAMPLED, steps), min(MAX_SAMPLED, steps)
    wanted = min(MIN_STATE_STREAMS, streams) * fewest * per_sample
    reserved = wanted if wanted < limit else fewest * per_sample
    positions = int(np.clip(min(limit // 2, limit - reserved) // per_position, 1, count))
    room = max(limit - positions * per_position, limit // 2, min(wanted, MAX_EXTRA_BYTES))
    # Maximize the number of streams with the fewest steps first, then the steps of these streams.
    kept_streams = int(np.clip(room // (fewest * per_sample), 1, streams))
    samples = int(np.clip(room // (kept_streams * per_sample), min(2, steps), most))
    chosen = np.linspace(count - 1, 0, positions).round().astype(np.int64)
    return np.unique(chosen), kept_streams, log_spaced(steps, samples)


def log_spaced(steps: int, count: int) -> Array:
    """Return [count] log-spaced steps of 0 .. `steps` - 1, including the first and the last.

    Args:
        steps: number of steps.
        count: number of steps to choose, at most `steps`.
    """
    spaced = np.geomspace(1, steps, count).round().astype(np.int64)
    # Rounding makes the first steps equal. Take every step there, until the spacing exceeds one.
    return np.maximum(spaced, np.arange(1, count + 1)) - 1
