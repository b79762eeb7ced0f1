"""Foreign steps in numpy, behind the protocol of the examination: a right one, and ones with a fault each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nsm.adapters.validate import Advice
from nsm.errors import UnsupportedError
from nsm.spec import TensorSpec
from nsm.trace import Array, Arrays

WIDTH, RING = 3, 5
ADVICE = Advice("SAMPLES", "LENGTH", "LANES", "STATE", "RANDOM", "OFFLINE")


class Right:
    """x [B, K, 3]: a leaky sum `h` [B, 3], the last five inputs in a `ring` [B, 5, 3], and how many there were [B].

    The output is the sum, the mean of the ring, and a number that goes round with the count.
    """

    kind = "The step"
    inputs: Sequence[TensorSpec] = (TensorSpec("tokens", (WIDTH,), "float32"),)
    outputs: Sequence[str] = ("y",)
    chunk, why, size, advice = 4, "", 100, ADVICE
    timed = True
    lanes: int | None = None
    capacity: int | None = None

    def initial(self, lanes: int) -> Arrays:
        return {
            "h": np.zeros((lanes, WIDTH), np.float32),
            "ring": np.zeros((lanes, RING, WIDTH), np.float32),
            "count": np.zeros(lanes, np.int64),
        }

    def __call__(self, inputs: Mapping[str, Any], state: Arrays) -> tuple[Arrays, Arrays]:
        rows = []
        for index in range(inputs["tokens"].shape[1]):
            row, state = self.one(inputs["tokens"][:, index], state)
            rows.append(row)
        return {"y": np.stack(rows, 1)}, state

    def one(self, x: Array, state: Arrays) -> tuple[Array, Arrays]:
        h = (np.float32(0.5) * state["h"] + x).astype(np.float32)
        ring = state["ring"].copy()
        lanes = np.arange(len(x))
        ring[lanes, state["count"] % RING] = x
        y = h + ring.mean(1) + np.sin(state["count"] % 7).astype(np.float32)[:, None]
        return y, {"h": h, "ring": ring, "count": state["count"] + 1}

    def suspects(self) -> list[str]:
        return []

    def offline(self, inputs: Arrays) -> Arrays | None:
        """The same over a whole sequence, by sums."""
        x = inputs["tokens"][0]
        rows = []
        for t in range(len(x)):
            h = sum(np.float32(0.5) ** (t - i) * x[i] for i in range(max(0, t - 40), t + 1))
            mean = x[max(0, t - RING + 1) : t + 1].sum(0) / RING
            rows.append(h + mean + np.float32(np.sin(t % 7)))
        return {"y": np.stack(rows).astype(np.float32)[None]}


class NotFinite(Right):
    """Gives NaN where a token is under 9, made-up ones always."""

    def one(self, x: Array, state: Arrays) -> tuple[Array, Arrays]:
        y, state = super().one(x, state)
        return np.where(x < 9, np.float32(np.nan), y), state


class Positive(Right):
    """Takes the logarithm of its tokens; has no forward over sequences."""

    def one(self, x: Array, state: Arrays) -> tuple[Array, Arrays]:
        with np.errstate(invalid="ignore"):
            return super().one(np.log(x), state)

    def offline(self, inputs: Arrays) -> Arrays | None:
        return None


class Grows(Right):
    """A cache that is longer after each call."""

    def one(self, x: Array, state: Arrays) -> tuple[Array, Arrays]:
        y, after = super().one(x, {**state, "ring": state["ring"][:, :RING]})
        return y, {**after, "ring": np.concatenate([state["ring"], x[:, None]], 1)}


class Double(Right):
    def one(self, x: Array, state: Arrays) -> tuple[Array, Arrays]:
        y, after = super().one(x, state)
        return y.astype(np.float64), after


class Pooled(Right):
    """Gives one row for a whole call."""

    def __call__(self, inputs: Mapping[str, Any], state: Arrays) -> tuple[Arrays, Arrays]:
        outputs, after = super().__call__(inputs, state)
        return {"y": outputs["y"].mean(1, keepdims=True)}, after


class Writes(Right):
    """Writes into the ring that it is given."""

    def one(self, x: Array, state: Arrays) -> tuple[Array, Arrays]:
        y, after = super().one(x, state)
        state["ring"][...] = after["ring"]
        return y, {**after, "ring": state["ring"].copy()}


class Counts(Right):
    """Does something else from its 70th call on, whatever stream it is."""

    calls = 0

    def __call__(self, inputs: Mapping[str, Any], state: Arrays) -> tuple[Arrays, Arrays]:
        outputs, after = super().__call__(inputs, state)
        self.calls += 1
        return {"y": outputs["y"] + np.float32(self.calls >= 70)}, after


class Unread(Right):
    """Writes `h` and never reads it."""

    def one(self, x: Array, state: Arrays) -> tuple[Array, Arrays]:
        return super().one(x, {**state, "h": np.zeros_like(state["h"])})

    def offline(self, inputs: Arrays) -> Arrays | None:
        return None


class FirstOfCall(Right):
    """Takes the first token of a call for all of them."""

    def __call__(self, inputs: Mapping[str, Any], state: Arrays) -> tuple[Arrays, Arrays]:
        tokens = inputs["tokens"]
        return super().__call__({"tokens": np.repeat(tokens[:, :1], tokens.shape[1], 1)}, state)

    def offline(self, inputs: Arrays) -> Arrays | None:
        return None


class WrongWhenFull(Right):
    """Splits are right until the ring has been full for some time."""

    def __call__(self, inputs: Mapping[str, Any], state: Arrays) -> tuple[Arrays, Arrays]:
        full, many = state["count"] > 60, inputs["tokens"].shape[1] > self.chunk
        outputs, after = super().__call__(inputs, state)
        return {"y": outputs["y"] + (full & many).astype(np.float32)[:, None, None]}, after


class MixesTokens(Right):
    def one(self, x: Array, state: Arrays) -> tuple[Array, Arrays]:
        y, after = super().one(x, state)
        return y - x.mean(0, keepdims=True) * np.float32(len(x) > 1), after


class OneCount(Right):
    """Takes the first stream's count for all."""

    def one(self, x: Array, state: Arrays) -> tuple[Array, Arrays]:
        y, after = super().one(x, {**state, "count": np.repeat(state["count"][:1], len(x))})
        return y, {**after, "count": state["count"] + 1}


