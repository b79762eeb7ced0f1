"""Session: B streams on one runtime. It owns the state; backends only keep it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TypeGuard

import numpy as np
from numpy.typing import ArrayLike

from nsm.errors import InputError, NonFiniteError, SnapshotError, StreamError
from nsm.runtimes.base import Runtime
from nsm.runtimes.checks import all_finite, as_array, checked_input, checked_state, checked_tokens, finite_tokens
from nsm.runtimes.lane_tokens import LaneTokens
from nsm.runtimes.snapshots import Snapshot, pack, unpack
from nsm.spec import OFFSET, VALID, EntrySpec, StepSpec, TensorSpec
from nsm.trace import Array, Arrays

_UINT64 = np.dtype(np.uint64)

# So many ids are looked at faster as a list: after a call of a backend, numpy's way to a reduction is in no cache.
_FEW = 256

# A call of `step` takes about as long as so many of `decode`, as a share of the chunk: 1 / 4.
_DECODES_PER_STEP = 4


class Session:
    """Feeds streams to a runtime, whatever pieces they come in.

    A session has B lanes, fixed when the bundle was made; every lane is a stream of its own. `run` and `feed` take
    any number of tokens and align them to the graphs: `step` for whole chunks, `decode` for single tokens, `commit`
    when a chunk that was decoded is full. The outputs and the state are the same however a stream was split.

    Args:
        runtime: a loaded artifact.
        spec: of the model.
        initial: the states' initial values, by name, lanes included. `reset` returns to them bit by bit.
        fingerprint: of the model; snapshots carry it.
        target: name of the target, for people.
        threads: that the runtime was given; None where it chose itself, or has none.

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
        self._offset = np.zeros(spec.batch, np.int64)
        self._aligned = True  # whether all lanes stand at a chunk's beginning
        self._calls = {entry.name: _Call(entry) for entry in spec.entries if entry.inputs}
        self._tokens = None if spec.capacity is None else LaneTokens(spec, self._initial)
        self._state = runtime.load_state(self._initial)

    # -- streams -------------------------------------------------------------------------------------------------

    @property
    def runtime(self) -> Runtime:
        """What runs the graphs; for measuring it, and not to be called while the session is in use."""
        return self._runtime

    @property
    def batch(self) -> int:
        """B, the number of lanes."""
        return self.spec.batch

    @property
    def offsets(self) -> Array:
        """[B] int64: how many tokens the open chunk of each lane has."""
        return self._offset.copy()

    @property
    def tokens_left(self) -> Array | None:
        """[B] int64: how many tokens each lane takes until it has to be reset; None where there is no end."""
        return None if self._tokens is None else np.maximum(self._tokens.capacity - self._tokens.used, 0)

    def is_fresh(self) -> bool:
        """Whether the state is the initial one, bit by bit, on all lanes."""
        state = self.read_state()
        return all(state[name].tobytes() == value.tobytes() for name, value in self._initial.items())

    def reset(self, lane: int | None = None) -> None:
        """Start a lane (default: all) afresh: the state is the initial one, bit by bit."""
        if lane is None:
            self._state = self._runtime.load_state(self._initial)
            self._stand(np.zeros(self.batch, np.int64))
            if self._tokens is not None:
                self._tokens.put(np.zeros(self.batch, np.int64))
        else:
            index = self._lane(lane)
            self._replace_lane(index, self._initial)
            self._stand(np.where(np.arange(self.batch) == index, 0, self._offset))
            if self._tokens is not None:
                self._tokens.put_lane(index, 0)

    def step(self, tokens: ArrayLike, valid: ArrayLike | None = None) -> Arrays:
        """Run one call of the graph `step`, on lanes that stand at a chunk's beginning.

        Args:
            tokens: [B, K] ids or [B, K, input_dim] vectors, as the spec of the entry says.
            valid: [B], how many of the tokens count on each lane (default: all). A lane with 0 keeps its state as
                it was. A lane that ends inside a chunk is exact, and goes on with `decode`, `feed` or `run`.

        Returns:
            The outputs by name, [B, K, ...], of use for the valid tokens. They are the caller's own.

        Raises:
            InputError: wrong shape or dtype, ids outside the vocabulary, or a token that counts and is not finite.
                Nothing has happened to the state.
            StreamError: a lane stands inside a chunk, or would pass the capacity. Nothing has happened to the state.
            NonFiniteError: an output or a state became NaN or infinite; names the lanes, which can be reset.
        """
        call = self._calls["step"]
        inputs, counts = call.checked(tokens, valid)
        if not self._aligned:
            self._check_at_beginning(counts)
        if self._tokens is not None and self._tokens.most + call.length > self._tokens.capacity:
            self._tokens.check(counts)
        outputs, self._state = self._runtime.call("step", inputs, self._state)
        if self._tokens is not None:
            if counts is call.all:
                self._tokens.most += call.length
            else:
                self._tokens.put(self._tokens.used + counts)
        if self._chunked and counts is not call.all:
            self._stand(self._offset + counts % self.spec.chunk_size)
        if not self._runtime.finite(self._state):
            self._look_for_non_finite(outputs, counts)
        return outputs

    def decode(self, tokens: ArrayLike, valid: ArrayLike | None = None) -> Arrays:
        """Take one token a lane, anywhere in a chunk, and commit the chunks that are full then.

        Args:
            tokens: [B, 1] ids or [B, 1, input_dim] vectors.
            valid: [B], 1 where the lane has a token, 0 where it has none and keeps its state (default: all have).

        Returns:
            The outputs by name, [B, 1, ...].

        Raises:
            InputError: as for `step`, or the bundle has no entry `decode`.
            StreamError: a lane would pass the capacity. Nothing has happened to the state.
            NonFiniteError: as for `step`.
        """
        call = self._entry("decode")
        inputs, counts = call.checked(tokens, valid)
        if self._tokens is not None and self._tokens.most >= self._tokens.capacity:
            self._tokens.check(counts)
        self._commit_full()  # a commit that failed, or a state that was put in before one, is made up for
        outputs, self._state = self._runtime.call("decode", inputs, self._state)
        if self._tokens is not None:
            if counts is call.all:
                self._tokens.most += call.length
            else:
                self._tokens.put(self._tokens.used + counts)
        if self._chunked:
            self._stand(self._offset + counts)
        finite = self._runtime.finite(self._state)
        if self._commit_full():
            finite = finite and self._runtime.finite(self._state)
        # At the end, so that lanes that are well stand where their state does when this raises.
        if not finite:
            self._look_for_non_finite(outputs, counts)
        return outputs

    def feed(self, tokens: ArrayLike, valid: ArrayLike | None = None) -> Arrays:
        """Feed any number of tokens, from wherever the lanes stand.

        Args:
            tokens: [B, T] ids or [B, T, input_dim] vectors, T >= 1.
            valid: [B], how many of the tokens count on each lane (default: all).

        Returns:
            The outputs by name, [B, T, ...]; zero behind a lane's valid tokens. Debug outputs are those of `step`: NaN
            for tokens that went through `decode`.

        Raises:
            InputError: as for `step`. Nothing has happened to the state.
            StreamError: there is no entry `decode`, and a lane stands inside a chunk; or a lane would pass the
                capacity. Nothing has happened to the state.
            NonFiniteError: as for `step`.
        """
        entry = self.spec.entry("step")
        spec = entry.inputs[0]
        given = self._checked_shape("feed", tokens)
        length = given.shape[1]
        counts = np.full(self.batch, length)
        if valid is not None:
            counts = checked_input(TensorSpec(VALID, (self.batch,), "int64", None, 0, length), valid)
        given = checked_tokens(spec, given, counts)
        if self._tokens is not None:
            self._tokens.check(counts)
        if not self.spec.has("decode"):
            self._check_at_beginning(counts)
            if entry.input(VALID) is None and np.any(counts != length):
                raise InputError(
                    f"This model takes whole calls on all lanes at once; given are {counts.tolist()} tokens for its "
                    "lanes. Give all lanes as many."
                )
        results = {
            item.name: np.zeros((self.batch, length, *item.shape[2:]), item.numpy_dtype) for item in entry.outputs
        }
        done = np.zeros(self.batch, np.int64)
        while np.any(done < counts):
            left = counts - done
            stepped = self._stepped(left)
            if np.any(stepped):
                self._feed_part(self.step, spec, given, done, stepped, results)
                done += stepped
                left = counts - done
            decoded = (left > 0) & (stepped == 0)
            if self.spec.has("decode") and np.any(decoded):
                one = decoded.astype(np.int64)
                self._feed_part(self.decode, self.spec.entry("decode").inputs[0], given, done, one, results)
                done += one
        return results

    def run(self, sequence: ArrayLike) -> Arrays:
        """Feed whole sequences, one per lane, from where the lanes stand.

        Args:
            sequence: [B, T] ids or [B, T, input_dim] vectors; with one lane also [T] or [T, input_dim].

        Returns:
            The outputs by name, [B, T, ...] (without the lane axis where the sequence had none).
        """
        spec = self.spec.entry("step").inputs[0]
        tokens = as_array("The sequence given to run", sequence)
        single = tokens.ndim == len(spec.shape) - 1 and self.batch == 1
        results = self.feed(self._checked_shape("run", tokens[None] if single else tokens))
        return {name: value[0] for name, value in results.items()} if single else results

    # -- state ---------------------------------------------------------------------------------------------------

    def read_state(self) -> Arrays:
        """A copy of the whole state by name, lanes included."""
        return self._runtime.read_state(self._state)

    def load_state(self, arrays: Mapping[str, ArrayLike], tokens: ArrayLike | None = None) -> None:
        """Put the whole state, by name, with all lanes.

        Args:
            arrays: the states.
            tokens: [B], how many tokens each lane has had, of a model with a capacity (default: what a state that
                counts them says).

        Raises:
            InputError: a state is missing, unknown, of another shape or kind of numbers, or holds NaN, infinity or
                an offset outside the chunk; or nothing says how many tokens the lanes have had. Nothing has happened
                to the state.
        """
        unknown = sorted(set(arrays) - set(self.spec.state_names))
        if unknown:
            raise InputError(f"The model has no states {unknown}; it has {sorted(self.spec.state_names)}.")
        checked = {s.name: checked_state(arrays, s, self.spec.chunk_size) for s in self.spec.states}
        self._put(checked, None if self._tokens is None else self._tokens.given(tokens, checked))

    def snapshot(self, lane: int | None = None) -> bytes:
        """Everything that a lane (default: all lanes) needs to go on later, here or on another target.

        The bytes carry the model's fingerprint and a hash of themselves.

        Raises:
            NonFiniteError: the state holds NaN or infinity, so there is nothing worth keeping.
        """
        arrays = self.read_state()
        index = None if lane is None else self._lane(lane)
        if index is not None:
            arrays = {s.name: arrays[s.name][s.lane_index(index)] for s in self.spec.states}
        tokens = None if self._tokens is None else self._tokens.of(index)
        return pack(Snapshot(self.fingerprint, None if lane is not None else self.batch, arrays, tokens))

    def restore(self, snapshot: bytes | bytearray | memoryview, lane: int | None = None) -> None:
        """Go on from a snapshot: of one lane into `lane`, or of all lanes into all.

        Raises:
            SnapshotError: no bytes, damaged, of another model, of other lanes, or with states that the model does not
                take. Nothing has happened to the state.
        """
        shapes = {
            state.name: state.shape if lane is None else np.empty(state.shape, bool)[state.lane_index(0)].shape
            for state in self.spec.states
        }
        held = unpack(snapshot, self.fingerprint, None if lane is not None else self.batch, shapes)
        try:
            arrays = {
                s.name: checked_state(held.arrays, s, self.spec.chunk_size, shapes[s.name]) for s in self.spec.states
            }
        except InputError as error:
            raise SnapshotError(f"The snapshot does not fit this model: {error} Take it again.") from error
        index = None if lane is None else self._lane(lane)
        if index is not None:
            whole = self.read_state()
            for state in self.spec.states:
                whole[state.name][state.lane_index(index)] = arrays[state.name]
            arrays = whole
        tokens = None if self._tokens is None else self._tokens.restored(held.tokens, arrays, index)
        self._put(arrays, tokens)

    def fork(self, lane: int, into: int) -> None:
        """Let the stream on one lane go on on another as well: both continue from where it stands.

        Into another session, on this target or another: `other.restore(session.snapshot(lane), lane)`.
        """
        source, target = self._lane(lane), self._lane(into)
        whole = self.read_state()
        for state in self.spec.states:
            whole[state.name][state.lane_index(target)] = whole[state.name][state.lane_index(source)]
        tokens = (
            None
            if self._tokens is None
            else self._tokens.used[np.where(np.arange(self.batch) == target, source, np.arange(self.batch))]
        )
        self._put(whole, tokens)

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
        try:
            index = operator.index(lane)
        except TypeError as error:
            raise InputError(
                f"A lane is one whole number, 0 .. {self.batch - 1}; given {lane!r} of type {type(lane).__name__}."
            ) from error
        if not 0 <= index < self.batch:
            raise InputError(f"The session has lanes 0 .. {self.batch - 1}; given {lane}.")
        return index

    def _replace_lane(self, lane: int, source: Mapping[str, Array]) -> None:
        whole = self.read_state()
        for state in self.spec.states:
            index = state.lane_index(lane)
            whole[state.name][index] = source[state.name][index]
        self._state = self._runtime.load_state(whole)

    def _put(self, arrays: Mapping[str, Array], tokens: Array | None) -> None:
        """Go on from a whole state, of lanes that have had so many tokens where these are counted."""
        self._state = self._runtime.load_state(arrays)
        if self._tokens is not None and tokens is not None:
            self._tokens.put(tokens)
        self._stand(np.array(arrays.get(OFFSET, np.zeros(self.batch)), np.int64))

    def _stand(self, offset: Array) -> None:
        """The lanes stand there in their chunks now."""
        self._offset = offset
        self._aligned = not offset.any()

    def _entry(self, name: str) -> _Call:
        return self._calls.get(name) or _Call(self.spec.entry(name))  # which raises where there is none

    def _look_for_non_finite(self, outputs: Arrays, counts: Array) -> None:
        """Raise `NonFiniteError` for what the last call answered or left, on the lanes that it had tokens for."""
        lanes = np.flatnonzero(counts).tolist()
        for name, value in outputs.items():
            _raise_non_finite(f"output {name}", {lane: value[lane, : counts[lane]] for lane in lanes})
        whole = self.read_state()
        for state in self.spec.states:
            values = {lane: whole[state.name][state.lane_index(lane)] for lane in lanes}
            _raise_non_finite(f"state {state.name}", values)

    def _commit_full(self) -> bool:
        """End the chunk of the lanes where it is full, and say whether there were any."""
        if self._aligned:
            return False
        full = self._offset == self.spec.chunk_size
        if not full.any():
            return False
        _, self._state = self._runtime.call("commit", {}, self._state)
        self._stand(np.where(full, 0, self._offset))
        return True

    def _check_at_beginning(self, counts: Array) -> None:
        """Raise `StreamError` if a lane that has tokens stands inside a chunk."""
        inside = (self._offset > 0) & (counts > 0)
        if np.any(inside):
            lanes = np.flatnonzero(inside).tolist()
            way_out = (
                "Use feed or run, which align any split, reset these lanes, or give them valid=0."
                if self.spec.has("decode")
                else "There is no entry decode here, so a partial chunk ends a stream: reset these lanes, or give them "
                "valid=0."
            )
            raise StreamError(
                f"The streams on lanes {lanes} stand inside a chunk of {self.spec.chunk_size} tokens (offsets "
                f"{self._offset.tolist()}), and step starts at a chunk's beginning. {way_out}"
            )

    def _stepped(self, left: Array) -> Array:
        """How many tokens each lane gives to the next call of `step`, from how many it has left."""
        entry = self.spec.entry("step")
        length, chunk = entry.inputs[0].shape[1], self.spec.chunk_size
        ready = np.where(self._offset == 0, np.minimum(left, length), 0)
        if entry.input(VALID) is None:
            return ready if np.all(ready == length) else np.zeros_like(ready)
        # A partial chunk is exact in `step` too; for a few tokens `decode` is cheaper.
        worth = not self.spec.has("decode") or ready * _DECODES_PER_STEP >= chunk
        return np.where(worth, ready, 0)

    def _feed_part(
        self,
        call: Callable[[Array, Array], Arrays],
        spec: TensorSpec,
        tokens: Array,
        start: Array,
        counts: Array,
        results: Arrays,
    ) -> None:
        """Give each lane's next `counts` tokens, from `start` on, to one call, and put away what it answers."""
        batch = np.zeros(spec.shape, spec.numpy_dtype)
        for lane in np.flatnonzero(counts):
            first, count = start[lane], counts[lane]
            batch[lane, :count] = tokens[lane, first : first + count]
        answers = call(batch, counts)
        for name, result in results.items():
            for lane in np.flatnonzero(counts):
                first, count = start[lane], counts[lane]
                result[lane, first : first + count] = answers[name][lane, :count] if name in answers else np.nan

    def _checked_shape(self, call: str, sequence: ArrayLike) -> Array:
        """A sequence [B, T, ...] of the shape that the model takes."""
        spec = self.spec.entry("step").inputs[0]
        wanted = ["T" if axis == 1 else str(size) for axis, size in enumerate(spec.shape)]
        tokens = as_array(f"{call} takes a sequence of shape [{', '.join(wanted)}]; what was given", sequence)
        if tokens.ndim != len(spec.shape) or tokens.shape[0] != self.batch or tokens.shape[2:] != spec.shape[2:]:
            raise InputError(f"{call} takes a sequence of shape [{', '.join(wanted)}]; given {list(tokens.shape)}.")
        if tokens.shape[1] == 0:
            raise InputError(f"{call} takes a sequence of at least one token; given none.")
        if (
            not self.spec.has("decode")
            and self.spec.entry("step").input(VALID) is None
            and (tokens.shape[1] % spec.shape[1])
        ):
            raise InputError(
                f"This model takes whole calls of {spec.shape[1]} tokens only; given {tokens.shape[1]} tokens. "
                f"Give a multiple of {spec.shape[1]}."
            )
        return tokens


