"""`nsm run --prompt`: a byte-level model goes on with a text, token by token."""

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
    """Write the text that follows a prompt, as it comes; see `nsm run --help`."""
    if tokens < 1:
        raise InputError(f"--tokens is at least 1; given {tokens}.")
    if not prompt:
        raise InputError("--prompt is empty: give the model at least one character to begin with.")
    # An argument that is no UTF-8 comes with its odd bytes as surrogates.
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
                # Text goes out as it is made: that is its own display of progress.
                click.echo(decoder.decode(bytes([token])), nl=False)
        took = time.perf_counter() - start
        if as_json:
            text = made.decode("utf-8", "replace")
            facts = {"target": session.target, "prompt": prompt, "text": text, "tokens": tokens}
            click.echo(json.dumps({**facts, "tokens_per_second": tokens / took}))
            return
        click.echo(decoder.decode(b"", final=True))
        terminal.say(f"\n{len(given)} bytes read, {tokens} made on {session.target}: {tokens / took:,.0f} a second.")


def _single(session: Session) -> EntrySpec:
    """The entry that takes single tokens: `decode`, or `step` where a call of it has one token."""
    entry = session.spec.entry("decode" if session.spec.has("decode") else "step")
    if entry.tokens != 1:
        raise UnsupportedError(
            f"There is no entry `decode` for {session.target}, so the model cannot go on by itself there: it is not "
            "causal, or the target runs whole chunks only."
        )
    return entry


def _check_bytes(entry: EntrySpec) -> None:
    takes, gives = entry.inputs[0], entry.outputs[0]
    if takes.maximum != BYTES - 1 or gives.shape[2:] != (BYTES,):
        raise UnsupportedError(
            f"--prompt needs a model over bytes: {BYTES} ids in and {BYTES} logits out. This one takes "
            f"{'vectors' if takes.maximum is None else f'{takes.maximum + 1} ids'} and gives outputs of shape "
            f"{list(gives.shape[2:])} a token. Feed it sequences with --data."
        )


def _prefill(session: Session, entry: EntrySpec, ids: Array) -> Array:
    """Logits after the ids, on lane 0."""
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
    """[B], so many tokens on lane 0 alone; None where lanes cannot rest, which all have the same text then."""
    if session.batch == 1 or entry.input(VALID) is None:
        return None
    return np.where(np.arange(session.batch) == 0, count, 0)
