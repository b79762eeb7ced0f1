"""Whether a foreign graph is the step that it says it is: run, in other splits and with other lanes beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nsm.errors import NsmError, UnsupportedError
from nsm.export.onnx_given import Given
from nsm.export.onnx_normal import Foreign
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
    if len(tokens) > 1:
        others = _tried(given, _other_lanes(tokens), tokens.shape[1] if timed else 1, kind)
        different = _first_difference(*(_lane(given.foreign, run, 0) for run in (whole, others)))
        if different:
            raise UnsupportedError(
                f"{kind} mixes its lanes: with other tokens in lane 1, lane 0 has another {different}. Streams are "
                "independent of each other here. Export the model for one stream, with an axis 0 of size 1."
            )


def sample_tokens(foreign: Foreign, shape: Sequence[int], maximum: int | None) -> Array:
    """Random tokens [B, K, *token] for `examine`: two lanes, where the graph takes any number.

    Args:
        foreign: the graph.
        shape: of a token.
        maximum: the largest id; None for vectors.
    """
    full = (foreign.lanes or 2, _LONG if foreign.timed else _SHORT, *shape)
    random = np.random.default_rng(0)
    if maximum is not None:
        return random.integers(0, maximum + 1, full)
    return random.standard_normal(full).astype(np.float32)


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


def _other_lanes(tokens: Array) -> Array:
    """The same tokens in lane 0, others in the rest."""
    changed = np.roll(tokens, 1, axis=1)
    if tokens.dtype.kind == "f":
        changed = -changed
    changed[0] = tokens[0]
    return changed


def _tried(given: Given, tokens: Array, size: int, kind: str) -> tuple[Arrays, Arrays]:
    try:
        return _run(given, tokens, size)
    except UnsupportedError:
        raise
    except (NsmError, ValueError) as error:
        raise UnsupportedError(
            f"{kind} does not run with calls of {size} tokens: {error} Does the graph hold for other sizes than those "
            "that it was exported with?"
        ) from error
