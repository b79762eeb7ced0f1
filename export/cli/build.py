"""`nsm build BUNDLE`: add a target, built from the bundle's ONNX graphs. Does not need torch."""

from __future__ import annotations

import json
from pathlib import Path

import click

from nsm.bundle import Bundle
from nsm.decode import encode
from nsm.export.report import PARITY_COLUMNS, Terminal, low_precision_lines, parity_row
from nsm.export.verify import Limits, add_target
from nsm.runtimes import find_target


def build(
    path: Path, target: str, device: str | None, precision: str, limits: Limits, force: bool, as_json: bool
) -> None:
    """Build a target into a bundle; see `nsm build --help`."""
    terminal = Terminal(quiet=as_json)
    replaced = Bundle(path).holds(find_target(target).name, precision)
    with terminal.stage(f"Building {find_target(target).name}") as progress:
        artifact = add_target(path, target, device, progress, precision, limits, force)
    if as_json:
        click.echo(json.dumps({"bundle": str(path), "artifacts": [encode(artifact)], "replaced": replaced}))
        return
    terminal.table(PARITY_COLUMNS, [parity_row(artifact)])
    if artifact.parity.status == "not_run":
        terminal.say(f"\n{artifact.target}: NOT RUN. {artifact.parity.reason}", "yellow")
    for line in low_precision_lines(artifact):
        terminal.say(line)
    for note in artifact.notes:
        terminal.say(f"{note[0].upper()}{note[1:]}.")
    done = "Replaced in" if replaced else "Added to"
    option = "" if precision == "fp32" else f" --precision {precision}"
    terminal.say(f"\n{done} {path}. Next:\n  nsm parity {path} --target {artifact.target}{option}")
