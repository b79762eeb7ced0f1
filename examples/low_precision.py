"""Measure the effect of low precision on a model's task (accuracy, perplexity or recall), and its drift.

    python examples/low_precision.py digits digits.pt
    python examples/low_precision.py text text.pt --data shakespeare.txt
    python examples/low_precision.py recall tests/data/recall.pt
    python examples/low_precision.py digits digits.pt --steps 4096 --only openvino     (the drift over a long stream)

Each precision goes through the normal export, with calibration and acceptance check. The calibration data and the
evaluation data are disjoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import digits
import numpy as np
import text
import train_recall
from rich.console import Console
from rich.progress import track
from rich.table import Table

import nsm
from nsm.bundle import Bundle
from nsm.errors import NsmError
from nsm.export import ExportOptions, export
from nsm.files import check_output_file, json_with, write_json
from nsm.runtimes.session import Session
from nsm.staging import FAILED_SUFFIX

LANES = 8
CASES = tuple(
    (target, precision)
    for target, precisions in (
        ("openvino", ("fp32", "fp16", "bf16", "int8", "int8-weights")),
        ("onnxruntime", ("fp32", "int8", "int8-weights")),
    )
    for precision in precisions
)

Measure = Callable[[Session], float]


@dataclass(frozen=True)
class Row:
    """Results of one precision on one target. Without an artifact, values are None, and `status` has the reason.

    `argmax_changes` are the numbers of unexcused and excused changes.
    """

    target: str
    precision: str
    status: str
    score: float | None = None
    drift_mean: float | None = None
    argmax: float | None = None
    argmax_changes: tuple[int, int] | None = None
    exponent: float | None = None
    interval: tuple[float, float] | None = None
    speed: float | None = None
    decode_speed: float | None = None
    megabytes: float | None = None


def accuracy(_: Path | None) -> Measure:
    """Return a measure of the accuracy on the test digits, chained into eight streams."""
    ids, labels = digits.streams(digits.load()[1], LANES)

    def measure(session: Session) -> float:
        return float((digits.predictions(session.feed(ids)["outputs"]) == labels).mean())

    return measure


def perplexity(data: Path | None) -> Measure:
    """Return a measure of the perplexity on held-out text, eight streams of 4096 bytes."""
    _, held_out = text.corpus(data)
    ids, wanted = text.batch(held_out, LANES, 4096, np.random.default_rng(7))

    def measure(session: Session) -> float:
        logits = session.feed(ids)["outputs"].astype(np.float64)
        shifted = logits - logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(shifted, wanted[..., None], -1)[..., 0] - np.log(np.exp(shifted).sum(-1))
        return float(np.exp(-chosen.mean()))

    return measure


def recall(_: Path | None) -> Measure:
    """Return a measure of the recall on 512 new streams with four pairs each."""
    ids, wanted = train_recall.batch(512, np.random.default_rng(123))

    def measure(session: Session) -> float:
        found = []
        for part in np.split(ids, len(ids) // LANES):
            session.reset()
            found.append(session.feed(part)["outputs"])
        return train_recall.accuracy(np.concatenate(found), wanted)

    return measure


# Measure, its name, and the goal: the largest acceptable change, absolute, or relative for perplexity.
TASKS: dict[str, tuple[Callable[[Path | None], Measure], str, float]] = {
    "digits": (accuracy, "accuracy", 0.003),
    "text": (perplexity, "perplexity", 0.005),
    "recall": (recall, "recall", 0.005),
}


def row_of(model: Path, target: str, precision: str, steps: int, measure: Measure, folder: Path) -> Row:
    """Export one precision, and measure it."""
    output = folder / f"{target}-{precision}.nsm"
    options = ExportOptions(
        [target], precision, output, batch=LANES, golden_steps=steps, allow_slower=True, num_samples=LANES
    )
    try:
        bundle, status = export(model, options), "ok"
    except NsmError as error:
        kept = output.with_name(output.name + FAILED_SUFFIX)
        if not kept.is_dir():
            return Row(target, precision, str(error).split(". ")[0])
        bundle, status = Bundle(kept), "over budget"
    artifact = bundle.artifact(target)
    if artifact.parity.status == "not_run":
        return Row(target, precision, str(artifact.parity.reason).split(", so ")[0])
    report = next(item for item in bundle.json("parity.json")["results"] if item["target"] == target)
    speed = {} if artifact.quantization is None else artifact.quantization.speed
    # Measure artifacts over budget too: their score shows the cost of low precision.
    with nsm.open(bundle, target, allow_failed=True) as session:
        score = measure(session)
    low, high = report["drift_interval"] or (None, None)
    return Row(
        target,
        precision,
        status,
        score,
        report["free_run_mean"],
        report["argmax_agreement"],
        (report["unexcused_argmax_changes"], report["excused_argmax_changes"]),
        report["drift_exponent"],
        None if low is None or high is None else (low, high),
        speed["step"].median if "step" in speed else None,
        speed["decode"].median if "decode" in speed else None,
        artifact.nbytes / 1e6,
    )


def show(task: str, steps: int, rows: list[Row]) -> None:
    """Print the table, with the change of each precision relative to the same target's fp32."""
    _, name, goal = TASKS[task]
    console = Console(width=210)
    table = Table(
        title=f"{task}: {LANES} streams, golden streams of {steps} calls; goal: {name} within {goal:.1%}",
        box=None,
    )
    heads = (
        "target",
        "precision",
        "size",
        name,
        "change",
        "mean error",
        "argmax",
        "argmax changes",
        "drift exponent",
        "step",
        "decode",
        "status",
    )
    for head in heads:
        table.add_column(head, justify="left" if head in ("target", "precision", "status") else "right", no_wrap=True)
    base = {row.target: row.score for row in rows if row.precision == "fp32"}
    for row in rows:
        exact = base.get(row.target)
        if (
            row.score is None
            or row.drift_mean is None
            or row.argmax is None
            or row.argmax_changes is None
            or exact is None
        ):
            table.add_row(row.target, row.precision, *["-"] * 9, row.status)
            continue
        change = row.score / exact - 1 if task == "text" else row.score - exact
        spread = "-" if row.interval is None else f"{row.exponent:.2f} ({row.interval[0]:.2f} to {row.interval[1]:.2f})"
        table.add_row(
            row.target,
            row.precision,
            f"{row.megabytes:.2f} MB",
            f"{row.score:.4f}",
            f"{change:+.2%}",
            f"{row.drift_mean:.1e}",
            f"{row.argmax:.2%}",
            f"{row.argmax_changes[0]} + {row.argmax_changes[1]} excused",
            spread,
            "-" if row.speed is None else f"{row.speed:.2f}x",
            "-" if row.decode_speed is None else f"{row.decode_speed:.2f}x",
            row.status,
        )
    console.print(table)


@click.command()
@click.argument("task", type=click.Choice(list(TASKS)))
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--data", type=click.Path(exists=True, path_type=Path), help="For the task text: the text file used in training."
)
@click.option("--steps", default=200, show_default=True, help="Calls per golden stream.")
@click.option("--only", help="Only this target.")
@click.option("--precision", "asked", multiple=True, help="Precision besides fp32; repeatable.  [default: all]")
@click.option("--output", type=click.Path(path_type=Path), help="Also write the rows to this .json.")
def main(
    task: str,
    model: Path,
    data: Path | None,
    steps: int,
    only: str | None,
    asked: tuple[str, ...],
    output: Path | None,
) -> None:
    """Export MODEL in every precision, measure TASK, and print a table."""
    if output is not None:
        check_output_file(output, "a table of this script", json_with("task", "steps", "rows"))
    measure = TASKS[task][0](data)
    cases = [case for case in CASES if only in (None, case[0]) and (not asked or case[1] in ("fp32", *asked))]
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row_of(model, target, precision, steps, measure, Path(folder))
            for target, precision in track(cases, "exporting", console=Console(stderr=True))
        ]
    show(task, steps, rows)
    if output is not None:
        write_json(output, {"task": task, "steps": steps, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