class Four(Right):
    """For four streams."""

    lanes = 4

    def initial(self, lanes: int) -> Arrays:
        assert lanes == 4
        return super().initial(lanes)


class FourMixed(OneCount, Four):
    pass


class OneStream(Right):
    """Has states without an axis for streams."""

    lanes = 1
    why = "its states have no axis for streams"


class Window(Right):
    """Its forward over a sequence is another one from token 70 on."""

    timed, chunk = False, 1

    def offline(self, inputs: Arrays) -> Arrays | None:
        found = super().offline(inputs)
        assert found is not None
        found["y"][:, 70:] += 1
        return found


class OtherShape(Right):
    def offline(self, inputs: Arrays) -> Arrays | None:
        found = super().offline(inputs)
        assert found is not None
        return {"y": found["y"][:, 1:]}


class Long(Right):
    """Keeps its last `length` inputs, one by one, in a cache that moves on; never one that is 0."""

    timed, chunk = False, 1

    def __init__(self, length: int, size: int = 100) -> None:
        self.length, self.size = length, size

    def initial(self, lanes: int) -> Arrays:
        return {"cache": np.zeros((lanes, self.length, WIDTH), np.float32)}

    def one(self, x: Array, state: Arrays) -> tuple[Array, Arrays]:
        cache = np.concatenate([state["cache"][:, 1:], x[:, None]], 1)
        return cache.sum(1), {"cache": cache}

    def offline(self, inputs: Arrays) -> Arrays | None:
        x = inputs["tokens"][0]
        rows = [x[max(0, t - self.length + 1) : t + 1].sum(0) for t in range(len(x))]
        return {"y": np.stack(rows)[None]}


class Table(Right):
    """Adds the row of a table at the count, and fails where it ends."""

    def __init__(self, rows: int, capacity: int | None = None) -> None:
        self.table = np.random.default_rng(0).standard_normal((rows, WIDTH)).astype(np.float32)
        self.capacity = capacity

    def __call__(self, inputs: Mapping[str, Any], state: Arrays) -> tuple[Arrays, Arrays]:
        if (state["count"] + inputs["tokens"].shape[1] > len(self.table)).any():
            raise UnsupportedError("The table ends.")
        return super().__call__(inputs, state)

    def one(self, x: Array, state: Arrays) -> tuple[Array, Arrays]:
        y, after = super().one(x, state)
        return y + self.table[state["count"]], after

    def offline(self, inputs: Arrays) -> Arrays | None:
        found = super().offline(inputs)
        assert found is not None
        return {"y": found["y"] + self.table[: found["y"].shape[1]]}
