"""Preconditions for quantization, on the model and on the calibration sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nsm.errors import InputError, UnsupportedError
from nsm.quantization.policy import LONGEST, POLICIES, SMALLEST, Policy
from nsm.trace import Array, Trace

MAX_STEPS = 256
"""Maximum number of observed calls per stream."""
MIN_CALLS = 16
"""Minimum number of calls over all sequences; fewer would give the ranges of a few tokens only."""
_EXPLODING = 30.0


def check_enough(sequences: Sequence[Array], length: int) -> None:
    """Raise if the sequences are too few or too short to calibrate on.

    Args:
        sequences: [T, ...] each.
        length: tokens of a call.

    Raises:
        InputError: fewer than `MIN_CALLS` calls in all, or none but the first after a reset.
    """
    calls = [len(sequence) // length for sequence in sequences]
    longest = max(calls, default=0)
    if sum(calls) < MIN_CALLS or longest < 2:
        raise InputError(
            f"Calibration needs at least {MIN_CALLS} calls of {length} tokens in all, and a sequence of two calls or "
            f"more, so that states are seen that are older than a reset. Given sequences: {len(calls)}, calls: "
            f"{sum(calls)}, in the longest: {longest}. Give more or longer ones, or take --precision int8-weights, "
            "which needs none."
        )


def check_recurrent(largest: Mapping[str, int], target: str, precision: str, policy: Policy, length: int) -> None:
    """Refuse low precision if all large weights are in recurrent operators that stay fp32.

    Args:
        largest: numbers in the largest matrix of each kind of operator, "" for linear ops.
        target, precision, policy: of the artifact.
        length: tokens of a call.

    Raises:
        UnsupportedError: it has large weights in such operators, and in no others.
    """
    large = [kind for kind, numbers in largest.items() if numbers >= SMALLEST]
    dynamic = policy.scheme == "dynamic"
    if policy.scheme == "backend" or not large or "" in large or (dynamic and ("LSTM" in large or length <= LONGEST)):
        return
    kinds = " and ".join(sorted(large))
    reason = f"The large weights of this model are all inside of {kinds} operators, and {precision} on {target} "
    if dynamic:
        raise UnsupportedError(
            f"{reason}reaches these in calls of at most {LONGEST} tokens; given {length}. Take "
            f"--tokens-per-call {LONGEST}, or keep fp32."
        )
    whole = [name for (where, name), other in POLICIES.items() if where == target and other.scheme == "backend"]
    take = [f"--precision {name}" for name in whole] + ["--target onnxruntime --precision int8"]
    raise UnsupportedError(
        f"{reason}reaches linear ops only: they would stay fp32. Take {', or '.join(take)}, or keep fp32."
    )


def check_trace(trace: Trace) -> None:
    """Refuse a model if its states in the golden trace explode.

    Raises:
        UnsupportedError: they do.
    """
    seen = [index for index, step in enumerate(trace.sampled) if step < MAX_STEPS]
    sizes = [size_of({name: value[:, index] for name, value in trace.before.items()}) for index in seen]
    sizes.append(size_of({name: value[:, seen[-1]] for name, value in trace.after.items()}))
    check_bounded(sizes, int(trace.sampled[seen[-1]]) + 1)


def check_bounded(sizes: Sequence[float], steps: int) -> None:
    """Refuse a model if its states explode.

    Args:
        sizes: sizes of the states from `size_of`, at log-spaced ages of a stream.
        steps: calls of the stream.

    Raises:
        UnsupportedError: they grow without end in the second half of these.
    """
    settled = sizes[len(sizes) // 2 :]
    if len(settled) > 1 and settled[-1] > _EXPLODING * max(settled[0], 1e-6):
        raise UnsupportedError(
            f"The model's states explode: their root mean square grows from {settled[0]:.3g} to {settled[-1]:.3g} "
            f"within {steps} calls of the model in fp32. Low precision drifts from such a stream early, so the model "
            "is not quantized. Train on longer streams, or keep fp32."
        )


def size_of(state: Mapping[str, Array]) -> float:
    """Largest root mean square of a floating-point state."""
    sizes = [np.sqrt(np.mean(np.square(v, dtype=np.float64))) for v in state.values() if v.dtype.kind == "f" and v.size]
    return float(max(sizes, default=0.0))
