"""Whether a foreign graph is the step that it says it is: run, in other splits and with other lanes beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nsm.errors import NsmError, UnsupportedError
from nsm.export.onnx_foreign import Foreign
from nsm.export.onnx_given import Given
from nsm.trace import Array, Arrays

TOLERANCE = 1e-4
"""Of a difference that is rounding, relative to the largest number of a tensor."""

_LONG, _SHORT = 32, 3
"""Tokens that a graph is run over: where a call may have any number of them, and where it has one."""


def lane_axes(given: Given, tokens: Array, possible: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Where states have their lanes, by experiment: the first lane of a state does not depend on the tokens of others.

    Args:
        given: the graph, with the first of the possible axes.
        tokens: [B, K, *token], see `sample_tokens`.
        possible: axes that it may be, by input.

    Returns:
        Those that it can be, by input; all of them where it can be none, which `examine` refuses.
    """
    (_, before), (_, after) = (_run(given, part) for part in (tokens, _other_lanes(tokens)))
    found = {}
    for state in given.foreign.states:
        axes = list(possible[state.past])
        one, other = (state.given_layout(run[state.name]) for run in (before, after))
        alike = [axis for axis in axes if same(one.take(0, axis), other.take(0, axis))]
        found[state.past] = alike or axes
    return found


def examine(given: Given, tokens: Array, kind: str) -> None:
    """Run a graph over tokens, in calls of other lengths, and with other tokens in the other lanes.

    Args:
        given: the graph.
        tokens: [B, K, *token], see `sample_tokens`.
        kind: what it is, for people.

    Raises:
        UnsupportedError: it does not run, answers other lengths differently, or mixes its lanes.
    """
    timed = given.foreign.timed
    whole = _tried(given, tokens, tokens.shape[1] if timed else 1, kind)
    for size in (_LONG // 2, 1) if timed else ():
        parts = _tried(given, tokens, size, kind)
        different = _first_difference(whole, parts)
        if different:
            raise UnsupportedError(
                f"{kind} answers {_LONG} tokens in one call differently than in calls of {size} ({different}): a "
                "length is built into it, or something is not carried as state. If it only ever takes a fixed number "
                "of tokens, export it with a static axis 1: then these are one token."
            )
    for lane in range(len(tokens)) if len(tokens) > 1 else ():
        others = _tried(given, _other_lanes(tokens, lane), tokens.shape[1] if timed else 1, kind)
        different = _first_difference(*(_lane(given.foreign, run, lane) for run in (whole, others)))
        if different:
            raise UnsupportedError(
                f"{kind} mixes its lanes: with other tokens in the others, lane {lane} has another {different}. "
                "Streams are independent of each other here. Take one stream at a time: --shape "
                f"{given.foreign.main.name}=1,..., or an export with an axis 0 of size 1."
            )


def sample_tokens(given: Given, shape: Sequence[int], maximum: int | None, kind: str) -> Array:
    """Random tokens [B, K, *token] for `examine`: two lanes, where the graph takes any number.

    Args:
        given: the graph.
        shape: of a token.
        maximum: the largest id; None for vectors.
        kind: what the graph is, for people.

    Raises:
        UnsupportedError: what it makes of them is not finite.
    """
    foreign = given.foreign
    full = (foreign.lanes or 2, _LONG if foreign.timed else _SHORT, *shape)
    random = np.random.default_rng(0)
    kinds: list[Array]
    if maximum is not None:
        kinds = [random.integers(0, maximum + 1, full)]
    else:
        normal = random.standard_normal(full).astype(np.float32)
        kinds = [normal, np.abs(normal) + np.float32(0.1)]  # powers and amplitudes, of which there may be a logarithm
    for tokens in kinds:
        outputs, states = _tried(given, tokens, full[1] if foreign.timed else 1, kind)
        if all(np.isfinite(value).all() for value in (*outputs.values(), *states.values())):
            return tokens
    raise UnsupportedError(
        f"{kind} gives numbers that are not finite, on random tokens and on positive ones as well, so that it cannot "
        "be seen to be a step. Is it an overflow? Does a state divide by itself at the start?"
    )


def same(one: Array, other: Array) -> bool:
    """Whether two arrays differ by rounding at most."""
    if one.dtype.kind != "f":
        return np.array_equal(one, other)
    scale = max(float(np.abs(one).max(initial=0)), 1e-3)
    return bool(np.abs(one - other).max(initial=0) <= TOLERANCE * scale)  # False where one is not a number


def _first_difference(one: tuple[Arrays, Arrays], other: tuple[Arrays, Arrays]) -> str:
    """Which output or state differs first; nothing where none does."""
    for what, left, right in zip(("output", "state"), one, other, strict=True):
        for name, value in left.items():
            if not same(value, right[name]):
                return f"{what} {name}"
    return ""


def _run(given: Given, tokens: Array, size: int | None = None) -> tuple[Arrays, Arrays]:
    """Outputs over tokens from the initial state, in calls of `size` (default: all at once, or one by one), and the
    states at the end. Outputs are [B, K, ...] of a graph with a time axis, else [calls, ...].
    """
    timed, length = given.foreign.timed, tokens.shape[1]
    size = (length if timed else 1) if size is None else size
    states = {state.name: state.initial_lanes(len(tokens)) for state in given.foreign.states}
    parts: list[Arrays] = []
    for start in range(0, length, size):
        answers, states = given.step(np.ascontiguousarray(tokens[:, start : start + size]), states)
        parts.append(answers)
    join = np.concatenate if timed else np.stack
    return {name: join([part[name] for part in parts], 1 if timed else 0) for name in given.foreign.answers}, states


def _lane(foreign: Foreign, run: tuple[Arrays, Arrays], lane: int) -> tuple[Arrays, Arrays]:
    """What one lane of a run has of it."""
    outputs, states = run
    if foreign.timed:
        return {name: value[lane] for name, value in outputs.items()}, {n: v[lane] for n, v in states.items()}
    # [calls, ...]: an answer has its lanes on its first axis, or is a row for each of them
    lanes = len(next(iter(states.values())))
    alone = {name: value.reshape(len(value), lanes, -1)[:, lane] for name, value in outputs.items()}
    return alone, {name: value[lane] for name, value in states.items()}


def _other_lanes(tokens: Array, lane: int = 0) -> Array:
    """The same tokens in one lane, others in the rest."""
    changed = np.roll(tokens, 1, axis=1)
    if tokens.dtype.kind == "f":
        changed = changed[..., ::-1] * np.float32(0.75) if tokens.min() > 0 else -changed
    changed[lane] = tokens[lane]
    return changed


def _tried(given: Given, tokens: Array, size: int, kind: str) -> tuple[Arrays, Arrays]:
    try:
        return _run(given, tokens, size)
    except UnsupportedError:
        raise
    except (NsmError, ValueError) as error:
        raise UnsupportedError(
            f"{kind} does not run with calls of {size} tokens: {error} Does the graph hold for other sizes than those "
            f"that it was exported with? Fix those that are said to be open: --shape {given.foreign.main.name}=1,512"
        ) from error
