"""Whether a foreign graph is the step that it says it is: run, in other splits and with other lanes beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from nsm.errors import NsmError, UnsupportedError
from nsm.export.onnx_given import Given
from nsm.export.onnx_normal import Foreign
from nsm.trace import Array, Arrays

TOLERANCE = 1e-4
"""Of a difference that is rounding, relative to the largest number of a tensor."""

_LONG, _SHORT = 32, 3
"""Tokens that a graph is run over: where a call may have any number of them, and where it has one."""


def lane_axes(foreign: Foreign, tokens: Array, possible: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Where states have their lanes, by experiment: the first lane of a state does not depend on the tokens of others.

    Args:
        foreign: the graph, with the first of the possible axes.
        tokens: [B, K, *token], see `sample_tokens`.
        possible: axes that it may be, by input.

    Returns:
        Those that it can be, by input; all of them where it can be none, which `examine` refuses.
    """
    given = Given(foreign)
    (_, before), (_, after) = (_run(given, foreign, part) for part in (tokens, _other_lanes(tokens)))
    found = {}
    for state in foreign.states:
        axes = list(possible[state.past])
        one, other = (state.given_layout(run[state.name]) for run in (before, after))
        alike = [axis for axis in axes if same(one.take(0, axis), other.take(0, axis))]
        found[state.past] = alike or axes
    return found


def examine(foreign: Foreign, tokens: Array, kind: str) -> None:
    """Run a graph over tokens, in calls of other lengths, and with other tokens in the other lanes.

    Args:
        foreign: the graph.
        tokens: [B, K, *token], see `sample_tokens`.
        kind: what it is, for people.

    Raises:
        UnsupportedError: it does not run, answers other lengths differently, or mixes its lanes.
    """
    given = Given(foreign)
    whole = _tried(lambda: _run(given, foreign, tokens), kind, tokens.shape[1] if foreign.timed else 1)
    for size in (_LONG // 2, 1) if foreign.timed else ():
        parts = _tried(lambda size=size: _run(given, foreign, tokens, size), kind, size)  # type: ignore[misc]
        different = _first_difference(whole, parts)
        if different:
            raise UnsupportedError(
                f"{kind} answers {_LONG} tokens in one call differently than in calls of {size} ({different}): a "
                "length is built into it, or something is not carried as state. If it only ever takes a fixed number "
                "of tokens, export it with a static axis 1: then these are one token."
            )
    if len(tokens) > 1:
        others = _tried(lambda: _run(given, foreign, _other_lanes(tokens)), kind, tokens.shape[1])
        different = _first_difference(*(_lane(foreign, run, 0) for run in (whole, others)))
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


def _run(given: Given, foreign: Foreign, tokens: Array, size: int | None = None) -> tuple[Arrays, Arrays]:
    """Outputs [B, K, ...] over tokens from the initial state, in calls of `size`, and the states at the end."""
    states = {state.name: state.initial_lanes(len(tokens)) for state in foreign.states}
    parts: list[Arrays] = []
    for part in _parts(tokens, size or tokens.shape[1]) if foreign.timed else _parts(tokens, 1):
        answers, states = given.step(part, states)
        parts.append(answers if foreign.timed else {name: value[None] for name, value in answers.items()})
    axis = 1 if foreign.timed else 0
    return {name: np.concatenate([part[name] for part in parts], axis) for name in foreign.answers}, states


def _parts(tokens: Array, size: int) -> Iterator[Array]:
    for start in range(0, tokens.shape[1], size):
        yield np.ascontiguousarray(tokens[:, start : start + size])


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


def _tried(run: Callable[[], tuple[Arrays, Arrays]], kind: str, size: int) -> tuple[Arrays, Arrays]:
    try:
        return run()
    except UnsupportedError:
        raise
    except (NsmError, ValueError) as error:
        raise UnsupportedError(
            f"{kind} does not run with calls of {size} tokens: {error} Does the graph hold for other sizes than those "
            "that it was exported with?"
        ) from error
