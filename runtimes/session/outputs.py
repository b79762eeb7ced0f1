"""Outputs: the result of a session call that may skip lanes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nsm.spec import EntrySpec, TensorSpec
from nsm.trace import Array, Arrays


class Outputs(dict[str, Array]):
    """The outputs of a call by name, [B, T, ...].

    `skipped` are the lanes that `on_bad_lane="skip"` left out because of invalid tokens. Their outputs are NaN (0 for
    integer outputs), and their state is unchanged.
    """

    skipped: tuple[int, ...] = ()

    def skip(self, lanes: Sequence[int]) -> Outputs:
        """Mark lanes as skipped."""
        if lanes:
            self.skipped = tuple(lanes)
            for value in self.values():
                value[list(lanes)] = np.nan if value.dtype.kind == "f" else 0
        return self


def no_outputs(specs: Sequence[TensorSpec], length: int | None = None) -> Arrays:
    """Return zero outputs for these specs; `length` is T (default: that of the specs)."""
    shapes = {item.name: (item.shape[0], length or item.shape[1], *item.shape[2:]) for item in specs}
    return {item.name: np.zeros(shapes[item.name], item.numpy_dtype) for item in specs}


def all_skipped(entry: EntrySpec, lanes: Sequence[int]) -> Outputs:
    """Return the outputs of a call that is not made, because every lane with tokens is skipped."""
    return Outputs(no_outputs(entry.outputs)).skip(lanes)
