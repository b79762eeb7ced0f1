"""A runtime in plain numpy over a tiny leaky linear recurrence, honest unless told otherwise.

    bank_s <- leak_s * bank_s + gain_s * x   on active slots;   y = (sum of active slots) @ HEAD + (previous x) @ TAIL

and at the end of every chunk the active slots fade a little. There are the entries step, decode and commit. With `ring`
the sum of the last RING inputs takes the place of the previous x; they lie in a state that is appended to.

Every lane is computed by itself, so nothing depends on the number of lanes and equality can be asked bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from nsm.errors import StreamError
from nsm.runtimes.base import Handles, State
from nsm.runtimes.session.session import Session
from nsm.spec import COUNT, OFFSET, EntrySpec, StateSpec, StepSpec, TensorSpec
from nsm.trace import Array, Arrays, Trace

CHUNK, SLOTS, WIDTH, VOCABULARY, OUTPUTS, RING = 4, 3, 4, 11, 5, 6
ENTRIES = ("step", "decode", "commit")
FINGERPRINT = "f" * 64

_random = np.random.default_rng(7)
_EMBED = _random.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
_HEAD = _random.standard_normal((WIDTH, OUTPUTS)).astype(np.float32)
_TAIL = _random.standard_normal((WIDTH, OUTPUTS)).astype(np.float32)
_BANK = _random.standard_normal((SLOTS, WIDTH)).astype(np.float32)
_LEAK = np.array([[0.5], [0.999], [0.9]], np.float32)
_GAIN = np.array([[0.5], [0.2], [0.1]], np.float32)
_FADE = np.float32(0.999)

After = Callable[[int, Arrays, Arrays, Arrays], None]
"""(calls since the state was loaded, outputs, state after, state before): spoils outputs or the state after."""
Loaded = Callable[[Arrays, Arrays], Arrays]
"""(arrays to load, arrays held until now) -> what is really loaded."""


def fake_spec(
    batch: int = 2,
    tokens_per_call: int = CHUNK,
    valid: bool = True,
    vectors: bool = False,
    tail_axis: int = 0,
    entries: Sequence[str] = ENTRIES,
    ring: bool = False,
) -> StepSpec:
    """Ids or vectors in, with or without `valid`; `tail_axis` is where the state `0.tail` has its lanes."""
    tail = (batch, WIDTH) if tail_axis == 0 else (WIDTH, batch)
    states = [
        StateSpec(COUNT, (batch,), "int64"),
        StateSpec(OFFSET, (batch,), "int64"),
        StateSpec("0.bank", (batch, SLOTS, WIDTH), "float32", init="learned"),
        StateSpec("0.mask", (batch, SLOTS), "bool", init="learned"),
        StateSpec("0.tail", tail, "float32", batch_axis=tail_axis),
        StateSpec("0.written", (batch, SLOTS), "float32"),  # nothing reads it to compute outputs
    ]
    if ring:
        states.append(StateSpec("0.recent", (batch, RING, WIDTH), "float32", append_axis=1))
    names = tuple(state.name for state in states)
    taken = ("0.recent",) if ring else ()
    touched = {
        "step": (names, tuple(name for name in names if name != "0.mask")),
        "decode": (
            tuple(name for name in names if name != "0.written"),
            (COUNT, OFFSET, "0.bank", "0.tail", *taken),
        ),
        "commit": ((OFFSET, "0.bank", "0.mask", "0.written"), (OFFSET, "0.bank", "0.written")),
    }
    found = []
    for name, length in (("step", tokens_per_call), ("decode", 1), ("commit", 0)):
        tokens = (
            TensorSpec("tokens", (batch, length, WIDTH), "float32", 1)
            if vectors
            else TensorSpec("tokens", (batch, length), "int64", 1, 0, VOCABULARY - 1)
        )
        counts = (TensorSpec("valid", (batch,), "int64", None, 0, length),) if valid else ()
        outputs = (TensorSpec("outputs", (batch, length, OUTPUTS), "float32", 1),)
        reads, writes = touched[name]
        found.append(EntrySpec(name, (tokens, *counts) if length else (), outputs if length else (), reads, writes))
    return StepSpec(tuple(entry for entry in found if entry.name in entries), tuple(states), CHUNK, batch)


def fake_initial(spec: StepSpec) -> Arrays:
    """A learned bank that is not zero, and its last slot off."""
    arrays = {state.name: np.zeros(state.shape, state.numpy_dtype) for state in spec.states}
    arrays["0.bank"][:] = _BANK
    arrays["0.mask"][:, :-1] = True
    return arrays


def fake_run(entry: str, inputs: Mapping[str, Array], state: Mapping[str, Array]) -> tuple[Arrays, Arrays]:
    """The model: outputs by name (zero where not valid) and the new state, all lanes on axis 0."""
    new = {name: value.copy() for name, value in state.items()}
    if entry == "commit":
        for lane in np.flatnonzero(new[OFFSET] == CHUNK).tolist():
            _commit(new, lane)
        return {}, new
    tokens = inputs["tokens"]
    outputs = np.zeros((*tokens.shape[:2], OUTPUTS), np.float32)
    for lane, count in enumerate(inputs.get("valid", np.full(len(tokens), tokens.shape[1]))):
        if count and new[OFFSET][lane] == CHUNK:
            raise StreamError("The chunk is full: commit it first.")
        bank, active = new["0.bank"][lane], new["0.mask"][lane]
        for index in range(int(count)):
            token = tokens[lane, index]
            x = token if tokens.ndim == 3 else _EMBED[token]
            bank[active] = (_LEAK * bank + _GAIN * x)[active]
            before = new["0.recent"][lane].sum(0) if "0.recent" in new else new["0.tail"][lane]
            # Of norm 1, so that an error of a step is the same share of its own norm and of the usual one.
            answer = bank[active].sum(0) @ _HEAD + before @ _TAIL
            outputs[lane, index] = answer / np.linalg.norm(answer)
            if "0.recent" in new:
                new["0.recent"][lane, new[COUNT][lane] % RING] = x
            new["0.tail"][lane] = x
            new[COUNT][lane] += 1
            new[OFFSET][lane] += 1
            if entry == "step" and new[OFFSET][lane] == CHUNK:
                _commit(new, lane)
    return {"outputs": outputs}, new


def _commit(state: Arrays, lane: int) -> None:
    active = state["0.mask"][lane]
    state["0.bank"][lane][active] *= _FADE
    state["0.written"][lane][active] += CHUNK
    state[OFFSET][lane] = 0


class FakeRuntime:
    """The recurrence behind the Runtime protocol.

    Args:
        spec: as made by `fake_spec`.
        after: spoils what a call gives.
        loaded: spoils what `load_state` puts.
        effective_precision: what the runtime claims.
        spoiled: the entry whose calls are counted and spoiled.
    """

    def __init__(
        self,
        spec: StepSpec,
        after: After | None = None,
        loaded: Loaded | None = None,
        effective_precision: str = "fp32",
        spoiled: str = "step",
    ) -> None:
        self.effective_precision = effective_precision
        self.closed = False
        self.calls = 0
        self.called: list[str] = []
        self._spoiled = spoiled
        self._axes = {state.name: state.batch_axis for state in spec.states}
        self._after = after
        self._loaded = loaded
        self._arrays: Arrays = {}
        self._answered: tuple[Array, ...] = ()
        self._handles = Handles()

    def load_state(self, arrays: Mapping[str, Array]) -> State:
        given = {name: np.moveaxis(arrays[name], axis, 0).copy() for name, axis in self._axes.items()}
        self._handles.consume()
        self._arrays = given if self._loaded is None else self._loaded(given, self._arrays)
        self.calls = 0
        self._answered = ()
        return self._handles.new()

    def call(self, entry: str, inputs: Mapping[str, Array], state: State) -> tuple[Arrays, State]:
        self._handles.check(state)
        self.called.append(entry)
        before = self._arrays
        outputs, after = fake_run(entry, inputs, before)
        self._handles.check(state)
        handle = self._handles.new()
        self._arrays = after
        if entry == self._spoiled:
            self.calls += 1
            if self._after is not None:
                self._after(self.calls, outputs, self._arrays, before)
        self._answered = tuple(outputs.values())
        return outputs, handle

    def read_state(self, state: State) -> Arrays:
        self._handles.check(state)
        return {name: np.moveaxis(self._arrays[name], 0, axis).copy() for name, axis in self._axes.items()}

    def finite(self, state: State) -> bool:
        self._handles.check(state)
        return all(np.isfinite(array).all() for array in (*self._arrays.values(), *self._answered))

    def close(self) -> None:
        self.closed = True


def fake_session(
    spec: StepSpec | None = None,
    after: After | None = None,
    loaded: Loaded | None = None,
    effective_precision: str = "fp32",
    fingerprint: str = FINGERPRINT,
    spoiled: str = "step",
) -> Session:
    """A session over the fake, by default with two lanes, over ids, and honest."""
    spec = fake_spec() if spec is None else spec
    runtime = FakeRuntime(spec, after, loaded, effective_precision, spoiled)
    return Session(runtime, spec, fake_initial(spec), fingerprint, "fake")


def fake_trace(streams: int = 4, steps: int = 64, seed: int = 0) -> Trace:
    """What the honest recurrence answers to random ids; states around six steps, the first and the last among them."""
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, (streams, steps, CHUNK))
    sampled = np.unique(np.geomspace(1, steps, 6).round().astype(np.int64) - 1)
    state = fake_initial(fake_spec(streams))
    outputs: list[Array] = []
    before: list[Arrays] = []
    after: list[Arrays] = []
    for step in range(steps):
        if step in sampled:
            before.append(state)
        answer, state = fake_run("step", {"tokens": tokens[:, step]}, state)
        outputs.append(answer["outputs"])
        if step in sampled:
            after.append(state)
    return Trace(
        inputs={"tokens": tokens},
        outputs={"outputs": np.stack(outputs, 1)},
        positions=np.arange(CHUNK),
        sampled=sampled,
        before={name: np.stack([arrays[name] for arrays in before], 1) for name in state},
        after={name: np.stack([arrays[name] for arrays in after], 1) for name in state},
        fingerprint=FINGERPRINT,
        source="synthetic",
        conditioning={"one_step": {"outputs": 1e-7}, "free_run": {"outputs": 1e-7}},
    )


def with_output(trace: Trace, values: Array) -> Trace:
    """The trace with other outputs."""
    return replace(trace, outputs={"outputs": values})


def assert_same(given: Mapping[str, Array], wanted: Mapping[str, Array]) -> None:
    """Equal names, dtypes, shapes and bits."""
    assert set(given) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_array_equal(given[name], value, err_msg=name, strict=True)
        assert given[name].tobytes() == value.tobytes(), f"{name} differs in the sign of a zero or the kind of a NaN"
