"""Session: B streams on one runtime. It owns the state; backends only keep it."""

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
"""[B], how many of a call's tokens count on each lane; None for all."""


class Session(NotCopyable):
    """Feeds streams to a runtime, whatever pieces they come in.

    A session has B lanes, fixed when the bundle was made; every lane is a stream of its own. `run` and `feed` take
    any number of tokens and align them to the graphs: `step` for whole chunks, `decode` for single tokens, `commit`
    when a chunk that was decoded is full. The outputs and the state are the same however a stream was split.

    Several threads may use a session: a call waits until the one before it has returned. An exception that interrupts a
    call, as Ctrl-C, leaves the state of before, or that of after a part of `feed` or `run`; or, where it came while the
    state was being replaced, none: then the next call raises `StreamError` until all lanes are reset or restored.

    Args:
        runtime: a loaded artifact.
        spec: of the model.
        initial: the states' initial values, by name, lanes included. `reset` returns to them bit by bit.
        fingerprint: of the model; snapshots carry it.
        target: name of the target, for people.
        threads: that the runtime was given; None where it chose itself, or has none.

    Raises:
        StreamError: by every method of a session that is closed.

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
        # Where a model has no chunks, a lane may stop and go on anywhere.
        self._chunked = OFFSET in spec.state_names
        self._calls = {entry.name: EntryInputs(entry) for entry in spec.entries if entry.inputs}
        # A signal handler may interrupt a call of its own thread with another one, which must not wait for the first.
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
        """[B] int64: how many tokens the open chunk of each lane has."""
        _, place = self._standing.at or closed()
        return place.offsets.copy()

    @property
    def tokens_left(self) -> Array | None:
        """[B] int64: how many tokens each lane takes until it has to be reset; None where there is no end."""
        _, place = self._standing.at or closed()
        if self._capacity is None or place.tokens is None:
            return None
        left: Array = np.maximum(self._capacity.tokens - place.tokens.lanes, 0)
        return left

    def is_fresh(self) -> bool:
        """Whether the state is the initial one, bit by bit, on all lanes."""
        state = self.read_state()
        return all(state[name].tobytes() == value.tobytes() for name, value in self._initial.items())

    def reset(self, lane: int | None = None) -> None:
        """Start a lane (default: all) afresh: the state is the initial one, bit by bit."""
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
        """Run one call of the graph `step`, on lanes that stand at a chunk's beginning.

        Args:
            tokens: [B, K] ids or [B, K, input_dim] vectors, as the spec of the entry says.
            valid: [B], how many of the tokens count on each lane (default: all). A lane with 0 keeps its state as
                it was. A lane that ends inside a chunk is exact, and goes on with `decode`, `feed` or `run`.
            on_bad_lane: behaviour if tokens of a lane are not finite or outside the vocabulary. "raise" refuses
                the call; "skip" runs it without these lanes, whose state stays as it was and whose outputs are NaN.

        Returns:
            The outputs by name, [B, K, ...], of use for the valid tokens. They are the caller's own. With "skip" their
            attribute `skipped` names the lanes that were left out.

        Raises:
            InputError: wrong shape or dtype, ids outside the vocabulary, or a token that counts and is not finite;
                `lanes` says where. Nothing has happened to the state.
            StreamError: a lane stands inside a chunk, or would pass the capacity. Nothing has happened to the state.
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
        """Take one token a lane, anywhere in a chunk, and commit the chunks that are full then.

        Args:
            tokens: [B, 1] ids or [B, 1, input_dim] vectors.
            valid: [B], 1 where the lane has a token, 0 where it has none and keeps its state (default: all have).
            on_bad_lane: as for `step`.

        Returns:
            The outputs by name, [B, 1, ...]; see `step`.

        Raises:
            InputError: as for `step`, or the bundle has no entry `decode`.
            StreamError: a lane would pass the capacity. Nothing has happened to the state.
            NonFiniteError: as for `step`.
        """
        with self._lock:
            state, place = self._standing.at or closed()
            call = self._calls.get("decode") or EntryInputs(self.spec.entry("decode"))  # raises where there is none
            inputs, counts, skipped = call.checked(tokens, valid, on_bad_lane)
            if skipped and not counts.any():
                return all_skipped(self.spec.entry("decode"), skipped)
            taken = place.tokens
            if self._capacity is not None and taken is not None:
                taken = self._capacity.after(taken, counts, counts is call.all)
            finite = True
            if place.full:  # after a commit that failed, or with a state that was put in before one
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
            # At the end, so that lanes that are well stand where their state does when this raises.
            if not finite:
                self._look_for_non_finite(outputs, counts)
            return outputs if on_bad_lane == "raise" else Outputs(outputs).skip(skipped)

    @overload
    def feed(self, tokens: ArrayLike, valid: Valid = None, *, on_bad_lane: Literal["raise"] = "raise") -> Arrays: ...

    @overload
    def feed(self, tokens: ArrayLike, valid: Valid = None, *, on_bad_lane: Literal["skip"]) -> Outputs: ...

    def feed(self, tokens: ArrayLike, valid: Valid = None, *, on_bad_lane: OnBadLane = "raise") -> Arrays:
        """Feed any number of tokens, from wherever the lanes stand.

        Args:
            tokens: [B, T] ids or [B, T, input_dim] vectors, T >= 1.
            valid: [B], how many of the tokens count on each lane (default: all).
            on_bad_lane: as for `step`. A lane is left out of the whole call, also where only its last token is bad.

        Returns:
            The outputs by name, [B, T, ...]; zero behind a lane's valid tokens. Debug outputs are those of `step`: NaN
            for tokens that went through `decode`. With "skip" they have the attribute `skipped`; see `step`.

        Raises:
            InputError: as for `step`. Nothing has happened to the state.
            StreamError: there is no entry `decode`, and a lane stands inside a chunk; or a lane would pass the
                capacity. Nothing has happened to the state.
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
        """Feed whole sequences, one per lane, from where the lanes stand.

        Args:
            sequence: [B, T] ids or [B, T, input_dim] vectors; with one lane also [T] or [T, input_dim].

        Returns:
            The outputs by name, [B, T, ...] (without the lane axis where the sequence had none).
        """
        with self._lock:
            _ = self._standing.at or closed()
            tokens = as_array("The sequence given to run", sequence)
            single = tokens.ndim == len(self.spec.entry("step").inputs[0].shape) - 1 and self.batch == 1
            results = self.feed(checked_sequence(self.spec, "run", tokens[None] if single else tokens))
            return {name: value[0] for name, value in results.items()} if single else results

    # -- state ---------------------------------------------------------------------------------------------------

    def read_state(self) -> Arrays:
        """A copy of the whole state by name, lanes included."""
        with self._lock:
            return self._standing.read()

    def load_state(self, arrays: Mapping[str, ArrayLike], tokens: ArrayLike | None = None) -> None:
        """Put the whole state, by name, with all lanes.

        Args:
            arrays: the states.
            tokens: [B], how many tokens each lane has had, of a model with a capacity (default: as a state that
                counts them says).

        Raises:
            InputError: a state is missing, unknown, of another shape or kind of numbers, or holds NaN, infinity or
                an offset outside the chunk; or nothing says how many tokens the lanes have had. Nothing has happened
                to the state.
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
        """Everything that a lane (default: all lanes) needs to go on later, here or on another target.

        The bytes carry the model's fingerprint and a hash of themselves.

        Raises:
            NonFiniteError: the state holds NaN or infinity, so there is nothing worth keeping.
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
        """Go on from a snapshot: of one lane into `lane`, or of all lanes into all.

        Raises:
            SnapshotError: no bytes, damaged, of another model, of other lanes, or with states that the model does not
                take. Nothing has happened to the state.
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
        """Let the stream on one lane go on on another as well: both continue from where it stands.

        Into another session, on this target or another: `other.restore(session.snapshot(lane), lane)`.
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
