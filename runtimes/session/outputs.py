"""Outputs: the result of a call of a session that may skip lanes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nsm.spec import EntrySpec, TensorSpec
from nsm.trace import Array, Arrays


class Outputs(dict[str, Array]):
    """The outputs of a call by name, [B, T, ...].

    `skipped` are the lanes that `on_bad_lane="skip"` left out because the model does not take their tokens. Their
    outputs are NaN, those of whole numbers 0, and their state is as before.
    """

    skipped: tuple[int, ...] = ()

    def skip(self, lanes: Sequence[int]) -> Outputs:
        """Mark lanes as left out."""
        if lanes:
            self.skipped = tuple(lanes)
            for value in self.values():
                value[list(lanes)] = np.nan if value.dtype.kind == "f" else 0
        return self


def no_outputs(specs: Sequence[TensorSpec], length: int | None = None) -> Arrays:
    """Zeros for outputs of these specs; `length` is T, by default that of the specs."""
    shapes = {item.name: (item.shape[0], length or item.shape[1], *item.shape[2:]) for item in specs}
    return {item.name: np.zeros(shapes[item.name], item.numpy_dtype) for item in specs}


def all_skipped(entry: EntrySpec, lanes: Sequence[int]) -> Outputs:
    """The outputs of a call that was not made, because these lanes are the only ones with tokens."""
    return Outputs(no_outputs(entry.outputs)).skip(lanes)
