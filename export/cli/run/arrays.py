"""`nsm run BUNDLE`: run sequences through a session and write the outputs to a file."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import IO, Any

import click
import numpy as np

from nsm.bundle import Bundle
from nsm.errors import InputError
from nsm.export.report import Terminal
from nsm.export.sources import read_sequences, sequence_axes
from nsm.files import check_output_file, replacing
from nsm.runtimes.opening import open_bundle
from nsm.runtimes.session import Session
from nsm.spec import VALID
from nsm.trace import Array

_OUTPUTS = "an .npz of outputs that nsm run wrote"


def run(
    path: Path,
    target: str | None,
    precision: str | None,
    data: Path | None,
    output: Path | None,
    force: bool,
    allow_failed: bool,
    as_json: bool,
) -> None:
    """Run sequences; see `nsm run --help`."""
    terminal = Terminal(quiet=as_json)
    if output is not None:
        if not output.parent.is_dir():
            raise InputError(f"The folder {output.parent} of --output does not exist. Create it first.")
        check_output_file(output, _OUTPUTS, _is_outputs, force)
    bundle = Bundle(path)
    with open_bundle(bundle, target, precision=precision, allow_failed=allow_failed) as session:
        sequences = _recorded(bundle) if data is None else read_sequences(data, axes=sequence_axes(session.spec))
        results: dict[str, Array] = {}
        summaries: list[dict[str, Any]] = []
        with terminal.stage(f"Running on {session.target}") as progress:
            for index, sequence in enumerate(sequences):
                outputs = _feed(session, sequence)
                for name, value in outputs.items():
                    results[f"{index}/{name}"] = value
                    summaries.append(
                        {"sequence": index, "tokens": len(value), "output": name, "last": int(value[-1].argmax())}
                    )
                progress(index + 1, len(sequences))
    if output is not None:
        check_output_file(output, _OUTPUTS, _is_outputs, force)
        with replacing(output) as file:
            np.savez(file, allow_pickle=False, **dict(results))
    if as_json:
        click.echo(json.dumps({"target": session.target, "output": output and str(output), "sequences": summaries}))
        return
    rows = [[str(s["sequence"]), f"{s['tokens']:,}", str(s["last"])] for s in summaries]
    terminal.table(("sequence", "tokens", "argmax of the last output"), rows)
    terminal.say(f"\nWrote {output}." if output else "\nGive --output FILE.npz to keep the outputs.")


def _is_outputs(file: IO[bytes]) -> bool:
    """Whether all arrays of an .npz have names that `run` writes, such as `0/outputs`."""
    try:
        with zipfile.ZipFile(file) as archive:
            return all(re.fullmatch(r"\d+/.+\.npy", name) for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def _feed(session: Session, sequence: Array) -> dict[str, Array]:
    """Run one sequence on lane 0 from a fresh state; the other lanes are idle."""
    spec = session.spec.entry("step").inputs[0]
    if sequence.shape[1:] != spec.shape[2:]:
        raise InputError(f"Expected sequences of shape {['T', *spec.shape[2:]]}; given {list(sequence.shape)}.")
    session.reset()
    tokens = np.zeros((session.batch, *sequence.shape), sequence.dtype)
    tokens[0] = sequence
    valid = np.zeros(session.batch, np.int64)
    valid[0] = len(sequence)
    return {name: value[0] for name, value in session.feed(tokens, valid).items()}


def _recorded(bundle: Bundle) -> list[Array]:
    """Return the sequences of the golden trace, [T, ...] each."""
    inputs = dict(bundle.trace().inputs)
    inputs.pop(VALID, None)
    (tokens,) = inputs.values()
    return [stream.reshape(-1, *stream.shape[2:]) for stream in tokens]
