"""Score long sequences with a session, in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from nsm.errors import InputError
from nsm.runtimes.session import Session, usable_tokens
from nsm.trace import Array

PIECE = 4096
"""Approximate number of tokens per call of `feed`."""

_SHOWN = 64
"""Maximum number of output values for which the score includes means."""


def predicts(session: Session) -> bool:
    """Return whether the model outputs logits of the next id for every id."""
    entry = session.spec.entry("step")
    tokens, outputs = entry.inputs[0], entry.outputs[0]
    return tokens.maximum is not None and outputs.shape[2:] == (tokens.maximum + 1,)


def score(session: Session, sequence: Array) -> dict[str, Any]:
    """Score one sequence [T, *token] from the initial state, on the first lane.

    Returns:
        `tokens`; where the model predicts the next id, `nats_per_token` over the T - 1 predictions and `perplexity`;
        else `last_argmax`, and `means` of the main output where it has few numbers.

    Raises:
        InputError: the sequence is invalid for the model or too short; the session has not run any of it.
        NonFiniteError: an output or a state became NaN or infinite.
    """
    predicting = predicts(session)
    if predicting and len(sequence) < 2:
        raise InputError(f"A prediction takes at least two tokens; the sequence has {len(sequence)}.")
    sequence = _checked(session, sequence)
    total, sums, last = 0.0, None, None
    for start, outputs in _answers(session, sequence):
        if predicting:
            wanted = sequence[start + 1 : start + 1 + len(outputs)]
            total += _surprise(outputs[: len(wanted)].astype(np.float64), wanted)
        else:
            flat = outputs.reshape(len(outputs), -1).astype(np.float64)
            sums = flat.sum(0) if sums is None else sums + flat.sum(0)
            last = flat[-1]
    if predicting:
        nats = total / (len(sequence) - 1)
        return {"tokens": len(sequence), "nats_per_token": nats, "perplexity": float(np.exp(nats))}
    assert sums is not None
    assert last is not None
    means = {"means": (sums / len(sequence)).tolist()} if sums.size <= _SHOWN else {}
    return {"tokens": len(sequence), "last_argmax": int(last.argmax()), **means}


def digest(sequence: Array) -> str:
    """SHA-256 over dtype, shape and content."""
    whole = np.ascontiguousarray(sequence)
    return hashlib.sha256(f"{whole.dtype} {whole.shape}".encode() + whole.tobytes()).hexdigest()


def _checked(session: Session, sequence: Array) -> Array:
    """The whole sequence as the model takes it: a piece is scored on the first token of the next one."""
    spec = session.spec.entry("step").inputs[0]
    if sequence.shape[1:] != spec.shape[2:] or not len(sequence):
        raise InputError(f"The model takes sequences of shape {['T', *spec.shape[2:]]}; given {list(sequence.shape)}.")
    whole: Array = usable_tokens(spec, sequence[None], np.array([len(sequence)])).tokens[0]
    return whole


def _answers(session: Session, sequence: Array) -> Iterator[tuple[int, Array]]:
    """(place of the first token, main output [n, ...]) of one piece after the other."""
    chunk = session.spec.entry("step").inputs[0].shape[1]
    name = session.spec.entry("step").outputs[0].name
    piece = max(PIECE // chunk, 1) * chunk
    session.reset()
    for start in range(0, len(sequence), piece):
        part = sequence[start : start + piece]
        tokens = np.zeros((session.batch, *part.shape), part.dtype)
        tokens[0] = part
        counts = np.zeros(session.batch, np.int64)
        counts[0] = len(part)
        yield start, session.feed(tokens, counts)[name][0]


def _surprise(logits: Array, wanted: Array) -> float:
    """Sum of -log softmax(logits)[wanted], in nats."""
    if not len(wanted):
        return 0.0
    shifted = logits - logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(shifted, wanted[:, None], -1)[:, 0]
    return float((np.log(np.exp(shifted).sum(-1)) - chosen).sum())
