"""Classify the test digits with PyTorch and with every target of a bundle, and print one table.

python examples/report_digits.py digits.pt digits.nsm
"""

from __future__ import annotations

from pathlib import Path

import click
import digits
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import nsm
from nsm.bundle import Bundle
from nsm.errors import DeviceUnavailableError
from nsm.runtimes.bench import bench

STREAMS = 8


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--steps", default=500, show_default=True, help="Timed calls per target.")
def main(checkpoint: Path, bundle: Path, steps: int) -> None:
    """Compare CHECKPOINT in PyTorch with the targets of BUNDLE on the test digits, chained into 8 streams."""
    _, test = digits.load()
    ids, labels = digits.streams(test, STREAMS)
    reference = digits.classify(nsm.load(checkpoint), ids)
    console = Console(width=120)
    table = Table(
        title=f"{labels.size} test digits in {STREAMS} streams of {ids.shape[1] // digits.CHUNK} steps", box=None
    )
    for column in ("target", "size", "one-step", "free-run", "argmax", "accuracy", "agreement", "us/step"):
        table.add_column(column, justify="left" if column == "target" else "right", no_wrap=True)
    table.add_row("pytorch", "", "", "", "", f"{(reference == labels).mean():.2%}", "", "")
    opened = Bundle(bundle)
    sessions, rows = [], []
    for artifact in opened.manifest.artifacts:
        size, parity = f"{artifact.nbytes / 1e6:.2f} MB", artifact.parity
        try:
            session = nsm.open(bundle, artifact.target, precision=artifact.precision)
        except DeviceUnavailableError:
            rows.append([artifact.target, size, "built, not run: no GPU here"])
            continue
        found = np.concatenate([predict(session, stream) for stream in track(ids, f"classifying on {artifact.target}")])
        errors = ["-" if error is None else f"{error.p99:.1e}" for error in (parity.one_step, parity.free_run)]
        scores = [
            f"{parity.argmax_agreement or 0:.2%}",
            f"{(found == labels).mean():.2%}",
            f"{(found == reference).mean():.2%}",
        ]
        rows.append([artifact.target, size, *errors, *scores])
        sessions.append(session)
    calls = ids[0].reshape(-1, 1, digits.CHUNK)
    for session, latency in zip(sessions, bench(sessions, steps, calls), strict=True):
        next(row for row in rows if row[0] == session.target).append(f"{latency.p50_us:.0f}")
        session.close()
    for row in rows:
        table.add_row(*row)
    console.print(table)


def predict(session: nsm.Session, stream: np.ndarray) -> np.ndarray:
    """Classify one stream from a fresh state; return [1, n]."""
    session.reset()
    return digits.predictions(session.run(stream)["outputs"][None])


if __name__ == "__main__":
    main()
