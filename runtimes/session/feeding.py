"""Feeding: split sequences of any length, one per lane, into calls of `step` and `decode`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from nsm.errors import InputError
from nsm.runtimes.session.inputs import as_array
from nsm.runtimes.session.outputs import no_outputs
from nsm.spec import VALID, StepSpec
from nsm.trace import Array, Arrays

# A call of `step` takes about as long as `decode` takes for this share of a chunk: 1 / 4.
_DECODES_PER_STEP = 4


class Feeding:
    """The remaining tokens to feed, and the outputs so far.

    Args:
        spec: spec of the model.
        tokens: [B, T, ...], checked.
        counts: [B], number of valid tokens of each lane.
    """

    def __init__(self, spec: StepSpec, tokens: Array, counts: Array) -> None:
        self.results = no_outputs(spec.entry("step").outputs, tokens.shape[1])
        self._spec, self._tokens, self._counts = spec, tokens, counts
        self._done = np.zeros(spec.batch, np.int64)

    def finish(
        self,
        step: Callable[[Array, Array], Arrays],
        decode: Callable[[Array, Array], Arrays],
        offsets: Callable[[], Array],
    ) -> Arrays:
        """Feed the remaining tokens: `step` while lanes have whole chunks, `decode` otherwise.

        Args:
            step, decode: methods of a session: (tokens, [B] number of valid ones) -> outputs.
            offsets: returns the offset of each lane within its chunk, [B].
        """
        while self.left.any():
            stepped = self.stepped(offsets())
            if stepped.any():
                self.put(step(self.take("step", stepped), stepped), stepped)
            decoded = ((self.left > 0) & (stepped == 0)).astype(np.int64)
            if self._spec.has("decode") and decoded.any():
                self.put(decode(self.take("decode", decoded), decoded), decoded)
        return self.results

    @property
    def left(self) -> Array:
        """[B], the number of tokens that remain on each lane."""
        left: Array = self._counts - self._done
        return left

    def stepped(self, offsets: Array) -> Array:
        """[B], the number of tokens of each lane in the next call of `step`, given the lanes' offsets."""
        entry = self._spec.entry("step")
        length, chunk = entry.inputs[0].shape[1], self._spec.chunk_size
        ready = np.where(offsets == 0, np.minimum(self.left, length), 0)
        if entry.input(VALID) is None:
            return ready if np.all(ready == length) else np.zeros_like(ready)
        # A partial chunk is exact in `step` too; for a few tokens `decode` is cheaper.
        worth = not self._spec.has("decode") or ready * _DECODES_PER_STEP >= chunk
        return np.where(worth, ready, 0)

    def take(self, entry: str, counts: Array) -> Array:
        """Return the next `counts` [B] tokens of the lanes, padded for a call of an entry."""
        spec = self._spec.entry(entry).inputs[0]
        batch = np.zeros(spec.shape, spec.numpy_dtype)
        for lane in np.flatnonzero(counts):
            first, count = self._done[lane], counts[lane]
            batch[lane, :count] = self._tokens[lane, first : first + count]
        return batch

    def put(self, outputs: Arrays, counts: Array) -> None:
        """Store the outputs of the last call."""
        for name, result in self.results.items():
            for lane in np.flatnonzero(counts):
                first, count = self._done[lane], counts[lane]
                result[lane, first : first + count] = outputs[name][lane, :count] if name in outputs else np.nan
        self._done = self._done + counts


def checked_sequence(spec: StepSpec, call: str, sequence: ArrayLike) -> Array:
    """Check the shape of a sequence [B, T, ...].

    Args:
        spec: spec of the model.
        call: name of the calling method, for the message.
        sequence: the argument of the caller.

    Raises:
        InputError: wrong shape, no token, or a partial call for a model without `decode`.
    """
    entry = spec.entry("step")
    item = entry.inputs[0]
    wanted = ["T" if axis == 1 else str(size) for axis, size in enumerate(item.shape)]
    tokens = as_array(f"{call} takes a sequence of shape [{', '.join(wanted)}]; the argument", sequence)
    if tokens.ndim != len(item.shape) or tokens.shape[0] != spec.batch or tokens.shape[2:] != item.shape[2:]:
        raise InputError(f"{call} takes a sequence of shape [{', '.join(wanted)}]; given {list(tokens.shape)}.")
    if tokens.shape[1] == 0:
        raise InputError(f"{call} takes a sequence of at least one token; given none.")
    if not spec.has("decode") and entry.input(VALID) is None and tokens.shape[1] % item.shape[1]:
        raise InputError(
            f"This model takes only whole calls of {item.shape[1]} tokens; given {tokens.shape[1]} tokens. "
            f"Give a multiple of {item.shape[1]}."
        )
    return tokens


def checked_lanes(spec: StepSpec, counts: Array, length: int) -> None:
    """Raise `InputError` if lanes have different numbers of tokens and the model takes only whole calls.

    Args:
        spec: spec of a model without `decode`.
        counts: [B], number of tokens of each lane.
        length: T of the sequence.
    """
    if spec.entry("step").input(VALID) is None and np.any(counts != length):
        raise InputError(
            f"This model takes only whole calls on all lanes; given {counts.tolist()} tokens on its "
            "lanes. Give every lane the same number of tokens."
        )