class _Call:
    """What callers give to an entry, checked."""

    def __init__(self, entry: EntrySpec) -> None:
        self._entry = entry
        self._tokens = entry.inputs[0]
        self._counted = entry.input(VALID)
        # How many tokens count where all do; this very array says so.
        self.all = np.full(self._tokens.shape[0], self._tokens.shape[1])
        self.length = self._tokens.shape[1]
        self._dtype, self._shape = self._tokens.numpy_dtype, self._tokens.shape
        self._vectors = self._dtype.kind == "f"
        usual = self._tokens.dtype == "int64" and self._tokens.minimum == 0
        self._maximum = self._tokens.maximum if usual else None

    def checked(self, tokens: ArrayLike, valid: ArrayLike | None) -> tuple[dict[str, Array], Array]:
        """The inputs of a call as the entry takes them, and how many tokens count on each lane."""
        name = self._tokens.name
        fine: Array | None = tokens if self._fine(tokens) else None
        inputs = {name: checked_input(self._tokens, tokens) if fine is None else fine}
        counts = self.all
        if self._counted is not None:
            counts = counts if valid is None else checked_input(self._counted, valid)
            inputs[VALID] = counts
        elif valid is not None and not np.array_equal(given := as_array(VALID, valid), counts):
            raise InputError(
                f"The entry {self._entry.name} has no input valid: all {self._tokens.shape[1]} tokens of a call count "
                f"on every lane, valid={counts.tolist()}; given {given.tolist()}. Leave valid out, and give other "
                "numbers of tokens to feed or run."
            )
        if fine is None:
            inputs[name] = finite_tokens(self._tokens, inputs[name], counts)
        return inputs, counts

    def _fine(self, tokens: ArrayLike) -> TypeGuard[Array]:
        """Whether these are ids or vectors as the entry takes them: the usual case, in one pass."""
        if not (isinstance(tokens, np.ndarray) and tokens.dtype is self._dtype and tokens.shape == self._shape):
            return False
        if self._vectors:
            return all_finite((tokens,))
        if self._maximum is None:
            return False
        if tokens.size <= _FEW:
            ids: list[int] = tokens.ravel().tolist()
            return min(ids) >= 0 and max(ids) <= self._maximum
        # As an unsigned number, a negative one is too large.
        return int(np.maximum.reduce(tokens.view(_UINT64), axis=None)) <= self._maximum


def _raise_non_finite(what: str, values: Mapping[int, Array]) -> None:
    """Raise if one of the values, by lane, holds NaN or infinity."""
    bad = [lane for lane, value in values.items() if not np.isfinite(value).all()]
    if bad:
        raise NonFiniteError(
            f"The {what} holds NaN or infinite numbers on lanes {bad}. Reset them to go on; "
            "if it happens again, check the weights and the inputs."
        )
