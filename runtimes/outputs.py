"""Outputs: what a call of a session returns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from nsm.spec import TensorSpec
from nsm.trace import Array


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


def no_outputs(specs: Iterable[TensorSpec], length: int | None = None) -> Outputs:
    """Zeros for outputs of these specs; `length` is T, by default that of the specs."""
    return Outputs(
        {
            item.name: np.zeros((item.shape[0], item.shape[1] if length is None else length, *item.shape[2:]), item.numpy_dtype)
            for item in specs
        }
    )
