"""`nsm bench --all MODEL`: build and measure every target and precision of a model, in one table."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click

from nsm.bundle import Bundle
from nsm.decode import encode
from nsm.errors import InputError, NsmError, UnsupportedError
from nsm.export import pipeline
from nsm.export.analysis import examine
from nsm.export.cli.bench.bundle import (
    Entrant,
    Measured,
    check_options,
    compared,
    decode_us,
    explain,
    heading,
    lane_tokens,
    open_entrant,
    speed,
)
from nsm.export.options import ExportOptions
from nsm.export.report import Terminal, number, size
from nsm.export.verify import PRECISIONS, check_precision
from nsm.manifest import Artifact
from nsm.runtimes import TARGETS, Progress, find_target
from nsm.runtimes.bench import bench, not_faster
from nsm.staging import FAILED_SUFFIX

COLUMNS = (
    "target",
    "precision",
    "effective",
    "size",
    "p50 us",
    "speed",
    "decode us",
    "logit error",
    "argmax",
    "status",
)

# Longest reason that the table shows, in characters; the JSON has the full text.
_REASON = 90

NOT_FASTER = "not faster than fp32"

# Keys of the JSON that are null if nothing was measured.
_MEASURED = (
    "steps",
    "batch",
    "tokens_per_call",
    "latency_us",
    "tokens_per_second",
    "decode_us",
    "ratio",
    "decode_ratio",
    "state_bytes",
    "threads",
    "peak_rss_mb",
)

# Exit code of a failure -> status.
_STATUS: Mapping[int, str] = MappingProxyType(
    {2: "refused", 3: "not supported", 4: "build failed", 5: "parity failed", 7: NOT_FASTER}
)


@dataclass(frozen=True)
class Combination:
    """One line of the table.

    Args:
        target, precision: as requested.
        status: `ok`, `not faster than fp32` (see `nsm.runtimes.bench.rounds.not_faster`), or why it was not measured.
        reason: the error message; None without an error.
        bundle: the built bundle, None if the build failed.
        artifact: the artifact in the bundle, or in the bundle that a failed export kept.
        measured: the measurement; None if it was not measured.
    """

    target: str
    precision: str
    status: str
    reason: str | None = None
    bundle: Bundle | None = None
    artifact: Artifact | None = None
    measured: Measured | None = None

    def to_json(self, steps: int) -> dict[str, Any]:
        """Return the keys of `Measured.to_json`, plus status, reason and parity; unknown values are null."""
        known: dict[str, Any] = {} if self.measured is None else self.measured.to_json(steps)
        artifact = self.artifact
        return {
            **dict.fromkeys(_MEASURED),
            **known,
            "target": self.target,
            "precision": self.precision,
            "effective_precision": None if artifact is None else artifact.effective_precision,
            "artifact_mb": None if artifact is None else artifact.nbytes / 1e6,
            "parity": None if artifact is None else encode(artifact.parity),
            "status": self.status,
            "reason": self.reason,
        }

    def row(self) -> list[str]:
        """Return the cells of `COLUMNS`."""
        artifact, found = self.artifact, self.measured
        parity = None if artifact is None else artifact.parity
        error = None if parity is None else parity.free_run
        agreement = None if parity is None else parity.argmax_agreement
        reason = "" if self.reason is None else f": {_first_sentence(self.reason)}"
        return [
            self.target,
            self.precision,
            "-" if artifact is None else artifact.effective_precision,
            "-" if artifact is None else size(artifact.nbytes),
            "-" if found is None else f"{found.latency.p50_us:.0f}",
            "-" if found is None else "1.00x" if self.precision == "fp32" else speed(found.ratio),
            "-" if found is None else decode_us(found.latency),
            number(None if error is None else error.p99),
            "-" if agreement is None else f"{agreement:.2%}",
            self.status + reason,
        ]


def bench_all(
    model: Path,
    targets: Sequence[str],
    precisions: Sequence[str],
    steps: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Build and measure; see `nsm bench --help`."""
    check_options(steps, threads)
    for precision in precisions:
        check_precision(precision)
    if model.is_dir():
        raise InputError(
            f"--all takes a checkpoint, a .pt written by nsm.save; {model} is a folder. For a bundle: nsm bench {model}"
        )
    terminal = Terminal(quiet=as_json)
    if not pipeline.open_source(model, ExportOptions(())).golden:
        terminal.remark(
            "The model has no sequences, so errors are measured on random tokens (synthetic). "
            "Give real sequences with nsm.save(model, path, samples=...).",
            "yellow",
        )
    names = [find_target(name).name for name in targets] or _targets_here(terminal)
    with ExitStack() as stack:  # closes the sessions before it deletes their files
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nsm-bench-")))
        found = []
        for target in dict.fromkeys(names):
            for precision in [item for item in PRECISIONS if item in (precisions or PRECISIONS)]:
                with terminal.stage(f"Building {target} {precision}") as progress:
                    found.append(_built(model, target, precision, folder, progress))
        found = _measured(found, steps, threads, terminal, stack)
    if as_json:
        rows = [item.to_json(steps) for item in found]
        click.echo(json.dumps({"model": str(model), "threads": threads, "results": rows}))
    else:
        _show(terminal, model, found, steps)
    if all(item.measured is None for item in found):
        raise UnsupportedError("No combination could be measured on this machine; the status column says why.")


