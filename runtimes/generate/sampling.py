"""Choosing the next token from logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from nsm.errors import InputError
from nsm.runtimes.session import as_array
from nsm.trace import Array


class Sampler:
    """Draws ids from logits.

    Args:
        temperature: logits are divided by it; 0 always takes the most likely token.
        top_k: only the k most likely tokens are drawn from, None for all.
        top_p: only the most likely tokens that together have at least this probability are drawn from
            (Holtzman et al. 2020), 1 for all.
        seed: seed of the generator; the same seed and logits give the same tokens.

    Raises:
        InputError: a number outside its range.
    """

    def __init__(
        self, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0, seed: int | None = None
    ) -> None:
        if not temperature >= 0.0 or not np.isfinite(temperature):
            raise InputError(f"The temperature is 0 or more; given {temperature}.")
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k is at least 1; given {top_k}.")
        if not 0.0 < top_p <= 1.0:
            raise InputError(f"top_p is a probability above 0, at most 1; given {top_p}.")
        if seed is not None and seed < 0:
            raise InputError(f"The seed is 0 or more; given {seed}.")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self._generator = np.random.default_rng(seed)

    def probabilities(self, logits: Array) -> Array:
        """Return the probability of each token, [V], from logits [V]; it is 0 for -inf.

        Raises:
            InputError: the shape is not [V], or the logits contain NaN or +inf, or only -inf.
        """
        logits = _checked(logits)
        if self.temperature == 0.0:
            chosen: Array = (np.arange(len(logits)) == logits.argmax()).astype(np.float64)
            return chosen
        order = np.argsort(-logits, kind="stable")
        below = logits[order].astype(np.float64) - float(logits[order[0]])
        with np.errstate(over="ignore"):  # a small temperature turns them into -inf, with weight 0
            weights = np.exp(below / self.temperature)
        weights /= weights.sum()
        # Rounded sums reach 1 before the last tokens do.
        kept = (np.cumsum(weights) - weights < self.top_p) | (self.top_p == 1.0)
        if self.top_k is not None:
            kept[self.top_k :] = False
        result = np.zeros(len(logits))
        result[order] = np.where(kept, weights, 0.0)
        result /= result.sum()
        return result

    def __call__(self, logits: Array) -> int:
        """Draw an id from logits [V]; see `probabilities` for invalid logits."""
        shares = self.probabilities(logits)
        return int(self._generator.choice(len(shares), p=shares))


def _checked(logits: ArrayLike) -> Array:
    array = as_array("logits", logits)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "fiu":
        raise InputError(
            f"A sampler takes the logits of one token, [V] numbers; given {array.dtype} of shape "
            f"{list(array.shape)}. Give it one row of the outputs."
        )
    if not np.isfinite(array.max()):  # NaN is the largest
        raise InputError(
            f"A sampler takes logits that are finite, or -inf for tokens that are never to be drawn; given "
            f"{int(np.isnan(array).sum())} NaN, {int((array == np.inf).sum())} inf and "
            f"{int((array == -np.inf).sum())} -inf of {array.size}. Check what they come from."
        )
    return array
