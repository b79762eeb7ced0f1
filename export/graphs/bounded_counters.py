"""Counters without end are kept small, where their graph shows that it makes no difference.

A counter c that a graph only uses modulo constants, divided by constants and then modulo, or beside constants in
comparisons, gives the same outputs for c and for c + period, from some base on. So the graph's next value is

    c' if c' < base + period else base + (c' - base) % period

and stays below 2^23, where every backend's integers are exact, for as long as a stream runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from nsm.bundle import graph_file
from nsm.runtimes.limits import Counters
from nsm.spec import StateSpec, StepSpec

LARGEST = 2**23
"""Counters stay below this: float32 holds the whole numbers up to 2^24, which leaves room for a call's growth."""
_USUAL = 2**22
"""A period is the multiple of the least one that comes next to this, so that few streams ever reach it."""

_SAME = (
    "Expand",
    "Flatten",
    "Gather",
    "GatherElements",
    "Identity",
    "Reshape",
    "Slice",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
)
_COMPARE = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")


def wrap_counters(folder: Path, spec: StepSpec, counters: Counters, steps: int) -> StepSpec:
    """Rewrite the graphs of a bundle for the counters that can be wrapped.

    Args:
        folder: with one graph for each entry.
        spec: of the model.
        counters: that grow without end.
        steps: calls of the golden trace; a counter that would be wrapped within them is left as it is.

    Returns:
        The spec, in which the states say how they are wrapped.
    """
    models = {
        entry.name: onnx.load(str(folder / graph_file(entry.name)), load_external_data=False) for entry in spec.entries
    }
    states = []
    for state in spec.states:
        wrap = _wrap_of(state, spec, models, counters, steps) if state.name in counters.growth else ()
        states.append(replace(state, wrap=wrap, per_token=None if wrap else state.per_token))
        for entry in spec.entries if wrap else ():
            if state.name in entry.writes:
                _rewrite(models[entry.name].graph, states[-1])
    for name, model in models.items():
        onnx.save(model, str(folder / graph_file(name)))
    return replace(spec, states=tuple(states))


@dataclass(frozen=True)
class _Form:
    """How a value moves with the counter c, for c at the base or behind it: it is rate * c + something in low .. high.

    None is a bound that is not known.
    """

    rate: Fraction = Fraction(0)
    low: Fraction | None = None
    high: Fraction | None = None


class _UnprovenError(Exception):
    """The counter is used in a way of which nothing is known."""


class _Proof:
    """Conditions on base and period, collected use by use.

    Args:
        alone: whether the counter is one number; else its numbers wrap at different times.
    """

    def __init__(self, alone: bool) -> None:
        self.base, self.period = 0, 1
        self._alone = alone

    def whole(self, rate: Fraction) -> None:
        """Ask for a period that `rate` times is a whole number."""
        self.period = math.lcm(self.period, rate.denominator)

    def positive(self, form: _Form, more: int = 0) -> None:
        """Ask for a base from which on the value, which grows with the counter, is `more` at least."""
        if form.low is None or form.rate <= 0:
            raise _UnprovenError
        self.base = max(self.base, math.ceil((more - form.low) / form.rate))

    def difference(self, left: _Form, right: _Form) -> _Form:
        if left.rate and right.rate and not self._alone:
            raise _UnprovenError
        low = None if left.low is None or right.high is None else left.low - right.high
        high = None if left.high is None or right.low is None else left.high - right.low
        return _Form(left.rate - right.rate, low, high)

    def ordered(self, left: _Form, right: _Form) -> int:
        """1 where left is larger from the base on, -1 where right is; 0 where that does not depend on the counter."""
        apart = self.difference(left, right)
        if apart.rate == 0:
            return 0
        if apart.rate < 0:
            return -self.ordered(right, left)
        self.positive(apart, 1)
        return 1

    def node(self, node: onnx.NodeProto, forms: Sequence[_Form], constants: Sequence[np.ndarray | None]) -> _Form:
        """The form of a node's results, of which one input at least moves with the counter."""
        kind, first = node.op_type, forms[0]
        others = forms[1:]
        if kind in _SAME and not any(form.rate for form in others):
            return first
        if kind == "Cast" and _attribute(node, "to") == TensorProto.INT64:
            return first
        if kind == "Sub":
            return self.difference(first, others[0])
        if kind == "Add":
            opposite = _Form(-others[0].rate, _minus(others[0].high), _minus(others[0].low))
            return self.difference(first, opposite)
        if kind in _COMPARE:
            self.ordered(first, others[0])
            return _Form()
        if kind in ("Min", "Max") and len(forms) == 2:
            return self._either(forms, 1 if kind == "Max" else -1)
        if kind == "Clip":
            for bound, sign in zip(others, (1, -1), strict=False):
                if node.input[1 if sign == 1 else 2]:
                    first = self._either((first, bound), sign)
            return first
        if kind == "Where" and not forms[0].rate:
            return _union(forms[1:])
        if kind == "Concat":
            return _union(forms)
        if kind == "Mul":
            by, moved = (0, 1) if constants[0] is not None else (1, 0)
            factor = _number(constants[by])
            return _scaled(forms[moved], factor)
        return self._divided(node, first, constants)

    def _divided(self, node: onnx.NodeProto, form: _Form, constants: Sequence[np.ndarray | None]) -> _Form:
        """Div, Mod and BitwiseAnd by a constant."""
        divisor = _number(constants[1]) if len(constants) == 2 else 0
        if node.op_type == "BitwiseAnd":
            divisor += 1
            if divisor & (divisor - 1):
                raise _UnprovenError
        if node.op_type not in ("Div", "Mod", "BitwiseAnd"):
            raise _UnprovenError
        if node.op_type == "Div" or _attribute(node, "fmod"):  # both go towards zero
            self.positive(form)
        self.whole(form.rate / divisor)
        if node.op_type != "Div":
            return _Form(Fraction(0), Fraction(0), Fraction(divisor - 1))
        low = None if form.low is None else (form.low - divisor + 1) / divisor
        return _Form(form.rate / divisor, low, None if form.high is None else form.high / divisor)

    def _either(self, forms: Sequence[_Form], sign: int) -> _Form:
        """The larger of two values, or with -1 the smaller."""
        which = self.ordered(*forms) * sign
        return _union(forms) if which == 0 else forms[0 if which > 0 else 1]


