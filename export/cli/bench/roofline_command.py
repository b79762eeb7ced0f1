"""`nsm roofline BUNDLE`: compare a step with the roofline of this machine."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import click

from nsm.bundle import GRAPHS, Bundle, graph_file
from nsm.errors import MissingDependencyError
from nsm.export.report import Terminal
from nsm.runtimes import find_target
from nsm.runtimes.opening import chosen_artifact, chosen_threads, open_artifact, refuse_failed


def roofline(path: Path, target: str | None, precision: str | None, threads: int | None, as_json: bool) -> None:
    """Compare with the roofline; see `nsm roofline --help`."""
    if importlib.util.find_spec("onnx") is None:
        raise MissingDependencyError(
            "The roofline is computed from the bundle's graphs, which needs the package onnx; it is not installed. "
            'Install it with: pip install "nsm-toolkit[quantize]"'
        )
    from nsm.export.analysis import calls_of, measure_reached, products
    from nsm.export.graphs import work_of

    terminal = Terminal(quiet=as_json)
    bundle = Bundle(path)
    bundle.verify()
    artifact = chosen_artifact(bundle, target, precision)
    refuse_failed(path, artifact)
    threads = chosen_threads(threads, bundle.manifest.work)
    with (
        products(find_target(artifact.target), threads) as machine,
        open_artifact(bundle, artifact, threads=threads) as session,
        terminal.stage("Measuring in turns") as progress,
    ):
        calls = calls_of(session)
        work = {entry: work_of(bundle.locate(f"{GRAPHS}/{graph_file(entry)}")) for entry in calls}
        reached = measure_reached(work, calls, machine, session.reset, progress=progress)
    results = [
        {
            "entry": entry,
            "gflop": work[entry].flops / 1e9,
            "mb": work[entry].nbytes / 1e6,
            "roofline_us": item.least * 1e6,
            "measured_us": item.took * 1e6,
            "share": item.share,
            "share_quartiles": [item.low, item.high],
        }
        for entry, item in reached.items()
    ]
    here = next(iter(reached.values())).machine
    facts = {"gflop_per_second": here.flops_per_second / 1e9, "gb_per_second": here.bytes_per_second / 1e9}
    if as_json:
        click.echo(
            json.dumps(
                {"target": artifact.target, "precision": artifact.precision, "machine": facts, "results": results}
            )
        )
        return
    terminal.say(
        f"\n{artifact.label} on this machine: {facts['gflop_per_second']:.0f} GFLOP/s on a large MatMul, "
        f"{facts['gb_per_second']:.0f} GB/s reading a large matrix.\n"
    )
    rows = [
        [
            entry,
            f"{work[entry].flops / 1e9:.3f}",
            f"{work[entry].nbytes / 1e6:.1f}",
            f"{item.least * 1e6:.0f}",
            f"{item.took * 1e6:.0f}",
            f"{item.share:.0%}",
            f"{item.low:.0%}-{item.high:.0%}",
        ]
        for entry, item in reached.items()
    ]
    terminal.table(("entry", "GFLOP", "MB", "roofline us", "measured us", "reached", "quartiles"), rows)
