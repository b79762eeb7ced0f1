"""Running an ONNX graph whose states are not settled: one call on made-up values, or several that feed outputs back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property

import numpy as np
import onnx
import onnxruntime as ort

from nsm.errors import RunError
from nsm.export.sources.onnx.file import Port, ports, real_inputs
from nsm.trace import Array, Arrays

LARGEST_STATE = 1e6
"""A state that grows beyond it within `STEPS` is taken to be none: made-up inputs are of the order of 1."""

_SAMPLED = 256
"""Numbers of a state that are looked for in an output."""

STEPS = 8
"""Calls that feed outputs back."""


class Trial:
    """A graph with its open axes closed: 1, or the size that was asked for; opened when it is first used.

    Args:
        model: the graph.
        initial: values of inputs before the first step; zeros for all others.
        sizes: of open axes, by name.
    """

    def __init__(
        self, model: onnx.ModelProto, initial: Mapping[str, Array] | None = None, sizes: Mapping[str, int] | None = None
    ) -> None:
        self._model, self._initial, self._sizes = model, initial or {}, sizes or {}
        self.inputs = real_inputs(model)
        self.outputs = list(ports(list(model.graph.output)))

    @cached_property
    def _session(self) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        return ort.InferenceSession(self._model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def shape(self, port: Port) -> tuple[int, ...]:
        """Of an input, with its open axes closed."""
        return tuple(self._sizes.get(size, 1) if isinstance(size, str) else size for size in port.shape)

    def first(self, name: str) -> Array:
        """A state before the first step."""
        port = self.inputs[name]
        return self._initial[name] if name in self._initial else np.zeros(self.shape(port), port.dtype)

    def made_up(self, seed: int, positive: bool = False, known: Collection[str] = ()) -> Arrays:
        """Random values for all inputs but those that are known: standard normal numbers, or their magnitudes, and the
        integers 0 and 1.
        """
        random, values = np.random.default_rng(seed), {}
        for name, port in self.inputs.items():
            if name in known:
                continue
            shape, dtype = self.shape(port), np.dtype(port.dtype)
            if dtype.kind == "f":
                numbers = random.standard_normal(shape)
                values[name] = np.asarray(np.abs(numbers) + 0.1 if positive else numbers, dtype)
            else:
                values[name] = np.asarray(random.integers(0, 2, shape), dtype)
        return values

    def call(self, feed: Mapping[str, Array]) -> Arrays:
        """All outputs, by name.

        Raises:
            RunError: the graph cannot be opened, or failed.
        """
        try:
            return dict(zip(self.outputs, self._session.run(self.outputs, dict(feed)), strict=True))
        except Exception as error:  # the binding's classes have no common base of their own
            raise RunError(f"ONNX Runtime failed on made-up inputs: {error}") from error

    def effects(self, pairs: Mapping[str, str]) -> dict[str, float]:
        """How much the outputs of a step change when a state is not fed back.

        All states are fed back over `STEPS` calls. Then one more call takes each in turn from its value before the
        first step.

        Args:
            pairs: outputs by the inputs that they are fed back to.

        Returns:
            By input, the largest change relative to the largest number of an output: of those that are no states, or
            if these do not change, of all. Infinity where a state grows
            beyond `LARGEST_STATE`; NaN where it changes its shape or dtype or is not finite.

        Raises:
            RunError: the graph failed.
        """
        for positive in (False, True):
            states = {name: self.first(name) for name in pairs}
            spoiled: dict[str, float] = {}
            for step in range(STEPS):
                given = self.call({**self.made_up(step, positive, states), **states})
                for past, present in pairs.items():
                    fault = _fault(states[past], given[present])
                    if fault is None:
                        states[past] = given[present]
                    else:
                        spoiled[past] = fault
            if not spoiled:
                break
        feed = {**self.made_up(STEPS, positive, states), **states}
        whole, found = self.call(feed), {}
        answers = [key for key in whole if key not in pairs.values()]
        for name in pairs:
            if name in spoiled:
                found[name] = spoiled[name]
                continue
            without = self.call({**feed, name: self.first(name)})
            seen = max((_change(whole[key], without[key]) for key in answers), default=0.0)
            found[name] = seen or max(_change(whole[key], without[key]) for key in whole)
        return found

    def split_difference(self, main: str, pairs: Mapping[str, str], held: str = "") -> float:
        """How much the outputs of a call of `STEPS` tokens differ from those of two calls of half as many.

        Args:
            main: the input that takes tokens along axis 1, which is open.
            pairs: outputs by the inputs that they are fed back to.
            held: an input that is not fed back.

        Returns:
            Relative to the largest number of an output; infinite where an output has no axis 1 of so many tokens.

        Raises:
            RunError: the graph failed.
        """
        longer = Trial(self._model, self._initial, {**self._sizes, str(self.inputs[main].shape[1]): STEPS})
        longer.__dict__["_session"] = self._session
        feed = longer.made_up(0) | {name: self.first(name) for name in pairs}
        whole, parts = longer.call(feed), []
        for tokens in np.split(feed[main], 2, axis=1):
            parts.append(longer.call({**feed, main: tokens}))
            feed |= {past: parts[-1][present] for past, present in pairs.items() if past != held}
        found = 0.0
        for name, value in whole.items():
            if name in pairs.values():
                found = max(found, _change(value, parts[-1][name]))
            else:
                joined = [part[name] for part in parts]
                timed = value.ndim > 1 and value.shape[1] == STEPS
                found = max(found, _change(value, np.concatenate(joined, 1)) if timed else np.inf)
        return found

    def moved(self) -> set[tuple[str, str]]:
        """Inputs and outputs that hold at least half of the input's numbers, exactly, at other places: as a window does
        whose rows move on.

        Raises:
            RunError: the graph failed.
        """
        feed = self.made_up(0)
        given = self.call(feed)
        ordered = {name: np.sort(value, axis=None) for name, value in given.items() if value.dtype.kind == "f"}
        return {
            (past, present)
            for past, one in feed.items()
            for present, numbers in ordered.items()
            if one.shape == given[present].shape and one.dtype == numbers.dtype and one.size > 1
            if _share_moved(one, given[present], numbers) >= 0.5
        }

    def counted(self) -> set[tuple[str, str]]:
        """Inputs and outputs of integers that differ by the same number, which is not 0, whatever the input is.

        Raises:
            RunError: the graph failed.
        """
        feed = self.made_up(0)
        whole = [name for name, value in feed.items() if value.dtype.kind == "i"]
        if not whole:
            return set()
        steps: dict[tuple[str, str], list[Array]] = {}
        for value in (0, 1, 3):
            # Two inputs never differ by the same number twice.
            feed |= {name: np.full_like(feed[name], value * place) for place, name in enumerate(whole, 1)}
            given = self.call(feed)
            for past in whole:
                for present, other in given.items():
                    if other.shape == feed[past].shape and other.dtype == feed[past].dtype:
                        steps.setdefault((past, present), []).append(other - feed[past])
        return {
            pair
            for pair, (first, *later) in steps.items()
            if first.any() and all(np.array_equal(first, step) for step in later)
        }


def _fault(state: Array, new: Array) -> float | None:
    """Infinity for a value out of range, NaN for one that is no number or has another shape or dtype; else None."""
    if new.shape != state.shape or new.dtype != state.dtype:
        return np.nan
    if new.dtype.kind != "f":
        return None
    largest = float(np.abs(new).max(initial=0))
    return np.nan if not np.isfinite(largest) else np.inf if largest > LARGEST_STATE else None


def _share_moved(one: Array, other: Array, ordered: Array) -> float:
    """The share of an array's numbers, of some of them where it is large, that another holds at other places.

    Args:
        one, other: of one shape.
        ordered: the numbers of the other, in order.
    """
    places = np.linspace(0, one.size - 1, min(one.size, _SAMPLED), dtype=np.int64)
    values = one.reshape(-1)[places]
    found = ordered[np.minimum(np.searchsorted(ordered, values), ordered.size - 1)] == values
    return float((found & (values != other.reshape(-1)[places])).mean())


def _change(one: Array, other: Array) -> float:
    if one.shape != other.shape:
        return np.inf
    if one.dtype.kind != "f":
        return float(np.any(one != other))
    scale = max(float(np.abs(one).max(initial=0)), 1e-6)
    with np.errstate(invalid="ignore"):  # infinity less infinity: NaN, as it should be
        return float(np.abs(one - other).max(initial=0)) / scale
