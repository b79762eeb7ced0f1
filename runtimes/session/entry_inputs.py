"""EntryInputs: check the arguments of one entry of a session."""

from __future__ import annotations

from typing import TypeGuard

import numpy as np
from numpy.typing import ArrayLike

from nsm.errors import InputError
from nsm.runtimes.base import all_finite
from nsm.runtimes.session.bad_lanes import OnBadLane, check_choice, usable_tokens
from nsm.runtimes.session.inputs import as_array, check_shape, checked_input
from nsm.spec import VALID, EntrySpec
from nsm.trace import Array

_UINT64 = np.dtype(np.uint64)

# Up to this many ids, a list is faster to check: after a backend call, numpy's reduction code is no longer cached.
_FEW = 256


class EntryInputs:
    """Checks the inputs of one entry.

    Args:
        entry: an entry with an input for tokens.
    """

    def __init__(self, entry: EntrySpec) -> None:
        self._entry = entry
        self._tokens = entry.inputs[0]
        self._counted = entry.input(VALID)
        # Counts of a call whose tokens are all valid. The code compares by identity with this array.
        self.all = np.full(self._tokens.shape[0], self._tokens.shape[1])
        self._dtype, self._shape = self._tokens.numpy_dtype, self._tokens.shape
        self._vectors = self._dtype.kind == "f"
        usual = self._tokens.dtype == "int64" and self._tokens.minimum == 0
        self._maximum = self._tokens.maximum if usual else None

    def checked(
        self, tokens: ArrayLike, valid: ArrayLike | None, on_bad_lane: OnBadLane
    ) -> tuple[dict[str, Array], Array, tuple[int, ...]]:
        """Check the inputs of a call; see `Session.step` for the errors.

        Returns:
            The inputs of the entry by name; [B], the number of valid tokens of each lane; the skipped lanes.
        """
        if on_bad_lane != "raise":
            check_choice(on_bad_lane, self._shape[0], self._counted is not None)
        fine: Array | None = tokens if self._fine(tokens) else None
        if fine is None:
            array = as_array(self._tokens.name, tokens)
            check_shape(self._tokens, array)
        counts = self.all
        if self._counted is not None:
            counts = counts if valid is None else checked_input(self._counted, valid)
        elif valid is not None and not np.array_equal(given := as_array(VALID, valid), counts):
            raise InputError(
                f"The entry {self._entry.name} has no input valid: all {self._tokens.shape[1]} tokens of a call are "
                f"valid on every lane, valid={counts.tolist()}; given {given.tolist()}. Omit valid, and use feed or "
                "run for other numbers of tokens."
            )
        skipped: tuple[int, ...] = ()
        if fine is None:
            fine, counts, skipped = usable_tokens(self._tokens, array, counts, on_bad_lane)
        inputs = {self._tokens.name: fine}
        if self._counted is not None:
            inputs[VALID] = counts
        return inputs, counts, skipped

    def _fine(self, tokens: ArrayLike) -> TypeGuard[Array]:
        """Return whether the tokens need no conversion, the usual case, in one pass."""
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
