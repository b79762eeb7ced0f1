"""`nsm score`: score a folder of long sequences in one or several processes; resumable."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from nsm.bundle import Bundle
from nsm.errors import InputError, MissingDependencyError, NsmError
from nsm.export.cli.run.score_log import ScoreLog
from nsm.export.report import Terminal
from nsm.export.sources import read_sequences, sequence_axes
from nsm.runtimes.generate import digest, score
from nsm.runtimes.opening import chosen_artifact, open_bundle, refuse_failed

SUFFIXES = (".npy", ".npz", ".txt")


@dataclass(frozen=True)
class Options:
    """The options with which each worker opens the bundle."""

    bundle: str
    target: str
    precision: str
    threads: int


@dataclass(frozen=True)
class Task:
    """One sequence: its file, and its index in the file."""

    folder: str
    file: str
    index: int
    sha256: str


class Scorer:
    """Scores tasks with its own session; each worker of Ray Data has one."""

    def __init__(self, options: Options) -> None:
        self._session = open_bundle(
            options.bundle, options.target, threads=options.threads, precision=options.precision
        )
        self._read: tuple[Path, list[np.ndarray]] = (Path(), [])

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        task = Task(**row)
        path = Path(task.folder) / task.file
        if self._read[0] != path:  # tasks are sorted by file, so caching one file is enough
            self._read = path, read_sequences(path, axes=sequence_axes(self._session.spec))
        line = {"file": task.file, "index": task.index, "sha256": task.sha256}
        try:
            return {"line": json.dumps({**line, **score(self._session, self._read[1][task.index])})}
        except NsmError as error:
            return {"line": json.dumps({**line, "error": str(error)})}


def score_folder(
    path: Path,
    folder: Path,
    output: Path,
    target: str | None,
    precision: str | None,
    workers: int,
    threads: int,
    force: bool,
    as_json: bool,
) -> None:
    """Score; see `nsm score --help`."""
    terminal = Terminal(quiet=as_json)
    if workers < 1 or threads < 1:
        raise InputError(f"--workers and --threads must be at least 1; given {workers} and {threads}.")
    bundle = Bundle(path)
    artifact = chosen_artifact(bundle, target, precision)
    refuse_failed(path, artifact)
    files = _files(folder, output)
    head = {"fingerprint": bundle.manifest.fingerprint, "target": artifact.target, "precision": artifact.precision}
    log = ScoreLog(output, head, force)
    options = Options(str(path.resolve()), artifact.target, artifact.precision, threads)
    try:
        with terminal.stage("Reading") as progress:
            tasks, bad = _tasks(folder, files, sequence_axes(bundle.manifest.spec), progress)
        pending = [task for task in tasks if (task.file, task.index, task.sha256) not in log.done]
        skipped = len(tasks) - len(pending)
        with terminal.stage(f"Scoring on {artifact.label}") as progress:
            for number, line in enumerate(_scored(pending, options, workers), 1):
                log.add(line)
                bad += [line] if "error" in line else []
                progress(skipped + number, len(tasks))
        _say(terminal, as_json, output, log, tasks, skipped, bad)
    finally:
        log.close()
    if bad:
        raise InputError(
            f"{len(bad)} of {len(tasks) + sum('sha256' not in line for line in bad)} could not be scored; the first is "
            f"{bad[0]['file']}: {bad[0]['error']} The scores of the others are in {output}. Fix the failed ones and "
            "run the same command again."
        )


def _files(folder: Path, output: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder. Expected a folder with {', '.join(SUFFIXES)} files.")
    found = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.resolve() != output.resolve()
    )
    if not found:
        raise InputError(f"{folder} has no {', '.join(SUFFIXES)} files.")
    return found


def _tasks(folder: Path, files: list[Path], axes: int, progress: Any) -> tuple[list[Task], list[dict[str, Any]]]:
    """Return a task per sequence, and an error line per file that cannot be read."""
    tasks: list[Task] = []
    bad: list[dict[str, Any]] = []
    for number, path in enumerate(files, 1):
        name = path.relative_to(folder).as_posix()
        try:
            sequences = read_sequences(path, axes=axes)
        except InputError as error:
            bad.append({"file": name, "error": str(error)})
        else:
            tasks += [Task(str(folder.resolve()), name, index, digest(s)) for index, s in enumerate(sequences)]
        progress(number, len(files))
    return tasks, bad


def _scored(tasks: list[Task], options: Options, workers: int) -> Iterator[dict[str, Any]]:
    """Yield the result line of each task when it is done."""
    rows = [vars(task) for task in tasks]
    if not rows:
        return
    found: Iterable[dict[str, Any]] = map(Scorer(options), rows) if workers == 1 else _with_ray(rows, options, workers)
    for row in found:
        yield json.loads(row["line"])


def _with_ray(rows: list[dict[str, Any]], options: Options, workers: int) -> Iterator[dict[str, Any]]:
    """Score with workers of Ray Data, on this machine or on the cluster of RAY_ADDRESS."""
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f'--workers needs {error.name}, which is not installed. Install it with: pip install "nsm-toolkit[ray]"'
        ) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if "RAY_ADDRESS" in os.environ:
        ray.init(**quiet)
    else:
        ray.init(num_cpus=workers * options.threads + 1, include_dashboard=False, **quiet)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        data = ray.data.from_items(rows, override_num_blocks=min(len(rows), 4 * workers))
        kind: Any = Scorer  # Ray's type hints do not allow classes with __call__
        scored = data.map(
            kind,
            fn_constructor_args=(options,),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=options.threads,
        )
        yield from scored.iter_rows()
    finally:
        ray.shutdown()


def _say(
    terminal: Terminal,
    as_json: bool,
    output: Path,
    log: ScoreLog,
    tasks: list[Task],
    skipped: int,
    bad: list[dict[str, Any]],
) -> None:
    lines = [log.done[task.file, task.index, task.sha256] for task in tasks]
    good = [line for line in lines if "error" not in line]
    tokens = sum(line["tokens"] for line in good)
    predicted = [line for line in good if "nats_per_token" in line]
    count = sum(line["tokens"] - 1 for line in predicted)
    nats = sum(line["nats_per_token"] * (line["tokens"] - 1) for line in predicted) / count if count else None
    if as_json:
        summary = {"sequences": len(good), "tokens": tokens, "skipped": skipped, "nats_per_token": nats}
        click.echo(json.dumps({"output": str(output), **summary, "failed": bad}))
        return
    text = "" if nats is None else f", {nats:.4f} nats per token (perplexity {np.exp(nats):.3f})"
    terminal.say(f"{len(good):,} sequences, {tokens:,} tokens{text}; {skipped:,} from an earlier run.")
    terminal.say(f"Wrote {output}, one line of JSON per sequence.")
