"""Subject: a step under examination, its streams, and the results so far."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from nsm.adapters.validate.step import Results, Step
from nsm.errors import InputError
from nsm.results import Message
from nsm.spec import TensorSpec
from nsm.trace import Array, Arrays

TOLERANCE = 1e-4
"""Largest difference, relative to the largest number of a tensor, that is rounding in float32."""

LARGE, FEW = 8_000_000, 4
"""A step with weights of more numbers is examined in fewer calls of fewer tokens, so that it takes seconds."""

_BLOCK = 64


@dataclass(frozen=True)
class Skipped:
    """An experiment that had nothing to show, and why."""

    reason: str


@dataclass
class Subject:
    """A step under examination, and the results so far.

    Args:
        step: under examination.
        samples: real sequences of the main input, [T, *token] each, or none: then tokens are made up.
        positive: whether made-up numbers are positive.
        shapes: of each output, one lane and one token; the experiment `shapes` fills it in.
        trace: of the first stream, from the experiment `fill`.
        lanes, why: how many streams side by side, None for any number; the experiment `lanes` decides.
        reach: tokens of a stream that the step takes, None for any number; `fill` finds where it fails.
        lent: values that the step writes before it reads them.
        messages: messages for the user.
    """

    step: Step
    samples: Sequence[Array] = ()
    positive: bool = False
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    trace: Trace | None = None
    lanes: int | None = None
    why: str = ""
    reach: int | None = None
    lent: list[str] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    kept: Mapping[str, str] = field(default_factory=dict)

    @property
    def chunk(self) -> int:
        """Tokens of a call that takes several."""
        return min(self.step.chunk, FEW) if self.large else self.step.chunk

    def fits(self, token: int, count: int) -> bool:
        """Whether so many tokens more are within the reach of a stream."""
        return self.reach is None or token + count <= self.reach

    def within(self, count: int) -> int:
        """As many tokens as that from the beginning of a stream, or as the step takes."""
        return count if self.reach is None else min(count, self.reach)

    @property
    def large(self) -> bool:
        return self.step.size > LARGE

    def tokens(self, stream: int, start: int, count: int) -> Arrays:
        """Tokens `start` .. `start + count` of a stream, [1, count, *token] by input."""
        return {
            spec.name: self._tokens(index, spec, stream, start, count) for index, spec in enumerate(self.step.inputs)
        }

    def _tokens(self, place: int, spec: TensorSpec, stream: int, start: int, count: int) -> Array:
        if self.samples and place == 0:
            joined = np.concatenate(self.samples)
            first = _first_change(joined)
            # Streams begin a third of the samples apart.
            where = first + stream * max(1, len(joined) // 3) + np.arange(start, start + count)
            return joined[where % len(joined)][None]
        blocks = range(start // _BLOCK, (start + count - 1) // _BLOCK + 1)
        made = np.concatenate([self._block(place, spec, stream, block) for block in blocks])
        first = start - blocks[0] * _BLOCK
        return made[None, first : first + count]

    def _block(self, place: int, spec: TensorSpec, stream: int, block: int) -> Array:
        random = np.random.default_rng((place, stream, block))
        shape = (_BLOCK, *spec.shape)
        if spec.maximum is not None:
            return random.integers(spec.minimum or 0, spec.maximum + 1, shape).astype(spec.numpy_dtype)
        made = random.standard_normal(shape).astype(spec.numpy_dtype)
        return np.abs(made) + spec.numpy_dtype.type(0.1) if self.positive else made

    def start(self) -> Arrays:
        """The initial state of one stream."""
        return lane_of(self.step.initial(self.step.lanes or 1), 0)

    def alone(self, inputs: Arrays, state: Arrays) -> Results:
        """One call over one stream, [1, ...]. Where the step takes several only, all are this one."""
        count = self.step.lanes or 1
        if count == 1:
            return self.step(inputs, state)
        outputs, after = self.step(tiled(inputs, count), tiled(state, count))
        return lane_of(outputs, 0), lane_of(after, 0)

    def run(self, stream: int, start: int, sizes: Iterable[int], state: Arrays) -> Iterator[Results]:
        """A stream from its token `start` on, in calls of these sizes."""
        for size in sizes:
            outputs, state = self.alone(self.tokens(stream, start, size), state)
            start += size
            yield outputs, state

    def over(self, stream: int, start: int, sizes: Iterable[int], state: Arrays) -> Results:
        """Like `run`: outputs of all calls, and the state after them."""
        parts = list(self.run(stream, start, sizes, state))
        joined = {name: np.concatenate([part[0][name] for part in parts], 1) for name in parts[0][0]}
        return joined, parts[-1][1]


@dataclass(frozen=True)
class Trace:
    """A run of stream 0 from its initial state.

    Args:
        sizes: tokens of each of the first calls.
        outputs: of these calls.
        states: after some of them, by number of the call.
        early, late: states after 3 calls, and when nothing fills any more; with the token that comes next.
        filled: tokens after which no element of a state changed for the first time.
        further: tokens that a stream is known to take.
    """

    sizes: tuple[int, ...]
    outputs: tuple[Arrays, ...]
    states: Mapping[int, Arrays]
    early: tuple[Arrays, int]
    late: tuple[Arrays, int]
    filled: int
    further: int


def _first_change(stream: Array) -> int:
    """Where two tokens that follow each other differ.

    Raises:
        InputError: nowhere.
    """
    start = next(
        (index for index in range(len(stream) - 1) if not np.array_equal(stream[index], stream[index + 1])), None
    )
    if start is None:
        raise InputError(
            f"The samples hold the same token {len(stream)} times, which shows neither lengths nor lanes that are "
            "confused. Give some that differ."
        )
    return start


def lane_of(values: Arrays, lane: int) -> Arrays:
    """One lane, [1, ...] by name."""
    return {name: value[lane : lane + 1] for name, value in values.items()}


def tiled(values: Arrays, count: int) -> Arrays:
    """One lane so many times."""
    return {name: np.repeat(value, count, 0) for name, value in values.items()}


def joined(lanes: Sequence[Arrays]) -> Arrays:
    """Lanes [1, ...] side by side."""
    return {name: np.concatenate([lane[name] for lane in lanes]) for name in lanes[0]}


def close(one: Array, other: Array, tolerance: float = TOLERANCE) -> bool:
    """Whether two arrays differ by rounding at most; False where one is not a number."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype.kind != "f":
        return np.array_equal(one, other)
    scale = max(float(np.abs(other).max(initial=0)), 1e-3)
    return bool(np.abs(one - other).max(initial=0) <= tolerance * scale)


def difference(one: Results, other: Results) -> str:
    """The first output or state that differs by more than rounding; nothing where none does."""
    for what, left, right in zip(("output", "state"), one, other, strict=True):
        for name, value in left.items():
            if not close(value, right[name]):
                return f"{what} {name}"
    return ""


def shown(names: Sequence[str]) -> str:
    """A few names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{list(names[:4])}{more}"