class _Within:
    """Shows all stages of an export in one progress bar."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def stage(self, name: str) -> AbstractContextManager[Progress]:  # noqa: ARG002
        return nullcontext(self._progress)


def _targets_here(terminal: Terminal) -> list[str]:
    """Return the targets that this machine can run, and print a remark on the others."""
    gpu = any(item.name == "NVIDIA GPU" and item.found for item in examine())
    here = []
    for target in TARGETS.values():
        if target.asked_only:
            continue
        if target.installed() is None:
            terminal.remark(
                f'{target.name}: skipped, not installed. Install it with: pip install "nsm-toolkit[{target.extra}]"'
            )
        elif "cpu" not in target.devices and not gpu:
            terminal.remark(f"{target.name}: skipped, this machine has no NVIDIA GPU.")
        else:
            here.append(target.name)
    return here


def _built(model: Path, target: str, precision: str, folder: Path, progress: Progress) -> Combination:
    """Export one combination to its own bundle; on failure, return the reason."""
    output = folder / f"{target}-{precision}.nsm"
    options = ExportOptions([target], precision=precision, output=output, allow_slower=True)
    try:
        bundle = pipeline.export(model, options, _Within(progress))
    except NsmError as error:
        kept = output.with_name(output.name + FAILED_SUFFIX)
        artifact = Bundle(kept).artifact(target) if kept.is_dir() else None
        return Combination(target, precision, _STATUS.get(error.exit_code, "failed"), str(error), artifact=artifact)
    artifact = bundle.artifact(target)
    if artifact.parity.status == "not_run":
        return Combination(target, precision, "not run", artifact.parity.reason, artifact=artifact)
    return Combination(target, precision, "ok", None, bundle, artifact)


def _measured(
    found: Sequence[Combination], steps: int, threads: int | None, terminal: Terminal, stack: ExitStack
) -> list[Combination]:
    """Measure the built combinations in turns; return all combinations."""
    entrants: dict[tuple[str, str], Entrant] = {}
    bundles: list[Bundle] = []
    with terminal.stage("Opening") as progress:
        for index, item in enumerate(found):
            if item.bundle is not None and item.artifact is not None:
                name = f"{item.target} {item.precision}"
                entrants[item.target, item.precision] = open_entrant(item.bundle, item.artifact, name, threads, stack)
                bundles.append(item.bundle)
            progress(index + 1, len(found))
    if not entrants:
        return list(found)
    streams = [entrant.stream for entrant in entrants.values()]
    with terminal.stage("Measuring in turns") as progress:
        latencies = dict(zip(entrants, bench(streams, steps, lane_tokens(bundles[0]), progress), strict=True))
    results = []
    for item in found:
        key, base = (item.target, item.precision), (item.target, "fp32")
        if key not in entrants:
            results.append(item)
            continue
        beside = None if key == base or base not in latencies else (entrants[base].name, latencies[base])
        measured = compared(entrants[key], latencies[key], beside)
        short = measured.ratio is not None and bool(not_faster(measured.ratio, measured.decode_ratio))
        results.append(replace(item, measured=measured, status=NOT_FASTER if short else item.status))
    return results


def _show(terminal: Terminal, model: Path, found: Sequence[Combination], steps: int) -> None:
    measured = [item.measured for item in found if item.measured is not None]
    terminal.say()
    title = heading(measured, steps) if measured else str(model)
    rows = [item.row() for item in found]
    # Make the table as wide as its text: the terminal then wraps the long last column instead of cutting it.
    widths = [max(len(cell) for cell in column) for column in zip(COLUMNS, *rows, strict=True)]
    terminal.out.width = max(terminal.out.width, sum(widths) + 2 * len(widths))
    terminal.table(COLUMNS, rows, title)
    explain(terminal, "the target's fp32" if measured else "")
    good = [(item.measured.latency.p50_us, item) for item in found if item.measured is not None and item.status == "ok"]
    if good:
        _, best = min(good, key=lambda pair: pair[0])
        command = f"nsm-export {model} --target {best.target} --precision {best.precision}"
        terminal.say(f"\nFastest with status ok: {command}")


def _first_sentence(text: str) -> str:
    """Return the first sentence without its full stop, cut to `_REASON` characters."""
    sentence = text.splitlines()[0].split(". ")[0].rstrip(".")
    return sentence if len(sentence) <= _REASON else sentence[: _REASON - 3] + "..."
