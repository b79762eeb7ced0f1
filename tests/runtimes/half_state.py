"""A real runtime whose states are worth less than they look."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nsm.runtimes.base import Runtime, State
from nsm.trace import Array, Arrays


class HalfState:
    """A real runtime whose banks are rounded to half precision after every call."""

    def __init__(self, inner: Runtime, names: tuple[str, ...]) -> None:
        self.effective_precision = inner.effective_precision
        self.load_state, self.read_state, self.close = inner.load_state, inner.read_state, inner.close
        self.finite = inner.finite
        self._inner, self._names = inner, names

    def call(self, entry: str, inputs: Mapping[str, Array], state: State) -> tuple[Arrays, State]:
        outputs, state = self._inner.call(entry, inputs, state)
        arrays = self._inner.read_state(state)
        rounded = {name: arrays[name].astype(np.float16).astype(np.float32) for name in self._names}
        return outputs, self._inner.load_state({**arrays, **rounded})