def _wrap_of(
    state: StateSpec, spec: StepSpec, models: Mapping[str, onnx.ModelProto], counters: Counters, steps: int
) -> tuple[int, ...]:
    """Base and period of a counter; () where nothing is proven, or it would be too large for that."""
    proof = _Proof(math.prod(state.shape) == 1)
    try:
        for entry in spec.entries:
            if state.name in entry.reads or state.name in entry.writes:
                _follow(models[entry.name].graph, state, proof)
    except _UnprovenError:
        return ()
    period = proof.period * max(1, _USUAL // proof.period)
    growth = int(counters.growth[state.name].max())
    start = int(counters.states[state.name].max())
    end = proof.base + period
    return () if end > LARGEST or growth > _USUAL or start + (steps + 2) * growth >= end else (proof.base, period)


def _follow(graph: onnx.GraphProto, state: StateSpec, proof: _Proof) -> None:
    """Collect the conditions of one graph.

    Raises:
        _UnprovenError: it uses the counter otherwise.
    """
    constants = {tensor.name: _array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = _array(node.attribute[0].t)
    forms = {state.past: _Form(Fraction(1), Fraction(0), Fraction(0))}
    for node in graph.node:
        given = [forms.get(name) or _constant(constants.get(name)) for name in node.input]
        if any(item.HasField("g") or item.graphs for item in node.attribute):
            raise _UnprovenError
        if any(form.rate for form in given):
            form = proof.node(node, given, [constants.get(name) for name in node.input])
            forms |= dict.fromkeys(node.output, form)
    for output in graph.output:
        wanted = 1 if output.name == state.present else 0
        if forms.get(output.name, _Form()).rate != wanted:
            raise _UnprovenError


def _attribute(node: onnx.NodeProto, name: str) -> int:
    """An integer attribute; 0 where there is none."""
    return next((int(item.i) for item in node.attribute if item.name == name), 0)


def _array(tensor: TensorProto) -> np.ndarray | None:
    """The numbers of a whole-number constant that lies in the graph itself."""
    if tensor.data_location == TensorProto.EXTERNAL or tensor.data_type not in (TensorProto.INT64, TensorProto.INT32):
        return None
    return numpy_helper.to_array(tensor)


def _constant(array: np.ndarray | None) -> _Form:
    if array is None or not array.size:
        return _Form()
    return _Form(Fraction(0), Fraction(int(array.min())), Fraction(int(array.max())))


def _number(array: np.ndarray | None) -> int:
    """The one number above 0 that a constant holds."""
    if array is None or array.size != 1 or int(array.reshape(-1)[0]) < 1:
        raise _UnprovenError
    return int(array.reshape(-1)[0])


def _union(forms: Iterable[_Form]) -> _Form:
    forms = list(forms)
    if len({form.rate for form in forms}) > 1:
        raise _UnprovenError
    lows, highs = [form.low for form in forms], [form.high for form in forms]
    low = None if None in lows else min(value for value in lows if value is not None)
    return _Form(forms[0].rate, low, None if None in highs else max(value for value in highs if value is not None))


def _scaled(form: _Form, factor: int) -> _Form:
    low, high = (None if value is None else value * factor for value in (form.low, form.high))
    return _Form(form.rate * factor, low, high)


def _minus(value: Fraction | None) -> Fraction | None:
    return None if value is None else -value


def _rewrite(graph: onnx.GraphProto, state: StateSpec) -> None:
    """Wrap the next value of a counter, in place."""
    base, period = state.wrap
    stem = f"wrap/{state.name}"
    new = f"{stem}/new"
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == state.present else name for name in names]
    numbers = {"base": base, "period": period, "end": base + period}
    graph.initializer.extend(
        numpy_helper.from_array(np.array(value, state.numpy_dtype), f"{stem}/{name}")
        for name, value in numbers.items()
        if base or name == "period"
    )
    if base == 0:
        graph.node.append(helper.make_node("Mod", [new, f"{stem}/period"], [state.present], f"{stem}/Mod"))
        return
    graph.node.extend(
        helper.make_node(kind, [new if name == "new" else f"{stem}/{name}" for name in given], [out], f"{stem}/{kind}")
        for kind, given, out in (
            ("Sub", ("new", "base"), f"{stem}/behind"),
            ("Mod", ("behind", "period"), f"{stem}/rest"),
            ("Add", ("rest", "base"), f"{stem}/back"),
            ("GreaterOrEqual", ("new", "end"), f"{stem}/over"),
            ("Where", ("over", "back", "new"), state.present),
        )
    )
