"""Pairing: which outputs of a foreign ONNX graph are fed back to which inputs, by evidence.

An output may be a state after a step only where it has the shape and the dtype of an input. Of such pairs, these are
states:

1. Those that the graph itself shows: the initial and the final state of a recurrent operator, a window whose rows move
   on, a counter.
2. Those whose names only states have, where it is seen that feeding the output back changes later outputs, and that the
   values stay in range.
3. If a call takes any number of tokens: the only choice of pairs with which one call equals two shorter calls.

Where more than one input is left then, and one of them may be a state, nothing is guessed.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from nsm.errors import RunError
from nsm.export.sources.onnx.file import Port, ports, real_inputs
from nsm.export.sources.onnx.states.dependence import dependence_of
from nsm.export.sources.onnx.states.recurrent import wired
from nsm.export.sources.onnx.states.trial import Trial
from nsm.export.sources.state_names import find_states, is_telling
from nsm.trace import Array

_MOST_PAIRS = 32
"""Pairs of which a person is told."""
_MOST_WIRINGS = 64
"""Sets of pairs that are tried over splits."""
_EXACT, _INEXACT = 1e-4, 1e-3
"""Differences over a split that are rounding, and that are none."""


@dataclass(frozen=True)
class Pair:
    """An input, and an output that may be fed back to it.

    Args:
        past, present: the graph's input and output.
        proof: evidence in the graph that this is a state; "" without evidence.
        named: whether the names are a pair by a convention.
        effect: the largest relative change of later outputs where it is not fed back, see `Trial.effects`; None where
            it was not tried.
    """

    past: str
    present: str
    proof: str = ""
    named: bool = False
    effect: float | None = None

    @property
    def telling(self) -> bool:
        """Whether only states are called so."""
        return self.named and is_telling(self.past, self.present)

    @property
    def found(self) -> str:
        """How it was found, for people."""
        parts = [self.proof] if self.proof else ["its name"] if self.named else ["its shape and dtype"]
        if self.effect is not None:
            parts.append(f"fed back, it {_told(self.effect)}")
        return "; ".join(parts)

    @property
    def refuted(self) -> bool:
        """Whether it is no state, as feeding it back shows."""
        return self.effect in (0, np.inf)


def _told(effect: float) -> str:
    if np.isnan(effect):
        return "changes its shape or is not finite"
    if np.isinf(effect):
        return "does not stay in range"
    return f"changes later outputs by {effect:.0%}" if effect else "changes no later output"


@dataclass(frozen=True)
class Pairing:
    """The states of a graph, as far as they are known.

    Args:
        inputs, outputs: of the graph.
        states: the pairs that are states.
        ambiguous: further pairs that may be.
        data: the inputs that are left when the states are taken away. Several are ambiguous where some may be states.
        trouble: why the graph was not run; "" where it was.
    """

    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    states: Sequence[Pair]
    ambiguous: Sequence[Pair]
    data: Sequence[str]
    trouble: str = ""


def find_pairs(
    model: onnx.ModelProto,
    main: str | None = None,
    no_states: Collection[str] = (),
    initial: Mapping[str, Array] | None = None,
) -> Pairing:
    """Look for the states of a graph; see above.

    Args:
        model: the graph, without the inputs that are constants.
        main: the input that takes tokens, where it is known.
        no_states: outputs that are none.
        initial: values of inputs before the first step; zeros for all others.
    """
    trial = Trial(model, initial)
    inputs, outputs = real_inputs(model), ports(list(model.graph.output))
    pasts = [name for name in inputs if name != main]
    presents = [name for name in outputs if name not in no_states]
    proofs, trouble = _proofs(model, trial)
    read = frozenset[str]().union(*(dependence_of(model.graph).values.get(name, frozenset()) for name in outputs))
    names = {(option.past, option.present) for option in find_states(pasts, presents)}
    pairs = [
        Pair(past, present, proofs.get((past, present), ""), (past, present) in names)
        for past, present in itertools.product(pasts, presents)
        if _compatible(inputs[past], outputs[present]) or ((past, present) in names and is_telling(past, present))
    ]
    states = _apart([pair for pair in pairs if pair.proof])
    states += _apart(pair for pair in _free(pairs, states) if pair.telling)
    states += _carried_over_splits(trial, states, _free(pairs, states))
    if not trouble:
        states = _tried(trial, states)
    # States that nothing reads are refused later, by a reason of their own.
    doubted = [pair for pair in states if pair.refuted and not pair.proof and pair.past in read]
    states = [pair for pair in states if pair not in doubted]
    data = [name for name in inputs if name not in [pair.past for pair in states]]
    if not data:  # a step takes something besides its states
        doubted, states, data = states, [], list(inputs)
    if sum(bool(inputs[name].shape) for name in data) < 2:  # the one that takes tokens; a single number is a setting
        return Pairing(inputs, outputs, states, [], data, trouble)
    others = [pair for pair in _free(pairs, [*states, *doubted]) if pair.past in read]
    others = sorted(others, key=lambda pair: not pair.named)[:_MOST_PAIRS]
    if not trouble:
        others = [_tried(trial, [*states, pair])[-1] for pair in others]
    others = [pair for pair in others if pair.named or not (pair.effect is not None and np.isnan(pair.effect))]
    return Pairing(inputs, outputs, states, [*doubted, *others], data, trouble)


def _compatible(past: Port, present: Port) -> bool:
    """Whether an output may have the shape and the dtype of an input, as far as the file says."""
    if past.dtype != present.dtype or past.dtype not in ("float32", "int64", "int32", "bool"):
        return False
    return len(past.shape) == len(present.shape) and all(
        one == other or isinstance(one, str) or isinstance(other, str)
        for one, other in zip(past.shape, present.shape, strict=True)
    )


def _proofs(model: onnx.ModelProto, trial: Trial) -> tuple[dict[tuple[str, str], str], str]:
    """Evidence from the graph itself, by input and output, and the reason why it was not run, or ""."""
    found: dict[tuple[str, str], str] = {}
    trouble = ""
    try:
        found |= dict.fromkeys(trial.moved(), "rows that move on")
    except RunError as error:
        trouble = str(error)
    else:
        with contextlib.suppress(RunError):  # ids may have to be smaller than those that are tried
            found |= dict.fromkeys(trial.counted(), "a count that goes on")
    return {**found, **wired(model.graph)}, trouble


def _apart(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs that share no input and no output; of those that share one, the one that is named, if one is."""
    pairs = list(pairs)

    def rivals(pair: Pair) -> list[Pair]:
        return [
            other
            for other in pairs
            if other != pair
            and (other.past, other.present) != (pair.past, pair.present)
            and (other.past == pair.past or other.present == pair.present)
        ]

    return [pair for pair in pairs if not (others := rivals(pair)) or (pair.named and not any(o.named for o in others))]


