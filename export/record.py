"""Recording the golden trace: what the PyTorch reference answers, over whole streams."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike

from nsm.errors import InputError, NonFiniteError
from nsm.models.checkpoint import fingerprint
from nsm.models.stream import State, StreamModel
from nsm.runtimes.parity import Progress
from nsm.trace import Array, Arrays, Source, Trace

MAX_SAMPLED = 16
MIN_TRACE_BYTES = 4_000_000


def record(
    model: StreamModel,
    sequences: Sequence[ArrayLike],
    steps: int = 64,
    tokens_per_call: int | None = None,
    source: Source = "recorded",
    progress: Progress | None = None,
) -> Trace:
    """Run the model over sequences, in eval mode and fp32, and keep what parity needs.

    Every stream gets `steps` calls from the initial state without a reset; a sequence too short for that is
    repeated. Full states are kept around at most 16 steps, log-spaced. Where outputs and states would take more
    than max(4 MB, the model's size), outputs are kept for fewer tokens of a call, states for fewer streams, and
    only then for fewer steps.

    Args:
        model: in fp32; its weights are not changed.
        sequences: one per stream, [T] ids or [T, input_dim] vectors.
        steps: T of the trace, calls.
        tokens_per_call: K, a multiple of the chunk size (default: one chunk).
        source: "recorded" where the sequences are real, "synthetic" where they are made up.
        progress: called after every step.

    Raises:
        InputError: no sequences, or ones the model does not take.
        NonFiniteError: the reference itself produces NaN or infinity.
    """
    if not len(sequences) or steps < 1:
        raise InputError(f"A trace needs at least one sequence and one step; given {len(sequences)} and {steps}.")
    spec = model.spec(len(sequences), tokens_per_call).entry("step").inputs[0]
    count = spec.shape[1]
    streams = [_stretch(np.asarray(sequence), steps * count) for sequence in sequences]
    if any(s.shape[1:] != spec.shape[2:] or (s.dtype.kind == "f") != (spec.dtype[:5] == "float") for s in streams):
        shapes = sorted({f"{s.dtype}{list(s.shape)}" for s in streams})
        raise InputError(f"The model takes sequences of {spec.dtype} {['T', *spec.shape[2:]]}; given {shapes}.")
    tokens = np.stack(streams).astype(spec.dtype)
    batched = tokens.reshape(len(streams), steps, count, *tokens.shape[2:])
    limit = max(MIN_TRACE_BYTES, sum(p.numel() * p.element_size() for p in model.parameters()))
    positions, kept, sampled = _kept(model, len(streams), steps, count, limit)
    model = copy.deepcopy(model).eval()
    advance = _counter(progress, 2 * steps)
    outputs, before, after = _roll(model, torch.from_numpy(batched), sampled, advance)
    # The floor: what fp32 itself costs, against the same weights in fp64.
    exact, _, _ = _roll(model.double(), torch.from_numpy(batched), np.empty(0, np.int64), advance)
    if not np.isfinite(outputs).all():
        raise NonFiniteError(
            "The PyTorch reference itself produces NaN or infinity on the golden sequences, so there is nothing to "
            "compare with. Check the weights and the sequences."
        )
    norms = np.linalg.norm(exact.reshape(*exact.shape[:2], -1), axis=-1)
    errors = np.linalg.norm((outputs - exact).reshape(*exact.shape[:2], -1), axis=-1)
    return Trace(
        inputs={"tokens": batched, "valid": np.full((len(streams), steps), count, np.int64)},
        outputs={"outputs": np.ascontiguousarray(outputs[:, :, positions])},
        positions=positions,
        sampled=sampled,
        before={name: value[:kept] for name, value in before.items()},
        after={name: value[:kept] for name, value in after.items()},
        fingerprint=fingerprint(model.float()),
        source=source,
        floor=float((errors / np.maximum(norms, 0.01 * np.sqrt(np.mean(norms**2)))).max()),
    )


def synthetic(model: StreamModel, streams: int, length: int, seed: int = 0) -> list[Array]:
    """Made-up sequences: uniform ids, or standard normal vectors."""
    spec = model.token_spec
    generator = np.random.default_rng(seed)
    if spec.maximum is not None:
        return [generator.integers(0, spec.maximum + 1, length) for _ in range(streams)]
    return [generator.standard_normal((length, *spec.shape)).astype(np.float32) for _ in range(streams)]


@torch.no_grad()
def _roll(
    model: StreamModel, tokens: torch.Tensor, sampled: Array, advance: Callable[[], None]
) -> tuple[Array, Arrays, Arrays]:
    """Outputs [N, T, K, ...] of all steps, and the states before and after the sampled ones."""
    tokens = tokens.double() if tokens.is_floating_point() and _is_double(model) else tokens
    state = model.initial_state(tokens.shape[0])
    outputs, before, after = [], [], []
    for step in range(tokens.shape[1]):
        if step in sampled:
            before.append(_numpy(state))
        output, state = model.step(tokens[:, step], state)
        outputs.append(output.numpy())
        if step in sampled:
            after.append(_numpy(state))
        advance()
    return np.stack(outputs, 1), _stack(before), _stack(after)


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return advance


def _is_double(model: StreamModel) -> bool:
    return next(model.parameters()).dtype == torch.float64


def _numpy(state: State) -> Arrays:
    return {name: value.detach().numpy().copy() for name, value in state.items()}


def _stack(states: list[Arrays]) -> Arrays:
    return {name: np.stack([state[name] for state in states], 1) for name in states[0]} if states else {}


def _stretch(sequence: Array, length: int) -> Array:
    if sequence.ndim < 1 or not len(sequence):
        raise InputError(f"A golden sequence needs at least one token; given shape {list(sequence.shape)}.")
    return sequence[np.arange(length) % len(sequence)]


def _kept(model: StreamModel, streams: int, steps: int, count: int, limit: int) -> tuple[Array, int, Array]:
    """Token positions to keep, streams to keep states of, and steps to keep them at; outputs take half the room."""
    per_position = streams * steps * model.output_dim * 4
    positions = int(np.clip(limit // 2 // per_position, 1, count))
    room = max(limit - positions * per_position, 0)
    per_sample = 2 * model.spec(1).state_nbytes
    samples = min(MAX_SAMPLED, steps)
    kept_streams = int(np.clip(room // (samples * per_sample), 1, streams))
    samples = int(np.clip(room // (kept_streams * per_sample), 2, samples)) if steps > 1 else 1
    spaced = np.geomspace(1, steps, samples).round().astype(np.int64) - 1
    chosen = np.linspace(count - 1, 0, positions).round().astype(np.int64)
    return np.unique(chosen), kept_streams, np.unique(spaced)
