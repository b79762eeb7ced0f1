"""`nsm bench BUNDLE --overhead`: the time that a session adds to a call of the backend."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from nsm.bundle import Bundle
from nsm.errors import DeviceUnavailableError, InputError, MissingDependencyError, ParityError, UnsupportedError
from nsm.export.cli.bench.bundle import check_options, lane_tokens
from nsm.export.report import Terminal
from nsm.runtimes import find_target
from nsm.runtimes.bench import CALLS, OVERHEAD_ROUNDS, ROUNDS, overhead
from nsm.runtimes.opening import open_artifact, refuse_failed

COLUMNS = ("target", "precision", "session us", "bare us", "wrapper us", "95 %")


def measure_overhead(
    path: Path,
    targets: Sequence[str],
    precisions: Sequence[str],
    steps: int | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure; see `nsm bench --help`. `steps` of None means `OVERHEAD_ROUNDS` rounds."""
    steps = OVERHEAD_ROUNDS * CALLS if steps is None else steps
    if steps < ROUNDS * CALLS:
        raise InputError(
            f"--overhead needs at least {ROUNDS} rounds of {CALLS} calls; given --steps {steps}. Give --steps "
            f"{ROUNDS * CALLS} or more; the default is {OVERHEAD_ROUNDS * CALLS}."
        )
    check_options(steps, threads)
    rounds = -(-steps // CALLS)
    terminal = Terminal(quiet=as_json)
    bundle = Bundle(path)
    bundle.verify()
    tokens = lane_tokens(bundle)
    found = []
    failed: ParityError | None = None
    for artifact in bundle.artifacts([find_target(name).name for name in targets], precisions):
        try:
            refuse_failed(path, artifact)
            with (
                open_artifact(bundle, artifact, threads=threads) as session,
                terminal.stage(f"Measuring {artifact.label} in turns") as progress,
            ):
                found.append((artifact, overhead(session, session.runtime, tokens, rounds, progress)))
        except (DeviceUnavailableError, MissingDependencyError, ParityError, UnsupportedError) as error:
            if targets:
                raise
            failed = error if isinstance(error, ParityError) else failed
            terminal.remark(f"{artifact.label}: not measured. {error}")
    if not found:
        raise failed or UnsupportedError("None of the bundle's targets can be measured on this machine.")
    if as_json:
        taken = {"steps": rounds * CALLS}
        rows = [{"target": a.target, "precision": a.precision, **taken, **asdict(item)} for a, item in found]
        click.echo(json.dumps({"threads": threads, "results": rows}))
        return
    lines = [
        [
            artifact.target,
            artifact.precision,
            f"{item.step_us:.0f}",
            f"{item.bare_us:.0f}",
            f"{item.median:.1f}",
            f"{item.low:.1f}-{item.high:.1f}",
        ]
        for artifact, item in found
    ]
    terminal.table(COLUMNS, lines, f"A call of step, {rounds} rounds of {CALLS} calls of each in turn")
    terminal.say(
        "\nsession: a call of the session, which checks and copies inputs, runs the graph and checks that outputs are "
        "finite;\nbare: the graph alone, with buffers bound once;\nwrapper: session minus bare, median over rounds and "
        "its 95 % interval."
    )
