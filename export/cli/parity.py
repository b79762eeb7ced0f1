"""`nsm parity`: replay and compare; optionally bisect and write an HTML report. Does not need torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from nsm.bundle import Bundle
from nsm.errors import DeviceUnavailableError, InputError, MissingDependencyError, ParityError
from nsm.export.report import PARITY_COLUMNS, Terminal, check_page, number, parity_row, write_page
from nsm.export.verify import try_artifact
from nsm.manifest import Artifact
from nsm.runtimes import find_target
from nsm.runtimes.opening import open_artifact
from nsm.runtimes.parity import MAX_LISTED_CHANGES, Bisection, ParityReport, compare, find_budget, thresholds_of
from nsm.runtimes.parity.bisection import bisect, check_bisectable

_NAMED_CHANGES = 3


def parity(
    path: Path,
    target: str | None,
    precision: str | None,
    steps: int | None,
    as_json: bool,
    bisected: bool = False,
    html: Path | None = None,
) -> None:
    """Replay the golden trace; see `nsm parity --help`.

    Args:
        path: the bundle.
        target: name or alias of a target; None for all in the bundle.
        precision: precision of the artifacts; None for all.
        steps: number of steps of the trace to compare; None for all.
        as_json: print one JSON object, and nothing else on stdout.
        bisected: search for the operation or state that causes the error.
        html: path of the report; None writes no report.

    Raises:
        ParityError: a target is over budget, or no target could be compared. The report is written first.
        UnsupportedError: `target` cannot be bisected.
    """
    terminal = Terminal(quiet=as_json)
    names = [] if target is None else [find_target(target).name]
    if bisected:
        for name in names:
            check_bisectable(name)
    if html is not None:
        if not html.parent.is_dir():
            raise InputError(f"The folder {html.parent} of --html does not exist. Create it first.")
        check_page(html)
    bundle = Bundle(path)
    bundle.verify()
    trace = bundle.trace()
    if steps is not None:
        if not 1 <= steps <= trace.steps:
            raise InputError(f"--steps must be between 1 and {trace.steps}, the recorded steps; given {steps}.")
        trace = trace.first(steps)
    thresholds = thresholds_of(bundle.manifest.model.get("config", {}))
    results: list[dict[str, Any]] = []
    reports: list[ParityReport] = []
    bisections: dict[str, Bisection] = {}
    not_run: dict[str, str] = {}
    artifacts = bundle.artifacts(names, [] if precision is None else [precision])
    for artifact in artifacts:
        name, budget = artifact.label, find_budget(artifact.precision)
        try_artifact(bundle, artifact)
        try:
            with open_artifact(bundle, artifact) as session:
                with terminal.stage(f"Checking {name}") as progress:
                    reports.append(compare(trace, session, budget, progress, thresholds))
                results.append(reports[-1].to_json())
                if artifact.quantization:
                    results[-1]["quantization"] = dict(artifact.quantization)
                if bisected and not find_target(artifact.target).bisectable:
                    terminal.remark(f"{name}: not bisected; the target exposes no intermediate results.")
                elif bisected:
                    with terminal.stage(f"Bisecting {name}") as progress:
                        bisections[name] = bisect(bundle, artifact, session, trace, budget, progress)
                    results[-1]["bisect"] = bisections[name].to_json()
        except (DeviceUnavailableError, MissingDependencyError) as error:
            if reports and reports[-1].label == name:
                raise  # the comparison succeeded: a package that the bisection needs is missing
            not_run[name] = str(error)
            facts = {"target": artifact.target, "precision": artifact.precision}
            results.append({**facts, "status": "not_run", "reason": str(error)})
    if html is not None:
        low = {artifact.label: artifact.quantization for artifact in artifacts if artifact.quantization}
        write_page(html, path.resolve().name, reports, not_run, bisections, low)
    if as_json:
        passed = bool(reports) and all(report.passed for report in reports)
        click.echo(json.dumps({"passed": passed, "results": results}))
    _print(terminal, artifacts, results, reports, bisections, not_run)
    if html is not None:
        terminal.say(f"\nWrote {html}: open it in a browser.")
    for report in reports:
        report.require()
    if not reports:
        raise ParityError("No target could be compared on this machine.")


def _print(
    terminal: Terminal,
    artifacts: Sequence[Artifact],
    results: Sequence[dict[str, Any]],
    reports: Sequence[ParityReport],
    bisections: Mapping[str, Bisection],
    not_run: Mapping[str, str],
) -> None:
    terminal.say()
    rows = [
        parity_row({"device": artifact.device, "parity": result, **result}, artifact.nbytes)
        for artifact, result in zip(artifacts, results, strict=True)
    ]
    terminal.table(PARITY_COLUMNS, rows)
    for report in reports:
        _explain(terminal, report)
        if report.label in bisections:
            terminal.say(f"  bisected: {bisections[report.label].explanation}")
    for label, reason in not_run.items():
        terminal.say(f"{label}: not run. {reason}")


def _explain(terminal: Terminal, report: ParityReport) -> None:
    drift = report.drift
    terminal.say(
        f"\n{report.label}: {report.coverage}; worst tensor one-step {report.one_step.tensor}, "
        f"free-run {report.free_run.tensor}; fp32 rounding error of the reference {number(report.reference_floor)}"
    )
    mask_decisions = f", mask decisions excused {report.mask_decisions}" if report.mask_decisions else ""
    gain = "-" if report.gain is None else f"{report.gain.ratio:.2f} of {report.gain.tensor}"
    terminal.say(
        f"  bank error p99 {number(report.state_error_p99)}, KL mean {number(report.kl_mean)}, "
        f"argmax changes {report.unexcused_argmax_changes} + {report.excused_argmax_changes} excused, "
        f"masks differing {report.mask_mismatches}"
        f"{mask_decisions}, "
        + (f"drift exponent {drift.exponent:.2f} [{drift.low:.2f}, {drift.high:.2f}]" if drift else "drift exponent -")
        + f", gain {gain}"
    )
    for change in [change for change in report.argmax_changes if not change.excused][:_NAMED_CHANGES]:
        terminal.say(f"  argmax change, not excused: {change}")
    if report.unexcused_argmax_changes > _NAMED_CHANGES:
        terminal.say(
            f"  and {report.unexcused_argmax_changes - _NAMED_CHANGES:,} more; --json and --html list the first "
            f"{MAX_LISTED_CHANGES}"
        )
    if report.first_divergence is not None:
        first = report.first_divergence
        terminal.say(
            f"  first over budget: stream {first.stream}, step {first.step}, {first.tensor} ({number(first.error)})"
        )
