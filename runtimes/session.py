"""Session: B streams on one runtime. It owns the state; backends only keep it."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nsm.errors import InputError, NonFiniteError, SnapshotError, StreamError
from nsm.runtimes.base import Runtime
from nsm.spec import OFFSET, StepSpec, TensorSpec
from nsm.trace import Array, Arrays

VALID = "valid"
_SNAPSHOT_MAGIC = b"nsm-snapshot 1\n"


class Session:
    """Feeds streams to a runtime, chunk by chunk.

    A session has B lanes, fixed when the bundle was made; every lane is a stream of its own.

    Args:
        runtime: a loaded artifact.
        spec: of the model.
        initial: the states' initial values, by name, lanes included. `reset` returns to them bit by bit.
        fingerprint: of the model; snapshots carry it.
        target: name of the target, for people.

    Example:
        >>> with nsm.open("digits.nsm", target="openvino") as session:   # doctest: +SKIP
        ...     outputs = session.run(tokens)["outputs"]                  # [T] ids -> [T, output_dim]
    """

    def __init__(
        self, runtime: Runtime, spec: StepSpec, initial: Mapping[str, Array], fingerprint: str, target: str
    ) -> None:
        self.spec = spec
        self.target = target
        self.fingerprint = fingerprint
        self.effective_precision = runtime.effective_precision
        self._runtime = runtime
        self._initial = {s.name: _checked_state(initial, s.name, s.shape).copy() for s in spec.states}
        self._ended = np.zeros(spec.batch, bool)
        self._state = runtime.load_state(self._initial)

    # -- streams -------------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """B, the number of lanes."""
        return self.spec.batch

    @property
    def ended(self) -> Array:
        """[B] bool: lanes whose last chunk was partial; they take no more tokens until they are reset."""
        return self._ended.copy()

    def is_fresh(self) -> bool:
        """Whether the state is the initial one, bit by bit, on all lanes."""
        state = self.read_state()
        return all(state[name].tobytes() == value.tobytes() for name, value in self._initial.items())

    def reset(self, lane: int | None = None) -> None:
        """Start a lane (default: all) afresh: the state is the initial one, bit by bit."""
        if lane is None:
            self._state = self._runtime.load_state(self._initial)
            self._ended[:] = False
        else:
            self._replace_lane(self._lane(lane), self._initial)
            self._ended[lane] = False

    def step(self, tokens: ArrayLike, valid: ArrayLike | None = None, entry: str = "step") -> Arrays:
        """Run one call of the graph.

        Args:
            tokens: [B, K] ids or [B, K, input_dim] vectors, as the spec of the entry says.
            valid: [B], how many of the tokens count on each lane (default: all). A lane with 0 keeps its state as
                it was. A lane that ends inside a chunk is exact, and then takes no more tokens until it is reset.
            entry: which graph of the bundle.

        Returns:
            The outputs by name, [B, K, ...], of use for the valid tokens. They are the caller's own.

        Raises:
            InputError: wrong shape or dtype, or ids outside the vocabulary. Nothing has happened to the state.
            StreamError: a lane has ended. Nothing has happened to the state.
            NonFiniteError: an output or a state became NaN or infinite; names the lanes, which can be reset.
        """
        spec = self.spec.entry(entry)
        inputs = {spec.inputs[0].name: _checked_input(spec.inputs[0], tokens)}
        counts = np.full(self.batch, spec.inputs[0].shape[1])
        if self._counts_tokens(entry):
            counts = counts if valid is None else _checked_input(spec.input(VALID), valid)
            inputs[VALID] = counts
        elif valid is not None:
            raise InputError(f"The entry {entry} has no input valid: every token of a call counts. Leave valid out.")
        if np.any(self._ended & (counts > 0)):
            lanes = np.flatnonzero(self._ended & (counts > 0)).tolist()
            raise StreamError(
                f"The streams on lanes {lanes} ended with a partial chunk (fewer than {self.spec.chunk_size} "
                "tokens) and take no more. Reset these lanes, or give them valid=0."
            )
        outputs, self._state = self._runtime.call(entry, inputs, self._state)
        self._ended |= counts % self.spec.chunk_size != 0
        self._check_finite(outputs, counts)
        return outputs

    def run(self, sequence: ArrayLike) -> Arrays:
        """Feed whole sequences, one per lane, from where the lanes stand.

        Args:
            sequence: [B, T] ids or [B, T, input_dim] vectors; with one lane also [T] or [T, input_dim].
                A last chunk of fewer than C tokens ends the streams.

        Returns:
            The outputs by name, [B, T, ...] (without the lane axis where the sequence had none).
        """
        entry = self.spec.entry("step")
        spec = entry.inputs[0]
        wanted = ["T" if axis == 1 else str(size) for axis, size in enumerate(spec.shape)]
        tokens = _array(f"run takes a sequence of shape [{', '.join(wanted)}]; what was given", sequence)
        single = tokens.ndim == len(spec.shape) - 1 and self.batch == 1
        tokens = tokens[None] if single else tokens
        if tokens.ndim != len(spec.shape) or tokens.shape[0] != self.batch or tokens.shape[2:] != spec.shape[2:]:
            raise InputError(f"run takes a sequence of shape [{', '.join(wanted)}]; given {list(np.shape(sequence))}.")
        if tokens.shape[1] == 0:
            raise InputError("run takes a sequence of at least one token; given none.")
        # All of it is checked before any of it is fed.
        _check_values(spec, tokens)
        length = spec.shape[1]
        if tokens.shape[1] % length and not self._counts_tokens("step"):
            raise InputError(
                f"This model takes whole calls of {length} tokens only; given {tokens.shape[1]} tokens. "
                f"Give a multiple of {length}."
            )
        pieces: dict[str, list[Array]] = {item.name: [] for item in entry.outputs}
        for start in range(0, tokens.shape[1], length):
            run = tokens[:, start : start + length]
            count = run.shape[1]
            padding = [(0, 0)] * tokens.ndim
            padding[1] = (0, length - count)
            valid = np.full(self.batch, count) if self._counts_tokens("step") else None
            outputs = self.step(np.pad(run, padding, mode="edge"), valid)
            for name, value in outputs.items():
                pieces[name].append(value[:, :count])
        joined = {name: np.concatenate(parts, 1) for name, parts in pieces.items()}
        return {name: value[0] for name, value in joined.items()} if single else joined

    # -- state ---------------------------------------------------------------------------------------------------

    def read_state(self) -> Arrays:
        """A copy of the whole state by name, lanes included."""
        return self._runtime.read_state(self._state)

    def load_state(self, arrays: Mapping[str, ArrayLike]) -> None:
        """Put the whole state, by name, with all lanes.

        Raises:
            InputError: a state is missing, unknown, or of the wrong shape.
        """
        unknown = sorted(set(arrays) - set(self.spec.state_names))
        if unknown:
            raise InputError(f"The model has no states {unknown}; it has {sorted(self.spec.state_names)}.")
        checked = {s.name: _checked_state(arrays, s.name, s.shape) for s in self.spec.states}
        self._state = self._runtime.load_state(checked)
        self._ended[:] = checked[OFFSET] != 0 if OFFSET in checked else False

    def snapshot(self, lane: int | None = None) -> bytes:
        """Everything that a lane (default: all lanes) needs to go on later, here or on another target.

        The bytes carry the model's fingerprint and a hash of themselves.

        Raises:
            NonFiniteError: the state holds NaN or infinity, so there is nothing worth keeping.
        """
        arrays = self.read_state()
        ended = self._ended
        if lane is not None:
            index = self._lane(lane)
            arrays = {s.name: arrays[s.name][s.lane_index(index)] for s in self.spec.states}
            ended = ended[index : index + 1]
        for name, value in arrays.items():
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise NonFiniteError(f"The state {name} holds NaN or infinite numbers. Reset the lane.")
        buffer = io.BytesIO()
        header = {"fingerprint": self.fingerprint, "lanes": None if lane is not None else self.batch}
        np.savez(buffer, allow_pickle=False, header=np.array(json.dumps(header)), ended=ended, **_keyed(arrays))
        payload = buffer.getvalue()
        return _SNAPSHOT_MAGIC + hashlib.sha256(payload).digest() + payload

    def restore(self, snapshot: bytes, lane: int | None = None) -> None:
        """Go on from a snapshot: of one lane into `lane`, or of all lanes into all.

        Raises:
            SnapshotError: damaged, of another model, or of other lanes. Nothing has happened to the state.
        """
        header, ended, arrays = _parse_snapshot(snapshot)
        if header["fingerprint"] != self.fingerprint:
            raise SnapshotError(
                f"The snapshot is of another model (fingerprint {header['fingerprint'][:12]}..., this is "
                f"{self.fingerprint[:12]}...). Restore it in a session of the model it was taken from."
            )
        lanes = None if lane is not None else self.batch
        if header["lanes"] != lanes:
            held = "one lane" if header["lanes"] is None else f"all {header['lanes']} lanes"
            wanted = "one lane" if lanes is None else f"all {lanes} lanes"
            raise SnapshotError(f"The snapshot holds {held}, the call restores {wanted}. Give `lane` for one lane.")
        for state in self.spec.states:
            shape = state.shape if lane is None else np.empty(state.shape, bool)[state.lane_index(0)].shape
            if arrays.get(state.name, np.empty(0)).shape != shape:
                raise SnapshotError(f"The snapshot does not hold {state.name} of shape {list(shape)}.")
        if lane is None:
            self._state = self._runtime.load_state(arrays)
            self._ended[:] = ended
        else:
            index = self._lane(lane)
            whole = self.read_state()
            for state in self.spec.states:
                whole[state.name][state.lane_index(index)] = arrays[state.name]
            self._state = self._runtime.load_state(whole)
            self._ended[index] = ended[0]

    # -- end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        self._runtime.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lane(self, lane: int) -> int:
        if not 0 <= lane < self.batch:
            raise InputError(f"The session has lanes 0 .. {self.batch - 1}; given {lane}.")
        return lane

    def _replace_lane(self, lane: int, source: Mapping[str, Array]) -> None:
        whole = self.read_state()
        for state in self.spec.states:
            index = state.lane_index(lane)
            whole[state.name][index] = source[state.name][index]
        self._state = self._runtime.load_state(whole)

    def _check_finite(self, outputs: Arrays, counts: Array) -> None:
        """Raise `NonFiniteError` for what the last call answered or left, on the lanes that it had tokens for."""
        lanes = np.flatnonzero(counts).tolist()
        for name, value in outputs.items():
            if not np.isfinite(value).all():
                _raise_non_finite(f"output {name}", {lane: value[lane, : counts[lane]] for lane in lanes})
        if not self._runtime.finite(self._state):
            whole = self.read_state()
            for state in self.spec.states:
                values = {lane: whole[state.name][state.lane_index(lane)] for lane in lanes}
                _raise_non_finite(f"state {state.name}", values)

    def _counts_tokens(self, entry: str) -> bool:
        return any(item.name == VALID for item in self.spec.entry(entry).inputs)


def _raise_non_finite(what: str, values: Mapping[int, Array]) -> None:
    """Raise if one of the values, by lane, holds NaN or infinity."""
    bad = [lane for lane, value in values.items() if not np.isfinite(value).all()]
    if bad:
        raise NonFiniteError(
            f"The {what} holds NaN or infinite numbers on lanes {bad}. Reset them to go on; "
            "if it happens again, check the weights and the inputs."
        )


def _checked_input(spec: TensorSpec, value: ArrayLike) -> Array:
    array = _array(spec.name, value)
    if array.shape != spec.shape:
        raise InputError(f"{spec.name} has the shape {list(spec.shape)}; given {list(array.shape)}.")
    _check_values(spec, array)
    return array.astype(spec.numpy_dtype, copy=False)


def _check_values(spec: TensorSpec, array: Array) -> None:
    kinds = "iu" if spec.numpy_dtype.kind in "iu" else spec.numpy_dtype.kind
    if array.dtype.kind not in kinds:
        raise InputError(f"{spec.name} has the dtype {spec.dtype}; given {array.dtype}.")
    if spec.minimum is not None and spec.maximum is not None:
        low, high = int(array.min()), int(array.max())
        if not spec.minimum <= low <= high <= spec.maximum:
            raise InputError(f"{spec.name} must lie in {spec.minimum} .. {spec.maximum}; given {low} .. {high}.")


def _array(name: str, value: ArrayLike) -> Array:
    try:
        return np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise InputError(f"{name} is not an array: {error}") from error


def _checked_state(arrays: Mapping[str, ArrayLike], name: str, shape: tuple[int, ...]) -> Array:
    if name not in arrays:
        raise InputError(f"The state {name} is missing; given are {sorted(arrays)}.")
    array = np.asarray(arrays[name])
    if array.shape != shape:
        raise InputError(f"The state {name} has the shape {list(shape)}; given {list(array.shape)}.")
    return array


def _keyed(arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {f"state/{name}": value for name, value in arrays.items()}


def _parse_snapshot(snapshot: bytes) -> tuple[dict[str, Any], Array, Arrays]:
    body = snapshot[len(_SNAPSHOT_MAGIC) :]
    if not snapshot.startswith(_SNAPSHOT_MAGIC) or hashlib.sha256(body[32:]).digest() != body[:32]:
        raise SnapshotError(
            "These bytes are not a snapshot of this version, or they are damaged: the hash does not fit. "
            "Expected is what Session.snapshot() returned."
        )
    with np.load(io.BytesIO(body[32:]), allow_pickle=False) as archive:
        arrays = {name.removeprefix("state/"): archive[name] for name in archive.files if name.startswith("state/")}
        return json.loads(str(archive["header"])), archive["ended"], arrays
