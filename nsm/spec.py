"""Inputs, outputs and states of a step model as data, shared by models, exporters and runtimes.

    step(inputs, state) -> (outputs, state')

State is an argument and a result. A model declares it as a list of `StateSpec`; an exported graph has one input
and one output for each of them. All shapes are static and include the batch ("lanes") on `batch_axis`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nsm.decode import decode
from nsm.errors import ConfigError, InputError
from nsm.files import LIMITS

Init = Literal["zeros", "learned"]

VALID = "valid"
"""Name of the input that says how many of a call's tokens count on each lane, [B] int64."""

OFFSET = "lane.offset"
"""Name of the state that holds, per lane, how many tokens the open chunk has; [B] int64."""

FILLED = "lane.filled"
"""Name of the state that holds, per lane, how many rows are there in the windows of a model; [B] int64."""

CHUNK = "lane.chunk"
"""Name of the state that counts the chunks of each lane, modulo the common cycle of the model's periods; [B] int64."""

COUNT = "lane.count"
"""Name of the state that holds, per lane, how many tokens the stream has had; [B] int64. Rings are counted by it."""

LARGEST = LIMITS["tensor"]
"""Most bytes of an input or output of a call; runtimes allocate them before the graph runs."""

# Valid names of entries. Files are named after them (`step.onnx`), and a foreign bundle may contain any string.
_ENTRY_NAME = re.compile(r"[A-Za-z0-9_]{1,64}")

# States whose role is one of these are a window of keys and values and take the names other tools know.
_WINDOW_ROLES = ("key", "value")


