"""`nsm parity`: replay and compare; optionally bisect and write an HTML report. Does not need torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from nsm.bundle import Bundle
from nsm.decode import encode
from nsm.errors import DeviceUnavailableError, InputError, MissingDependencyError, ParityError
from nsm.export.report import PARITY_COLUMNS, Terminal, check_page, number, parity_row, stream_lines, write_page
from nsm.export.verify import try_artifact
from nsm.manifest import Artifact
from nsm.results import ParityResult
from nsm.runtimes import find_target
from nsm.runtimes.opening import open_artifact
from nsm.runtimes.parity import FLOORS, MAX_LISTED_CHANGES, Bisection, ParityReport, compare, find_budget, thresholds_of
from nsm.runtimes.parity.bisection import bisect, check_bisectable
from nsm.trace import Trace

_NAMED_CHANGES = 3


@dataclass(frozen=True)
class _Checked:
    """One artifact of the command.

    Args:
        artifact: the artifact, with the parity that was measured now.
        report: the parity report; None if the artifact cannot run here.
        bisection: the operation or state at fault; None if it was not searched for.
    """

    artifact: Artifact
    report: ParityReport | None = None
    bisection: Bisection | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the item of `results` in the output of `--json`."""
        artifact = self.artifact
        if self.report is None:
            facts = {"target": artifact.target, "precision": artifact.precision}
            return {**facts, "status": "not_run", "reason": artifact.parity.reason}
        data = self.report.to_json()
        if artifact.quantization is not None:
            data["quantization"] = encode(artifact.quantization)
        if self.bisection is not None:
            data["bisect"] = self.bisection.to_json()
        return data


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
        _check_html(html)
    bundle = Bundle(path)
    bundle.verify()
    trace = _shortened(bundle.trace(), steps)
    artifacts = bundle.artifacts(names, [] if precision is None else [precision])
    checked = [_check(terminal, bundle, artifact, trace, bisected) for artifact in artifacts]
    reports = [item.report for item in checked if item.report is not None]
    if html is not None:
        _write_html(html, path.resolve().name, checked, stream_lines(bundle.manifest))
    if as_json:
        passed = bool(reports) and all(report.passed for report in reports)
        click.echo(json.dumps({"passed": passed, "results": [item.to_json() for item in checked]}))
    _print(terminal, checked)
    if html is not None:
        terminal.say(f"\nWrote {html}: open it in a browser.")
    for report in reports:
        report.require()
    if not reports:
        raise ParityError("No target could be compared on this machine.")


def _check_html(html: Path) -> None:
    """Raise `InputError` if the report cannot be written there."""
    if not html.parent.is_dir():
        raise InputError(f"The folder {html.parent} of --html does not exist. Create it first.")
    check_page(html)


def _shortened(trace: Trace, steps: int | None) -> Trace:
    if steps is None:
        return trace
    if not 1 <= steps <= trace.steps:
        raise InputError(f"--steps must be between 1 and {trace.steps}, the recorded steps; given {steps}.")
    return trace.first(steps)


def _check(terminal: Terminal, bundle: Bundle, artifact: Artifact, trace: Trace, bisected: bool) -> _Checked:
    """Compare one artifact with the trace, if its hardware is present; bisect it if that is asked for."""
    name, budget = artifact.label, find_budget(artifact.precision)
    try_artifact(bundle, artifact)
    with ExitStack() as stack:
        try:
            session = stack.enter_context(open_artifact(bundle, artifact))
        except (DeviceUnavailableError, MissingDependencyError) as error:
            return _Checked(replace(artifact, parity=ParityResult.not_run(str(error))))
        with terminal.stage(f"Checking {name}") as progress:
            thresholds = thresholds_of(bundle.manifest.model.get("config", {}))
            report = compare(trace, session, budget, progress, thresholds, artifact.accepted)
        checked = _Checked(replace(artifact, parity=report.result()), report)
        if not bisected:
            return checked
        if not find_target(artifact.target).bisectable:
            terminal.remark(f"{name}: not bisected; the target exposes no intermediate results.")
            return checked
        with terminal.stage(f"Bisecting {name}") as progress:
            return replace(checked, bisection=bisect(bundle, artifact, session, trace, budget, progress))


def _write_html(html: Path, name: str, checked: Sequence[_Checked], limits: Sequence[str]) -> None:
    by_label = {item.artifact.label: item for item in checked}
    write_page(
        html,
        name,
        [item.report for item in checked if item.report is not None],
        {label: item.artifact.parity.reason or "" for label, item in by_label.items() if item.report is None},
        {label: item.bisection for label, item in by_label.items() if item.bisection is not None},
        {
            label: item.artifact.quantization
            for label, item in by_label.items()
            if item.artifact.quantization is not None
        },
        limits,
    )


def _print(terminal: Terminal, checked: Sequence[_Checked]) -> None:
    terminal.say()
    terminal.table(PARITY_COLUMNS, [parity_row(item.artifact) for item in checked])
    for item in checked:
        if item.report is not None:
            _explain(terminal, item.report)
        if item.bisection is not None:
            terminal.say(f"  bisected: {item.bisection.explanation}")
    for item in checked:
        if item.report is None:
            terminal.say(f"{item.artifact.label}: not run. {item.artifact.parity.reason}")


def _explain(terminal: Terminal, report: ParityReport) -> None:
    drift = report.drift
    terminal.say(
        f"\n{report.label}: {report.coverage}; worst tensor one-step {report.one_step.tensor}, "
        f"free-run {report.free_run.tensor}; conditioning floor {number(report.conditioning_floor)}"
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
    if report.excused_by_conditioning:
        terminal.say(
            f"  over budget, and within {FLOORS:g} conditioning floors: {', '.join(report.excused_by_conditioning)}"
        )
    for item in report.accepted:
        measured = report.per_tensor[item.tensor]["free_run_p99"]
        usual = "" if item.absolute else f", {measured / report.budget.free_run_p99:.2g} of the default budget"
        terminal.say(f"  accepted by --budget {item}: free-run error {number(measured)}{usual}")
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
