"""Recording the golden trace: what the PyTorch reference answers, over whole streams."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike

from nsm.errors import InputError, NonFiniteError
from nsm.models.checkpoint import fingerprint
from nsm.models.step import State, StepModel
from nsm.runtimes.measures import relative_error, rms_norm
from nsm.runtimes.parity import Progress
from nsm.trace import Array, Arrays, Source, Trace

MAX_SAMPLED = 16
MIN_TRACE_BYTES = 4_000_000


def record(
    model: StepModel,
    sequences: Sequence[ArrayLike],
    steps: int = 64,
    tokens_per_call: int | None = None,
    source: Source = "recorded",
    progress: Progress | None = None,
    debug_outputs: bool = False,
) -> Trace:
    """Run the model over sequences, in eval mode and fp32, and keep what parity needs.

    Every stream gets `steps` calls from the initial state without a reset; a sequence too short for that is
    repeated. Full states are kept around at most 16 steps, log-spaced. Where outputs and states would take more
    than max(4 MB, the model's size), outputs are kept for fewer tokens of a call, states for fewer streams, and
    only then for fewer steps. The inputs, outputs for one token of every call, and two states of one stream are
    kept whatever they take: fewer would check less.

    Args:
        model: in fp32; its weights are not changed.
        sequences: one per stream, [T] ids or [T, input_dim] vectors.
        steps: T of the trace, calls.
        tokens_per_call: K, a multiple of the chunk size (default: one chunk).
        source: "recorded" where the sequences are real, "synthetic" where they are made up.
        progress: called after every step.
        debug_outputs: whether to record these too; see `StepModel.spec`.

    Raises:
        InputError: no sequences, or ones the model does not take.
        NonFiniteError: the reference itself produces NaN or infinity.
    """
    if not len(sequences) or steps < 1:
        raise InputError(f"A trace needs at least one sequence and one step; given {len(sequences)} and {steps}.")
    entry = model.spec(len(sequences), tokens_per_call, debug_outputs).entry("step")
    count = entry.inputs[0].shape[1]
    tokens = np.stack([_stretch(sequence, steps * count) for sequence in checked_sequences(model, sequences)])
    batched = tokens.reshape(len(tokens), steps, count, *tokens.shape[2:])
    limit = max(MIN_TRACE_BYTES, sum(p.numel() * p.element_size() for p in model.parameters()))
    width = sum(int(np.prod(item.shape[2:])) for item in entry.outputs)
    positions, kept, sampled = _kept(model, len(tokens), steps, count, width, limit)
    model = copy.deepcopy(model).eval()
    advance = _counter(progress, 2 * steps)
    names = [item.name for item in entry.outputs]
    outputs, before, after = _roll(model, torch.from_numpy(batched), sampled, names, advance)
    # The floor: what fp32 itself costs, against the same weights in fp64.
    exact, _, _ = _roll(model.double(), torch.from_numpy(batched), np.empty(0, np.int64), names[:1], advance)
    if not all(np.isfinite(value).all() for value in outputs.values()):
        raise NonFiniteError(
            "The PyTorch reference itself produces NaN or infinity on the golden sequences, so there is nothing to "
            "compare with. Check the weights and the sequences."
        )
    return Trace(
        inputs={"tokens": batched},
        outputs={name: np.ascontiguousarray(value[:, :, positions]) for name, value in outputs.items()},
        positions=positions,
        sampled=sampled,
        before={name: value[:kept] for name, value in before.items()},
        after={name: value[:kept] for name, value in after.items()},
        fingerprint=fingerprint(model.float()),
        source=source,
        floor=_floor(outputs[names[0]], exact[names[0]]),
    )


def synthetic(model: StepModel, streams: int, length: int, seed: int = 0) -> list[Array]:
    """Made-up sequences: uniform ids, or standard normal vectors."""
    spec = model.token_spec
    generator = np.random.default_rng(seed)
    if spec.maximum is not None:
        return [generator.integers(0, spec.maximum + 1, length) for _ in range(streams)]
    return [generator.standard_normal((length, *spec.shape)).astype(np.float32) for _ in range(streams)]


@torch.no_grad()
def _roll(
    model: StepModel, tokens: torch.Tensor, sampled: Array, names: list[str], advance: Callable[[], None]
) -> tuple[Arrays, Arrays, Arrays]:
    """The named outputs [N, T, K, ...] of all steps, and the states before and after the sampled ones."""
    tokens = tokens.double() if tokens.is_floating_point() and _is_double(model) else tokens
    state = model.initial_state(tokens.shape[0])
    outputs: list[Arrays] = []
    before: list[Arrays] = []
    after: list[Arrays] = []
    for step in range(tokens.shape[1]):
        if step in sampled:
            before.append(_numpy(state))
        given, state = model.call("step", {"tokens": tokens[:, step]}, state)
        outputs.append({name: given[name].numpy() for name in names})
        if step in sampled:
            after.append(_numpy(state))
        advance()
    return _stack(outputs), _stack(before), _stack(after)


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return advance


def _is_double(model: StepModel) -> bool:
    return next(model.parameters()).dtype == torch.float64


def _numpy(state: State) -> Arrays:
    return {name: value.detach().numpy().copy() for name, value in state.items()}


def _stack(states: list[Arrays]) -> Arrays:
    return {name: np.stack([state[name] for state in states], 1) for name in states[0]} if states else {}


def checked_sequences(model: StepModel, sequences: Sequence[ArrayLike]) -> list[Array]:
    """The sequences as the model takes them: [T] int64 or [T, input_dim] float32 each.

    Raises:
        InputError: names the first one that the model does not take, and why.
    """
    spec, checked = model.token_spec, []
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
            raise InputError(f"Sequence {index} holds NaN or infinity. Take it out, or mend what wrote it.")
        try:
            model.check_tokens(torch.from_numpy(array[None]))
        except InputError as error:
            raise InputError(f"Sequence {index}: {error}") from error
        checked.append(array)
    return checked


def _stretch(sequence: Array, length: int) -> Array:
    return sequence[np.arange(length) % len(sequence)]


def _floor(outputs: Array, exact: Array) -> float:
    """The largest error of a stream's step, fp32 against fp64."""
    scale = 0.01 * rms_norm(exact)
    pairs = zip(outputs.reshape(-1, *outputs.shape[2:]), exact.reshape(-1, *exact.shape[2:]), strict=True)
    return max(relative_error(given, wanted, scale) for given, wanted in pairs)


def _kept(model: StepModel, streams: int, steps: int, count: int, width: int, limit: int) -> tuple[Array, int, Array]:
    """Token positions to keep, streams to keep states of, and steps to keep them at; outputs take half the room."""
    per_position = streams * steps * width * 4
    positions = int(np.clip(limit // 2 // per_position, 1, count))
    room = max(limit - positions * per_position, 0)
    per_sample = 2 * model.spec(1).state_nbytes
    samples = min(MAX_SAMPLED, steps)
    kept_streams = int(np.clip(room // (samples * per_sample), 1, streams))
    samples = int(np.clip(room // (kept_streams * per_sample), 2, samples)) if steps > 1 else 1
    spaced = np.geomspace(1, steps, samples).round().astype(np.int64) - 1
    chosen = np.linspace(count - 1, 0, positions).round().astype(np.int64)
    return np.unique(chosen), kept_streams, np.unique(spaced)