@dataclass(frozen=True)
class TensorSpec:
    """A named input or output.

    `time_axis` is the axis that runs over the tokens of a call, None where there is none (`valid`).
    `minimum` and `maximum` (both inclusive) bound integer inputs, so that a token id the model has no embedding
    for is refused before it reaches a backend that would read outside its table.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    time_axis: int | None = None
    minimum: int | None = None
    maximum: int | None = None

    def __post_init__(self) -> None:
        _check(self.name, self.shape, self.dtype)
        if self.minimum is None and self.maximum is None:
            return
        whole = self.numpy_dtype.kind in "iu"
        if self.minimum is None or self.maximum is None or self.minimum > self.maximum or not whole:
            raise ConfigError(
                f"{self.name} of {self.dtype} has the bounds {self.minimum} .. {self.maximum}; integers have both, the "
                "smaller one first, or none, and other numbers none."
            )

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype)


@dataclass(frozen=True)
class StateSpec:
    """One tensor of state.

    Args:
        name: `{layer}.{role}`, for instance `0.bank`.
        shape: static shape, lanes included.
        dtype: numpy name of the element type.
        batch_axis: the axis of the lanes.
        init: "zeros", or "learned" where the initial value is part of the model. Both are stored in a bundle.
        past, present: names of the graph's input and output; derived from `name` unless given. Sorted inputs
            pair with sorted outputs.
        append_axis: where set, the graph's output holds only the new rows, along this axis; whoever runs the graph
            writes them into the buffer in place, as a ring: row t of a call at (`lane.count` + t) modulo the size of
            the axis. So a large cache is never copied.
        per_token: where set, every number of the state grows by so much with each token of its lane, without end; a
            session that is given a state reads from it how many tokens a lane has had.
        wrap: where set, (base, period) of a counter that the graph keeps below base + period: it gives the same
            outputs for a value v from there on and for base + (v - base) % period.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    batch_axis: int = 0
    init: Init = "zeros"
    past: str = ""
    present: str = ""
    append_axis: int | None = None
    per_token: int | None = None
    wrap: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check(self.name, self.shape, self.dtype)
        if self.per_token is not None and (self.per_token < 1 or self.numpy_dtype.kind not in "iu"):
            raise ConfigError(
                f"{self.name} of {self.dtype} grows by {self.per_token} with each token; expected an integer state "
                "and a growth of at least 1, or none."
            )
        if self.wrap and (len(self.wrap) != 2 or self.numpy_dtype.kind not in "iu" or not self._fits(*self.wrap)):
            raise ConfigError(
                f"{self.name} of {self.dtype} is wrapped by {list(self.wrap)}; expected an integer state, and a "
                "base of at least 0 and a period of at least 1 that it holds together."
            )
        if 0 in self.shape:
            raise ConfigError(f"The state {self.name} of shape {list(self.shape)} holds nothing. Leave it out.")
        if not self.name.strip("."):
            raise ConfigError(f"A state is called {self.name!r}; expected a name that a file could have.")
        if self.shape and not 0 <= self.batch_axis < len(self.shape):
            raise ConfigError(f"{self.name} of shape {list(self.shape)} has no axis {self.batch_axis} for the lanes.")
        if self.append_axis is not None and not 0 <= self.append_axis < len(self.shape):
            raise ConfigError(f"{self.name} of shape {list(self.shape)} has no axis {self.append_axis} to append on.")
        window = self.name.rsplit(".", 1)[-1] in _WINDOW_ROLES
        if not self.past:
            object.__setattr__(self, "past", ("past_key_values." if window else "past_state.") + self.name)
        if not self.present:
            object.__setattr__(self, "present", ("present." if window else "present_state.") + self.name)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.numpy_dtype.itemsize

    def _fits(self, base: int, period: int) -> bool:
        return base >= 0 and period >= 1 and base + period <= np.iinfo(self.numpy_dtype).max

    def wrapped(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of the state as its graph would keep them."""
        if not self.wrap:
            return values
        base, period = self.wrap
        return np.where(values >= base + period, base + (values - base) % period, values)

    def present_shape(self, tokens: int) -> tuple[int, ...]:
        """Shape of the graph's output for this state, in a call of so many tokens."""
        if self.append_axis is None:
            return self.shape
        return (*self.shape[: self.append_axis], tokens, *self.shape[self.append_axis + 1 :])

    def lane_index(self, lane: int) -> tuple[slice | int, ...]:
        """Index of one lane's part, which keeps the batch axis out of the result."""
        return (slice(None),) * self.batch_axis + (lane,)


@dataclass(frozen=True)
class EntrySpec:
    """One exported graph: its inputs and outputs, and the names of the states that it reads and writes.

    A state that an entry does not write stays as it is; one that it writes it also reads or replaces as a whole. The
    name is one of letters, digits and underscores, as that of the entry's files.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not _ENTRY_NAME.fullmatch(self.name):
            raise ConfigError(
                f"An entry is called {self.name[:80]!r}; expected at most 64 letters, digits and underscores, as "
                "files are named after it."
            )
        if not self.inputs and not self.reads:
            raise ConfigError(f"The entry {self.name} has no inputs.")
        _check_unique(f"inputs and outputs of the entry {self.name}", (i.name for i in (*self.inputs, *self.outputs)))

    @property
    def tokens(self) -> int:
        """K, the tokens of a call; 0 where it takes none."""
        return self.inputs[0].shape[1] if self.inputs else 0

    def input(self, name: str) -> TensorSpec | None:
        """The input of that name, None if there is none."""
        return next((spec for spec in self.inputs if spec.name == name), None)


@dataclass(frozen=True)
class StepSpec:
    """A step model: its entries (graphs over one set of weights) and the states they all share.

    `chunk_size` is C, the commit period in tokens: token i after a reset belongs to chunk i // C.
    `batch` is the number of lanes, B.
    `capacity` is how many tokens a lane takes from one reset to the next, None where there is no end: the size of a
    table that is written at a position, for instance. A session raises `StreamError` before it is passed.

    Entries that take tokens take them as their first input, [B, K, ...], and give outputs [B, K, ...]: `step` whole
    chunks, `decode` one. Its inputs and outputs are those of `step`, with another K, or some of them.
    """

    entries: tuple[EntrySpec, ...]
    states: tuple[StateSpec, ...]
    chunk_size: int
    batch: int
    capacity: int | None = None

    def __post_init__(self) -> None:
        if not self.entries or self.chunk_size < 1 or self.batch < 1:
            raise ConfigError(
                "A step model has at least one entry, one token a chunk and one lane; given "
                f"{len(self.entries)}, {self.chunk_size}, {self.batch}."
            )
        for entry in self.entries:
            unknown = sorted({*entry.reads, *entry.writes} - set(self.state_names))
            if unknown:
                raise ConfigError(f"The entry {entry.name} refers to undefined states: {unknown}.")
        _check_unique("entries", (entry.name for entry in self.entries))
        self._check_states()
        if not self.has("step") or not self.entry("step").inputs:
            given = ", ".join(entry.name for entry in self.entries)
            raise ConfigError(f"A step model has an entry step that takes tokens; given the entries {given}.")
        for entry in self.entries:
            self._check_entry(entry)
        self._check_chunks()
        length = self.entry("step").tokens
        if self.capacity is not None and self.capacity < length:
            raise ConfigError(
                f"The capacity is {self.capacity} tokens, and a call of step takes {length}; expected room for one "
                "call at least. Give a larger capacity, or fewer tokens a call."
            )

    def _check_states(self) -> None:
        _check_unique("states", self.state_names)
        _check_unique("inputs of states", (state.past for state in self.states))
        _check_unique("outputs of states", (state.present for state in self.states))
        for state in self.states:
            if not state.shape or state.shape[state.batch_axis] != self.batch:
                raise ConfigError(
                    f"{state.name} has the shape {list(state.shape)}; expected the size {self.batch}, the lanes, on "
                    f"axis {state.batch_axis}."
                )
            if state.name in (OFFSET, COUNT) and (state.shape, state.dtype) != ((self.batch,), "int64"):
                raise ConfigError(
                    f"{state.name} is {list(state.shape)} of {state.dtype}; expected a count for each lane, "
                    f"[{self.batch}] of int64."
                )
            if state.append_axis is not None and COUNT not in self.state_names:
                raise ConfigError(f"{state.name} is appended to where the state {COUNT} says, and there is none.")

    def _check_entry(self, entry: EntrySpec) -> None:
        """Raise `ConfigError` for tensors that are not of the lanes and tokens of a call, or not those of `step`."""
        main = self.entry("step").inputs[0]
        if entry.inputs:
            tokens = entry.inputs[0]
            if (
                len(tokens.shape) < 2
                or tokens.shape[0] != self.batch
                or (*tokens.shape[2:], tokens.dtype) != (*main.shape[2:], main.dtype)
            ):
                raise ConfigError(
                    f"{tokens.name} of {entry.name} is {list(tokens.shape)} of {tokens.dtype}; expected "
                    f"[{', '.join(map(str, (self.batch, 'K', *main.shape[2:])))}] of {main.dtype}."
                )
            if tokens.numpy_dtype.kind in "iu" and tokens.maximum is None:
                raise ConfigError(
                    f"{tokens.name} of {entry.name} holds ids without bounds; expected a minimum and a maximum, as "
                    "a backend may read outside its table for an id that is not in it."
                )
            if entry.tokens < 1 or {"step": entry.tokens % self.chunk_size, "decode": entry.tokens - 1}.get(entry.name):
                raise ConfigError(
                    f"{entry.name} takes {entry.tokens} tokens; expected one for decode, and for step a multiple of "
                    f"the chunk of {self.chunk_size}."
                )
        counts = entry.input(VALID)
        if counts is not None and counts.shape != (self.batch,):
            raise ConfigError(
                f"{VALID} of {entry.name} has the shape {list(counts.shape)}; expected [{self.batch}], a number for "
                "each lane."
            )
        known = {item.name: (*item.shape[2:], item.dtype) for item in self.entry("step").outputs}
        for item in entry.outputs:
            if item.shape[:2] != (self.batch, entry.tokens) or known.get(item.name) != (*item.shape[2:], item.dtype):
                raise ConfigError(
                    f"The output {item.name} of {entry.name} is {list(item.shape)} of {item.dtype}; expected one of "
                    f"step's, for {self.batch} lanes and {entry.tokens} tokens: [{self.batch}, {entry.tokens}, ...]."
                )
        rings = [state for state in self.states_of(entry.writes) if state.append_axis is not None]
        rows = [(state.name, state.present_shape(entry.tokens), state.numpy_dtype) for state in rings]
        given = [(item.name, item.shape, item.numpy_dtype) for item in (*entry.inputs, *entry.outputs)]
        for name, shape, dtype in (*given, *rows):
            if math.prod(shape) * dtype.itemsize > LARGEST:
                raise ConfigError(
                    f"{name} of {entry.name} is {list(shape)} of {dtype}; a call takes and gives at most {LARGEST:,} "
                    "bytes of each. Ask for fewer tokens a call, or fewer lanes."
                )

    def _check_chunks(self) -> None:
        """Raise `ConfigError` where chunks could be filled token by token and not ended."""
        if self.has("commit") and self.entry("commit").inputs:
            raise ConfigError("The entry commit takes inputs; expected states alone.")
        if OFFSET not in self.state_names or not self.has("decode"):
            return
        for name in ("decode", "commit"):
            if not self.has(name) or OFFSET not in self.entry(name).writes:
                given = "one that does not" if self.has(name) else "none"
                raise ConfigError(
                    f"The model has the state {OFFSET} and the entry decode; expected an entry {name} that writes "
                    f"{OFFSET}, given {given}."
                )

    def has(self, name: str) -> bool:
        """Whether there is an entry of that name."""
        return any(entry.name == name for entry in self.entries)

    def states_of(self, names: tuple[str, ...]) -> tuple[StateSpec, ...]:
        """The states of these names, in the order of `states`."""
        return tuple(state for state in self.states if state.name in names)

    def entry(self, name: str) -> EntrySpec:
        """The entry of that name.

        Raises:
            InputError: there is none; the message lists those there are.
        """
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise InputError(f"There is no entry {name!r}. Entries: {', '.join(item.name for item in self.entries)}.")

    @property
    def state_names(self) -> tuple[str, ...]:
        return tuple(state.name for state in self.states)

    @property
    def state_nbytes(self) -> int:
        """Bytes of carried state, all lanes."""
        return sum(state.nbytes for state in self.states)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StepSpec:
        """Inverse of `to_json`.

        Raises:
            BundleError: a key is missing or unknown, a value has the wrong type or is invalid.
        """
        return decode(cls, data, "spec")


def _check(what: str, shape: tuple[int, ...], dtype: str) -> None:
    if any(size < 0 for size in shape):
        raise ConfigError(f"{what} has the shape {list(shape)}; sizes are 0 or more.")
    try:
        found = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError) as error:
        raise ConfigError(f"{what} has the dtype {dtype!r}, which numpy does not know.") from error
    if found.kind not in "biufc":
        raise ConfigError(f"{what} has the dtype {dtype!r}; expected one of numbers, float32 for instance.")


def _check_unique(what: str, names: Iterable[str]) -> None:
    found = list(names)
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise ConfigError(f"There are two {what} called {', '.join(twice)}; each has a name of its own.")