def _free(pairs: Iterable[Pair], taken: Sequence[Pair]) -> list[Pair]:
    """The pairs whose input and output belong to no other."""
    pasts, presents = ({getattr(pair, name) for pair in taken} for name in ("past", "present"))
    return [pair for pair in pairs if pair.past not in pasts and pair.present not in presents]


def _tried(trial: Trial, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with the effect of feeding them back together; unchanged if the graph does not run that way."""
    try:
        effects = trial.effects({pair.past: pair.present for pair in pairs})
    except RunError:
        return list(pairs)
    return [replace(pair, effect=effects[pair.past]) for pair in pairs]


def _carried_over_splits(trial: Trial, states: Sequence[Pair], pairs: Sequence[Pair]) -> list[Pair]:
    """Further states, of a graph that takes any number of tokens: without each of them a split shows."""
    known = {pair.past: pair.present for pair in states}
    left = [name for name in trial.inputs if name not in known]
    exact: list[list[Pair]] = []
    wirings = 0
    for main in left:
        shape = trial.inputs[main].shape
        choices = [[pair for pair in pairs if pair.past == name] for name in left if name != main]
        if len(shape) < 2 or not isinstance(shape[1], str) or not all(choices) or not choices:
            continue
        for wiring in itertools.product(*choices):
            wirings += 1
            if len({pair.present for pair in wiring}) == len(wiring) and _is_exact(trial, main, known, wiring):
                exact.append(list(wiring))
            if wirings == _MOST_WIRINGS:
                return []
    if len(exact) != 1:
        return []
    return [replace(pair, proof="one call, which gives what two calls give with it") for pair in exact[0]]


def _is_exact(trial: Trial, main: str, known: Mapping[str, str], wiring: Sequence[Pair]) -> bool:
    """Whether a split does not show with these states, and does without any one of them."""
    pairs = {**known, **{pair.past: pair.present for pair in wiring}}
    try:
        return trial.split_difference(main, pairs) < _EXACT and all(
            trial.split_difference(main, pairs, pair.past) > _INEXACT for pair in wiring
        )
    except (RunError, ValueError):  # the latter: an axis that there is not
        return False
