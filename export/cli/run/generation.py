"""`nsm run --prompt`: generate text with a byte-level model, token by token."""

from __future__ import annotations

import codecs
import json
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np

from nsm.errors import InputError, UnsupportedError
from nsm.export.report import Terminal
from nsm.runtimes.generate import Sampler
from nsm.runtimes.opening import open_bundle
from nsm.runtimes.session import Session
from nsm.spec import VALID, EntrySpec
from nsm.trace import Array

BYTES = 256


def generate(
    path: Path,
    target: str | None,
    precision: str | None,
    allow_failed: bool,
    prompt: str,
    tokens: int,
    sampler: Sampler,
    as_json: bool,
) -> None:
    """Generate text after a prompt, and print it while it is generated; see `nsm run --help`."""
    if tokens < 1:
        raise InputError(f"--tokens must be at least 1; given {tokens}.")
    if not prompt:
        raise InputError("--prompt is empty. Give at least one character.")
    # Python decodes invalid UTF-8 in an argument to surrogates; this restores the bytes.
    read = prompt.encode(errors="surrogateescape")
    prompt = read.decode(errors="replace")
    terminal = Terminal(quiet=as_json)
    with open_bundle(path, target, precision=precision, allow_failed=allow_failed) as session:
        given = np.frombuffer(read, np.uint8).astype(np.int64)
        entry = _single(session)
        _check_bytes(entry)
        logits = _prefill(session, entry, given)
        start, made = time.perf_counter(), bytearray()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        if not as_json:
            click.echo(prompt, nl=False)
        for token in _continue(session, entry, logits, tokens, sampler):
            made.append(token)
            if not as_json:
                # Printing each token also shows the progress.
                click.echo(decoder.decode(bytes([token])), nl=False)
        took = time.perf_counter() - start
        if as_json:
            text = made.decode("utf-8", "replace")
            facts = {"target": session.target, "prompt": prompt, "text": text, "tokens": tokens}
            click.echo(json.dumps({**facts, "tokens_per_second": tokens / took}))
            return
        click.echo(decoder.decode(b"", final=True))
        terminal.say(
            f"\n{len(given)} bytes read, {tokens} generated on {session.target}: {tokens / took:,.0f} per second."
        )


def _single(session: Session) -> EntrySpec:
    """Return the entry that takes single tokens: `decode`, or `step` if a call has one token."""
    entry = session.spec.entry("decode" if session.spec.has("decode") else "step")
    if entry.tokens != 1:
        raise UnsupportedError(
            f"{session.target} has no entry `decode`, which generating text needs: the model is not causal, or the "
            "target runs whole chunks only."
        )
    return entry


def _check_bytes(entry: EntrySpec) -> None:
    takes, gives = entry.inputs[0], entry.outputs[0]
    if takes.maximum != BYTES - 1 or gives.shape[2:] != (BYTES,):
        raise UnsupportedError(
            f"--prompt needs a model over bytes: {BYTES} ids in and {BYTES} logits out. This model takes "
            f"{'vectors' if takes.maximum is None else f'{takes.maximum + 1} ids'} and returns outputs of shape "
            f"{list(gives.shape[2:])} per token. Run it on sequences with --data."
        )


def _prefill(session: Session, entry: EntrySpec, ids: Array) -> Array:
    """Feed the ids to lane 0, and return the logits after the last id."""
    outputs = session.feed(np.tile(ids, (session.batch, 1)), _counts(session, entry, len(ids)))
    logits: Array = next(iter(outputs.values()))[0, -1]
    return logits


def _continue(session: Session, entry: EntrySpec, logits: Array, count: int, sampler: Sampler) -> Iterator[int]:
    call = session.decode if entry.name == "decode" else session.step
    tokens = np.zeros((session.batch, 1), np.int64)
    valid = _counts(session, entry, 1)
    for made in range(count):
        if made:
            logits = next(iter(call(tokens, valid).values()))[0, 0]
        tokens[:] = sampler(logits)
        yield int(tokens[0, 0])


def _counts(session: Session, entry: EntrySpec, count: int) -> Array | None:
    """Return the valid tokens of each lane, [B]: `count` on lane 0, else 0.

    Returns None for a single lane, and if lanes cannot idle: all lanes then get the same text.
    """
    if session.batch == 1 or entry.input(VALID) is None:
        return None
    return np.where(np.arange(session.batch) == 0, count, 0)
