"""The data of the pictures as plain arrays: routing of the tokens of one stream, and states of the slots.

Letters: n tokens recorded, R bank heads, S slots, S1 those that tokens write to (all, or those of the fastest time
scale), m times at which the committed bank was recorded, D numbers per slot.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsm.errors import InputError

Array = NDArray[Any]


@dataclass(frozen=True)
class LayerRecording:
    """One layer that routes.

    Args:
        layer: its number in the model.
        routing: [n, R, S1], how each token chose slots; sums to 1 over them.
        routable: [n, S1] bool, the slots that were active when the token was routed.
        states: [m, S, D], the committed slots.
        change: [m, S], Euclidean distance of each slot to its value one call earlier; NaN if unknown.
        mask: [m, S] bool, the active slots.
        importance: [m, S] in (0, 1), None where it was not recorded.
        threshold: importance below which a slot is pruned, None where it is not known.
    """

    layer: int
    routing: Array
    routable: Array
    states: Array
    change: Array
    mask: Array
    importance: Array | None = None
    threshold: float | None = None

    @property
    def heads(self) -> int:
        return int(self.routing.shape[1])

    @property
    def entropy(self) -> Array:
        """How undecided each token was: -sum_s w log2 w in bits, [n, R]. 0 is one slot, log2 k is k slots alike."""
        logs = np.log2(self.routing, out=np.zeros(self.routing.shape), where=self.routing > 0)
        # -0.0 would be drawn, and printed, with its sign.
        return np.asarray(np.abs((self.routing * logs).sum(-1)))

    @property
    def norm(self) -> Array:
        """Euclidean norm of each slot's D numbers, [m, S]."""
        return np.asarray(np.linalg.norm(self.states, axis=-1))

    @property
    def adapts(self) -> bool:
        """Whether the mask changed."""
        return bool((self.mask != self.mask[:1]).any())


@dataclass(frozen=True)
class Recording:
    """One stream through all layers that route.

    Args:
        layers: at least one.
        positions: [n], the token's number in the stream, from 0, ascending.
        seen: [m], how many tokens the stream had had when the bank was as recorded, ascending.
        length: T, tokens of the whole stream.
        step: tokens from one recorded commit to the next.
    """

    layers: tuple[LayerRecording, ...]
    positions: Array
    seen: Array
    length: int
    step: int

    def between(self, first: int, last: int) -> Recording:
        """The part from token `first` up to, not including, token `last`.

        Raises:
            InputError: nothing was recorded there.
        """
        tokens = (self.positions >= first) & (self.positions < last)
        times = (self.seen >= first) & (self.seen <= last)
        if not tokens.any() or not times.any():
            raise InputError(
                f"Nothing was recorded between tokens {first} and {last}; the stream has {self.length} tokens, "
                f"recorded are {int(self.positions[0])} .. {int(self.positions[-1])}."
            )
        layers = tuple(
            replace(
                layer,
                routing=layer.routing[tokens],
                routable=layer.routable[tokens],
                states=layer.states[times],
                change=layer.change[times],
                mask=layer.mask[times],
                importance=None if layer.importance is None else layer.importance[times],
            )
            for layer in self.layers
        )
        return replace(self, layers=layers, positions=self.positions[tokens], seen=self.seen[times])

    def time_of(self, position: int) -> int:
        """Index into `seen` of the last record made before token `position` came, or of the first there is."""
        return max(0, int(np.searchsorted(self.seen, position, "right")) - 1)


def bank_states(bank: Array) -> Array:
    """Bank [..., G, S, f] -> states [..., S, D], as `nsm.modules.ops.layout.to_states` does."""
    moved = np.moveaxis(bank, -2, -3)
    return moved.reshape(*moved.shape[:-2], -1)
