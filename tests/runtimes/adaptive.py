"""A runtime in plain numpy whose slot 1 is pruned at a known step, by a known margin, and a target that decides late.

The token says which stream it is. Slot 0 stays, slot 2 is free; the importance of slot 1 falls by SLOPE a step and is
PRUNE - margin after the step AT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from nsm.runtimes.base import State
from nsm.runtimes.session.session import Session
from nsm.spec import COUNT, EntrySpec, StateSpec, StepSpec, TensorSpec
from nsm.trace import Array, Arrays, Trace

STREAMS, STEPS, AT, BATCH, CHUNK, WIDTH = 40, 64, 27, 2, 2, 4
PRUNE, ALLOCATE, SLOPE = 0.1, 0.35, 0.01
SAMPLED = np.array([0, 3, 10, AT, 45, STEPS - 1])
FINGERPRINT = "a" * 64

Spoil = Callable[[int, int, Array, Mapping[str, Array]], None]
"""(stream, step, outputs of the lane, state of the lane after the step): spoils them."""

_EMBED = np.random.default_rng(3).standard_normal((STREAMS, WIDTH)).astype(np.float32)


def adaptive_spec(batch: int = BATCH) -> StepSpec:
    states = (
        StateSpec(COUNT, (batch,), "int64"),
        StateSpec("0.bank", (batch, 3, WIDTH), "float32"),
        StateSpec("0.mask", (batch, 3), "bool", init="learned"),
        StateSpec("0.importance", (batch, 3), "float32", init="learned"),
    )
    names = tuple(state.name for state in states)
    tokens = TensorSpec("tokens", (batch, CHUNK), "int64", 1, 0, STREAMS - 1)
    outputs = TensorSpec("outputs", (batch, CHUNK, WIDTH), "float32", 1)
    return StepSpec((EntrySpec("step", (tokens,), (outputs,), names, names),), states, CHUNK, batch)


def adaptive_initial(batch: int = BATCH) -> Arrays:
    arrays = {state.name: np.zeros(state.shape, state.numpy_dtype) for state in adaptive_spec(batch).states}
    arrays["0.mask"][:, :2] = True
    arrays["0.importance"][:] = 0.5
    return arrays


def adaptive_run(tokens: Array, state: Mapping[str, Array], margin: float, threshold: Array) -> tuple[Array, Arrays]:
    """Outputs [B, CHUNK, WIDTH] and the new state; `threshold` is [B], what each lane prunes below."""
    new = {name: value.copy() for name, value in state.items()}
    mask, bank, importance = new["0.mask"], new["0.bank"], new["0.importance"]
    for lane in range(len(tokens)):
        bank[lane][mask[lane]] = 0.5 * bank[lane][mask[lane]] + _EMBED[tokens[lane, 0]]
    outputs = np.repeat(bank.sum(1)[:, None], CHUNK, 1)
    importance[:, 1] = PRUNE - margin + SLOPE * (AT - state[COUNT])
    mask[:, 1] &= importance[:, 1] >= threshold
    bank[~mask] = 0.0
    new[COUNT] += 1
    return outputs, new


class AdaptiveRuntime:
    """Prunes slot 1 of stream 0 a step later than the reference if `late`.

    Args:
        margin: as for the trace.
        late: whether it does.
        spoil: what else it does.
    """

    def __init__(self, margin: float, late: bool, spoil: Spoil | None, effective_precision: str) -> None:
        self.effective_precision = effective_precision
        self._margin, self._late, self._spoil = margin, late, spoil
        self._arrays: Arrays = {}
        self._finite = True

    def load_state(self, arrays: Mapping[str, Array]) -> State:
        self._arrays = {name: value.copy() for name, value in arrays.items()}
        return State()

    def call(self, entry: str, inputs: Mapping[str, Array], state: State) -> tuple[Arrays, State]:
        streams, steps = inputs["tokens"][:, 0], self._arrays[COUNT].copy()
        threshold = np.where(self._late & (streams == 0), PRUNE - 2 * self._margin, PRUNE)
        outputs, self._arrays = adaptive_run(inputs["tokens"], self._arrays, self._margin, threshold)
        for lane, (stream, step) in enumerate(zip(streams.tolist(), steps.tolist(), strict=True)):
            if self._spoil is not None:
                self._spoil(stream, step, outputs[lane], {name: value[lane] for name, value in self._arrays.items()})
        self._finite = bool(np.isfinite(outputs).all())
        return {"outputs": outputs}, State()

    def read_state(self, state: State) -> Arrays:
        return {name: value.copy() for name, value in self._arrays.items()}

    def finite(self, state: State) -> bool:
        return self._finite

    def close(self) -> None:
        self._arrays = {}


def adaptive_session(
    margin: float, late: bool = True, spoil: Spoil | None = None, effective_precision: str = "fp32"
) -> Session:
    runtime = AdaptiveRuntime(margin, late, spoil, effective_precision)
    return Session(runtime, adaptive_spec(), adaptive_initial(), FINGERPRINT, "adaptive")


def adaptive_trace(margin: float, streams: int = STREAMS) -> Trace:
    """What the reference answers; states around the steps SAMPLED."""
    tokens = np.tile(np.arange(streams)[:, None, None], (1, STEPS, CHUNK))
    state = adaptive_initial(streams)
    outputs, before, after, states = [], [], [], [state]
    for step in range(STEPS):
        old = state
        answer, state = adaptive_run(tokens[:, step], old, margin, np.full(streams, PRUNE))
        outputs.append(answer)
        states.append(state)
        if step in SAMPLED:
            before.append(old)
            after.append(state)
    return Trace(
        inputs={"tokens": tokens},
        outputs={"outputs": np.stack(outputs, 1)},
        positions=np.arange(CHUNK),
        sampled=SAMPLED,
        before={name: np.stack([arrays[name] for arrays in before], 1) for name in state},
        after={name: np.stack([arrays[name] for arrays in after], 1) for name in state},
        fingerprint=FINGERPRINT,
        source="synthetic",
        conditioning={"one_step": {"outputs": 1e-7}, "free_run": {"outputs": 1e-7}},
        decisions={name: np.stack([arrays[name] for arrays in states], 1) for name in ("0.mask", "0.importance")},
    )
