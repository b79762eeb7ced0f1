"""`nsm inspect BUNDLE`: show the contents of a bundle after verifying its files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from nsm.bundle import Bundle
from nsm.export.report import PARITY_COLUMNS, Terminal, lanes_of, low_precision_lines, parity_row, size, stream_lines
from nsm.runtimes import find_target


def inspect(path: Path, targets: Sequence[str], precisions: Sequence[str], as_json: bool) -> None:
    """Describe a bundle; see `nsm inspect --help`."""
    bundle = Bundle(path)
    bundle.verify()
    manifest = bundle.manifest
    if targets or precisions:
        shown = bundle.artifacts([find_target(name).name for name in targets], precisions)
        manifest = replace(manifest, artifacts=tuple(shown))
    if as_json:
        click.echo(json.dumps({"bundle": str(path), "verified": True, **manifest.to_json()}))
        return
    terminal, spec = Terminal(), manifest.spec
    terminal.say(
        f"{path}: {manifest.model['class']}, {manifest.model['parameters']:,} parameters, fingerprint "
        f"{manifest.fingerprint[:12]}; {lanes_of(spec.batch)}, chunk of {spec.chunk_size} tokens; all files verified"
    )
    terminal.say(f"created {manifest.created} by: {manifest.command}")
    terminal.say("with " + ", ".join(f"{name} {version}" for name, version in manifest.versions.items()) + "\n")
    for entry in spec.entries:
        tensors = [("input", item) for item in entry.inputs] + [("output", item) for item in entry.outputs]
        rows = [[kind, item.name, item.dtype, str(list(item.shape)), _range(item)] for kind, item in tensors]
        work = manifest.work.get(entry.name)
        cost = "" if work is None else f": {work.flops / 1e6:,.1f} MFLOP, {size(work.nbytes)} read and written per call"
        terminal.table(("", "name", "dtype", "shape", "values"), rows, f"Entry {entry.name}{cost}")
    states = [
        [
            s.name,
            s.dtype,
            str(list(s.shape)),
            s.init,
            ", ".join(e.name for e in spec.entries if s.name in e.writes) or "-",
        ]
        for s in spec.states
    ]
    title = f"\nStates, {size(spec.state_nbytes)} in all"
    terminal.table(("name", "dtype", "shape", "initial value", "written by"), states, title)
    if manifest.examination:
        lines = [[item.name, item.status, item.detail] for item in manifest.examination]
        terminal.table(("experiment", "", "result, or reason for skipping"), lines, "\nExamination")
    rows = [parity_row(artifact) for artifact in manifest.artifacts]
    terminal.table(PARITY_COLUMNS, rows, "\nArtifacts")
    for artifact in manifest.artifacts:
        for note in artifact.notes:
            terminal.say(f"{artifact.label}: {note}")
        for line in low_precision_lines(artifact):
            terminal.say(line)
    for line in stream_lines(manifest):
        terminal.say(line)
    for failed in manifest.failed:
        terminal.say(f"{failed.target}: not in the bundle. {failed.reason}")


def _range(item: Any) -> str:
    return "" if item.minimum is None else f"{item.minimum} .. {item.maximum}"
