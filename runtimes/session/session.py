"""Session: B streams on one runtime. The session owns the state; the backend stores it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Literal, overload

import numpy as np
from numpy.typing import ArrayLike

from nsm.errors import InputError
from nsm.runtimes.base import NotCopyable, Runtime
from nsm.runtimes.session import non_finite
from nsm.runtimes.session.bad_lanes import OnBadLane, check_choice, usable_tokens
from nsm.runtimes.session.entry_inputs import EntryInputs
from nsm.runtimes.session.feeding import Feeding, checked_lanes, checked_sequence
from nsm.runtimes.session.inputs import as_array, checked_input, checked_state
from nsm.runtimes.session.lane_tokens import Capacity
from nsm.runtimes.session.lanes import lane_number, lane_part, put_lane
from nsm.runtimes.session.outputs import Outputs, all_skipped
from nsm.runtimes.session.snapshots import Snapshot, fitting, pack
from nsm.runtimes.session.standing import Standing, closed
from nsm.spec import OFFSET, VALID, StepSpec, TensorSpec
from nsm.trace import Array, Arrays

Valid = ArrayLike | None
"""[B], number of valid tokens of each lane in a call; None for all."""


class Session(NotCopyable):
    """Runs B independent streams on a runtime, split into calls of any length.

    The export fixes the number of lanes, B; every lane is an independent stream. `run` and `feed` take any number of
    tokens and align them to the graphs: `step` for whole chunks, `decode` for single tokens, `commit` when a decoded
    chunk is full. The outputs and the state do not depend on how a stream is split.

    Several threads may use a session: a call waits until the previous one has returned. If an exception such as Ctrl-C
    interrupts a call, the session keeps the state from before the call, or from after a part of `feed` or `run`. If the
    exception comes while the state is being replaced, the state is lost: the next call raises `StreamError` until all
    lanes are reset or restored.

    Args:
        runtime: a loaded artifact.
        spec: spec of the model.
        initial: initial values of the states by name, with all lanes. `reset` restores them bit by bit.
        fingerprint: fingerprint of the model, stored in snapshots.
        target: name of the target, for messages.
        threads: number of threads given to the runtime; None if the runtime chose it or has none.

    Raises:
        StreamError: from every method of a closed session.

    Example:
        >>> with nsm.open("digits.nsm", target="openvino") as session:   # doctest: +SKIP
        ...     outputs = session.run(tokens)["outputs"]                  # [T] ids -> [T, output_dim]
    """

    def __init__(
        self,
        runtime: Runtime,
        spec: StepSpec,
        initial: Mapping[str, Array],
        fingerprint: str,
        target: str,
        threads: int | None = None,
    ) -> None:
        self.spec = spec
        self.target = target
        self.fingerprint = fingerprint
        self.threads = threads
        self.effective_precision = runtime.effective_precision
        self._runtime = runtime
        self._initial = {s.name: checked_state(initial, s, spec.chunk_size).copy() for s in spec.states}
        # In a model without chunks, a lane may stop and continue anywhere.
        self._chunked = OFFSET in spec.state_names
        self._calls = {entry.name: EntryInputs(entry) for entry in spec.entries if entry.inputs}
        # A signal handler may call the session while its own thread is inside a call; it must not wait for that call.
        self._lock = threading.RLock()
        self._capacity = None if spec.capacity is None else Capacity(spec, self._initial)
        self._standing = Standing(runtime, spec, self._initial)

    # -- streams -------------------------------------------------------------------------------------------------

    @property
    def runtime(self) -> Runtime:
        """The runtime of the graphs, for benchmarks; do not call it while the session is in use."""
        return self._runtime

    @property
    def batch(self) -> int:
        """B, the number of lanes."""
        return self.spec.batch

    @property
    def offsets(self) -> Array:
        """[B] int64, the number of tokens in the open chunk of each lane."""
        _, place = self._standing.at or closed()
        return place.offsets.copy()

    @property
    def tokens_left(self) -> Array | None:
        """[B] int64, the number of tokens left until each lane needs a reset; None if unlimited."""
        _, place = self._standing.at or closed()
        if self._capacity is None or place.tokens is None:
            return None
        left: Array = np.maximum(self._capacity.tokens - place.tokens.lanes, 0)
        return left

    def is_fresh(self) -> bool:
        """Return whether the state of all lanes is the initial one, bit by bit."""
        state = self.read_state()
        return all(state[name].tobytes() == value.tobytes() for name, value in self._initial.items())

    def reset(self, lane: int | None = None) -> None:
        """Reset a lane (default: all) to the initial state, bit by bit."""
        with self._lock:
            _, place = self._standing.at or closed()
            if lane is None:
                self._standing.put(self._initial)
                return
            index = lane_number(lane, self.batch)
            whole = self._standing.read()
            put_lane(self.spec.states, whole, index, lane_part(self.spec.states, self._initial, index))
            self._standing.put(whole, place.reset(index))

    @overload
    def step(self, tokens: ArrayLike, valid: Valid = None, *, on_bad_lane: Literal["raise"] = "raise") -> Arrays: ...

    @overload
    def step(self, tokens: ArrayLike, valid: Valid = None, *, on_bad_lane: Literal["skip"]) -> Outputs: ...

    def step(self, tokens: ArrayLike, valid: Valid = None, *, on_bad_lane: OnBadLane = "raise") -> Arrays:
        """Run the graph `step` once, on lanes at the start of a chunk.

        Args:
            tokens: [B, K] ids or [B, K, input_dim] vectors; the spec of the entry gives K.
            valid: [B], number of valid tokens of each lane (default: all). A lane with 0 keeps its state. A lane that
                ends inside a chunk is exact, and continues with `decode`, `feed` or `run`.
            on_bad_lane: behaviour if tokens of a lane are not finite or outside the vocabulary. "raise" refuses
                the call; "skip" runs it without these lanes: they keep their state and their outputs are NaN.

        Returns:
            The outputs by name, [B, K, ...], meaningful for the valid tokens. The caller owns them. With "skip" their
            attribute `skipped` names the skipped lanes.

        Raises:
            InputError: wrong shape or dtype, ids outside the vocabulary, or a valid token that is not finite;
                `lanes` names the lanes. The state is unchanged.
            StreamError: a lane is inside a chunk, or would exceed the capacity. The state is unchanged.
            NonFiniteError: an output or a state became NaN or infinite; names the lanes, which can be reset.
        """
        with self._lock:
            state, place = self._standing.at or closed()
            call = self._calls["step"]
            inputs, counts, skipped = call.checked(tokens, valid, on_bad_lane)
            if not place.aligned:
                place.check_at_beginning(counts, self.spec)
            if skipped and not counts.any():
                return all_skipped(self.spec.entry("step"), skipped)
            if self._capacity is not None and place.tokens is not None:
                place = place.counted(self._capacity.after(place.tokens, counts, counts is call.all))
            if self._chunked and counts is not call.all:
                place = place.moved(counts % self.spec.chunk_size)
            outputs, finite = self._standing.advance("step", inputs, state, place)
            if not finite:
                self._look_for_non_finite(outputs, counts)
            return outputs if on_bad_lane == "raise" else Outputs(outputs).skip(skipped)

    @overload
    def decode(self, tokens: ArrayLike, valid: Valid = None, *, on_bad_lane: Literal["raise"] = "raise") -> Arrays: ...

    @overload
    def decode(self, tokens: ArrayLike, valid: Valid = None, *, on_bad_lane: Literal["skip"]) -> Outputs: ...

    def decode(self, tokens: ArrayLike, valid: Valid = None, *, on_bad_lane: OnBadLane = "raise") -> Arrays:
        """Run one token per lane, anywhere in a chunk, and commit the chunks that become full.

        Args:
            tokens: [B, 1] ids or [B, 1, input_dim] vectors.
            valid: [B], 1 if the lane has a token, 0 if it has none and keeps its state (default: all 1).
            on_bad_lane: as for `step`.

        Returns:
            The outputs by name, [B, 1, ...]; see `step`.

        Raises:
            InputError: as for `step`, or the bundle has no entry `decode`.
            StreamError: a lane would exceed the capacity. The state is unchanged.
            NonFiniteError: as for `step`.
        """
        with self._lock:
            state, place = self._standing.at or closed()
            call = self._calls.get("decode") or EntryInputs(self.spec.entry("decode"))  # raises without one
            inputs, counts, skipped = call.checked(tokens, valid, on_bad_lane)
            if skipped and not counts.any():
                return all_skipped(self.spec.entry("decode"), skipped)
            taken = place.tokens
            if self._capacity is not None and taken is not None:
                taken = self._capacity.after(taken, counts, counts is call.all)
            finite = True
            if place.full:  # a commit is pending: an earlier one failed, or the loaded state has a full chunk
                finite = self._standing.commit()
                state, place = self._standing.at or closed()
            if taken is not None:
                place = place.counted(taken)
            if self._chunked:
                place = place.moved(counts)
            outputs, wrote_finite = self._standing.advance("decode", inputs, state, place)
            finite = finite and wrote_finite
            if place.full:
                finite = self._standing.commit() and finite
            # Raise last, so that the offsets of the finite lanes agree with their state.
            if not finite:
                self._look_for_non_finite(outputs, counts)
            return outputs if on_bad_lane == "raise" else Outputs(outputs).skip(skipped)

    @overload
    def feed(self, tokens: ArrayLike, valid: Valid = None, *, on_bad_lane: Literal["raise"] = "raise") -> Arrays: ...

    @overload
    def feed(self, tokens: ArrayLike, valid: Valid = None, *, on_bad_lane: Literal["skip"]) -> Outputs: ...

    def feed(self, tokens: ArrayLike, valid: Valid = None, *, on_bad_lane: OnBadLane = "raise") -> Arrays:
        """Run any number of tokens, from any offset of the lanes.

        Args:
            tokens: [B, T] ids or [B, T, input_dim] vectors, T >= 1.
            valid: [B], number of valid tokens of each lane (default: all).
            on_bad_lane: as for `step`. The whole call skips a lane, even if only its last token is bad.

        Returns:
            The outputs by name, [B, T, ...]; zero after the valid tokens of a lane. Only `step` gives debug outputs,
            which are NaN for tokens that ran through `decode`. With "skip" see `step` for the attribute `skipped`.

        Raises:
            InputError: as for `step`. The state is unchanged.
            StreamError: the bundle has no entry `decode` and a lane is inside a chunk, or a lane would exceed the
                capacity. The state is unchanged.
            NonFiniteError: as for `step`.
        """
        with self._lock:
            _, place = self._standing.at or closed()
            entry = self.spec.entry("step")
            given = checked_sequence(self.spec, "feed", tokens)
            length = given.shape[1]
            counts = np.full(self.batch, length)
            if valid is not None:
                counts = checked_input(TensorSpec(VALID, (self.batch,), "int64", None, 0, length), valid)
            if on_bad_lane != "raise":
                check_choice(on_bad_lane, self.batch, any(item.input(VALID) is not None for item in self.spec.entries))
            given, counts, skipped = usable_tokens(entry.inputs[0], given, counts, on_bad_lane)
            if self._capacity is not None and place.tokens is not None:
                self._capacity.check(place.tokens, counts)
            if not self.spec.has("decode") and len(skipped) < self.batch:
                place.check_at_beginning(counts, self.spec)
                checked_lanes(self.spec, counts, length)
            outputs = Feeding(self.spec, given, counts).finish(self.step, self.decode, lambda: self.offsets)
            return outputs if on_bad_lane == "raise" else Outputs(outputs).skip(skipped)

    def run(self, sequence: ArrayLike) -> Arrays:
        """Run whole sequences, one per lane, from the current state.

        Args:
            sequence: [B, T] ids or [B, T, input_dim] vectors; with one lane also [T] or [T, input_dim].

        Returns:
            The outputs by name, [B, T, ...], without the lane axis if the sequence has none.
        """
        with self._lock:
            _ = self._standing.at or closed()
            tokens = as_array("The sequence given to run", sequence)
            single = tokens.ndim == len(self.spec.entry("step").inputs[0].shape) - 1 and self.batch == 1
            results = self.feed(checked_sequence(self.spec, "run", tokens[None] if single else tokens))
            return {name: value[0] for name, value in results.items()} if single else results

    # -- state ---------------------------------------------------------------------------------------------------

    def read_state(self) -> Arrays:
        """Return a copy of the whole state by name, with all lanes."""
        with self._lock:
            return self._standing.read()

    def load_state(self, arrays: Mapping[str, ArrayLike], tokens: ArrayLike | None = None) -> None:
        """Replace the whole state.

        Args:
            arrays: the states by name, with all lanes.
            tokens: [B], number of tokens of each lane since its reset, for a model with a capacity (default: read
                from a state that counts tokens).

        Raises:
            InputError: a state is missing, unknown, has a wrong shape or dtype, or contains NaN, infinity or an
                offset outside the chunk; or the number of tokens is unknown. The state is unchanged.
        """
        with self._lock:
            _ = self._standing.at or closed()
            unknown = sorted(set(arrays) - set(self.spec.state_names))
            if unknown:
                raise InputError(f"The model has no states {unknown}; it has {sorted(self.spec.state_names)}.")
            checked = {s.name: checked_state(arrays, s, self.spec.chunk_size) for s in self.spec.states}
            had = None if self._capacity is None else self._capacity.given(tokens, checked)
            self._standing.put(checked, tokens=had)

    def snapshot(self, lane: int | None = None) -> bytes:
        """Serialize a lane (default: all lanes), to continue later on this or another target.

        The bytes contain the fingerprint of the model and a hash.

        Raises:
            NonFiniteError: the state contains NaN or infinity.
        """
        with self._lock:
            whole = self._standing.read()
            lanes = range(self.batch) if lane is None else [lane_number(lane, self.batch)]
            _, place = self._standing.at or closed()
        had = None if place.tokens is None else place.tokens.lanes[list(lanes)].tolist()
        parts = {index: lane_part(self.spec.states, whole, index) for index in lanes}
        non_finite.check_states(parts, self.spec.states)
        if lane is None:
            return pack(Snapshot(self.fingerprint, self.batch, whole, had))
        return pack(Snapshot(self.fingerprint, None, parts[lanes[0]], had))

    def restore(self, snapshot: bytes | bytearray | memoryview, lane: int | None = None) -> None:
        """Restore a snapshot of one lane into `lane`, or of all lanes into all.

        Raises:
            SnapshotError: the argument is not bytes, or the snapshot is damaged, is of another model or of other
                lanes, or has invalid states. The state is unchanged.
        """
        with self._lock:
            _, place = self._standing.at or closed()
            held = fitting(snapshot, self.fingerprint, self.spec, one_lane=lane is not None)
            arrays, index = held.arrays, None
            if lane is not None:
                whole, index = self._standing.read(), lane_number(lane, self.batch)
                put_lane(self.spec.states, whole, index, arrays)
                arrays = whole
            had = place.tokens
            if self._capacity is not None and had is not None:
                had = self._capacity.restored(had, held.tokens, arrays, index)
            self._standing.put(arrays, tokens=had)

    def fork(self, lane: int, into: int) -> None:
        """Copy the stream of one lane into another lane; both continue from the same state.

        To copy it into another session, on any target: `other.restore(session.snapshot(lane), lane)`.
        """
        with self._lock:
            _, place = self._standing.at or closed()
            source, target = lane_number(lane, self.batch), lane_number(into, self.batch)
            whole = self._standing.read()
            put_lane(self.spec.states, whole, target, lane_part(self.spec.states, whole, source))
            had = place.tokens
            self._standing.put(whole, tokens=None if had is None else had.with_lane(target, int(had.lanes[source])))

    # -- end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free the memory of the runtime. Closing a closed session does nothing."""
        with self._lock:
            self._standing.close()

    def __enter__(self) -> Session:
        _ = self._standing.at or closed()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as closing:
            if error is None:
                raise
            error.add_note(f"Closing the session failed as well: {closing}")

    def _look_for_non_finite(self, outputs: Arrays, counts: Array) -> None:
        """Raise `NonFiniteError` for outputs or states of the last call, on the lanes that had tokens."""
        non_finite.check_lanes(outputs, self._standing.read(), self.spec.states, counts)
