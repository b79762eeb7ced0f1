"""The parity report: one self-contained HTML file, which follows the system's light or dark theme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from nsm.export.report.format import number
from nsm.export.report.svg import Line, heat_map, histogram, log_chart
from nsm.files import check_output_file, replacing
from nsm.results import QuantizationResult
from nsm.runtimes.parity import MASK_DECISIONS_PER_1000, Bisection, ParityReport

_MARK = "<meta name='generator' content='nsm parity'>"
"""Identifies a parity report; it is within the first `_HEAD` bytes."""
_HEAD = 1024

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --grid: #e3e7ec; --back: #f6f7f9; --card: #ffffff;
  --one: #1f6fb2; --two: #b2601f; --three: #7a4fb5; --good: #1a7f4b; --bad: #c2283b; --quiet: #8a94a3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #a2adbb; --grid: #2c3440; --back: #12161c;
  --card: #1a2029; --one: #6fb1ea; --two: #eba066; --three: #b79af0; --good: #58c98c; --bad: #ff7a88;
  --quiet: #77828f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 880px; margin: 0 auto; padding: 28px 16px 60px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 0; } h3 { font-size: 15px; margin: 26px 0 2px; }
p { margin: 4px 0 8px; } .soft { color: var(--soft); }
section { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 20px;
  margin-top: 20px; }
.verdict { font-weight: 700; } .passed { color: var(--good); } .failed { color: var(--bad); }
.not_run { color: var(--soft); }
table { border-collapse: collapse; width: 100%; margin: 8px 0; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; }
th, td { padding: 4px 10px 4px 0; border-bottom: 1px solid var(--grid); vertical-align: middle; }
td.number, th.number { text-align: right; white-space: nowrap; }
.wide { overflow-x: auto; }
.gauge { display: block; width: 150px; height: 8px; border-radius: 4px; background: var(--grid); }
.gauge i { display: block; height: 8px; border-radius: 4px; background: var(--one); }
.gauge i.bad { background: var(--bad); }
.chart { width: 100%; height: auto; display: block; }
.grid { stroke: var(--grid); }
.tick { fill: var(--soft); font-size: 11px; } .title { fill: var(--soft); font-size: 12px; }
.line { fill: none; stroke-width: 2; } .one { stroke: var(--one); } .two { stroke: var(--two); }
.three { stroke: var(--three); }
.fit { stroke: var(--ink); stroke-width: 3; stroke-dasharray: 8 5; }
.budget { stroke: var(--bad); stroke-dasharray: 7 4; }
.floor { stroke: var(--quiet); stroke-dasharray: 1 4; }
.mark { fill: none; stroke: var(--bad); stroke-width: 1.5; } .marked { fill: var(--bad); font-size: 12px; }
.bar { fill: var(--one); fill-opacity: 0.55; } .bar.bad { fill: var(--bad); fill-opacity: 1; }
.cell { fill: var(--one); } .cell.over { fill: var(--bad); }
.cross { fill: var(--card); font-size: 12px; text-anchor: middle; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; color: var(--soft); font-size: 13px; }
summary { cursor: pointer; }
ul { margin: 4px 0 8px; padding-left: 20px; } code { font-size: 13px; overflow-wrap: anywhere; }
"""


def write_page(
    path: Path,
    bundle: str,
    reports: Sequence[ParityReport],
    not_run: Mapping[str, str],
    bisections: Mapping[str, Bisection],
    low_precision: Mapping[str, QuantizationResult],
    limits: Sequence[str] = (),
) -> None:
    """Write the report atomically.

    Args:
        path: the HTML file; an earlier report is replaced.
        bundle: name of the bundle.
        reports: parity reports, one per artifact.
        not_run: reasons of artifacts that were not run, by label.
        bisections: results of `--bisect`, by label.
        low_precision: the `quantization` of artifacts in the manifest, by label.
        limits: lines on the model's capacity and the limits of the targets.

    Raises:
        InputError: the folder does not exist, or is not writable.
        OutputExistsError: the file exists and is not a parity report.
    """
    check_page(path)
    with replacing(path) as file:
        file.write(page(bundle, reports, not_run, bisections, low_precision, limits).encode())


def check_page(path: Path) -> None:
    """Raise `OutputExistsError` if the report would replace a file that is not a parity report."""
    check_output_file(path, "a parity page", lambda file: _MARK.encode() in file.read(_HEAD))


def page(
    bundle: str,
    reports: Sequence[ParityReport],
    not_run: Mapping[str, str],
    bisections: Mapping[str, Bisection],
    low_precision: Mapping[str, QuantizationResult],
    limits: Sequence[str] = (),
) -> str:
    """Return the HTML; see `write_page` for the arguments."""
    verdicts = [_verdict(report.label, "passed" if report.passed else "failed") for report in reports]
    verdicts += [_verdict(label, "not_run") for label in not_run]
    sections = [_section(report, bisections.get(report.label), low_precision.get(report.label)) for report in reports]
    sections += [
        f"<section><h2>{escape(label)}</h2><p class='not_run'>Not run. {escape(reason)}</p></section>"
        for label, reason in not_run.items()
    ]
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>{_MARK}"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>Parity of {escape(bundle)}</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>Parity of {escape(bundle)}</h1>"
        "<p class='soft'>Every target replayed the recorded streams; its outputs and states are compared with the "
        "reference's. Errors are relative. One-step: from the reference's state. Free-run: on the target's own "
        "state.</p>"
        f"<p>{' &nbsp; '.join(verdicts)}</p>{''.join(f'<p>{escape(line)}</p>' for line in limits)}"
        f"{''.join(sections)}</main></body></html>\n"
    )


def _section(report: ParityReport, bisection: Bisection | None, low_precision: QuantizationResult | None) -> str:
    status = "passed" if report.passed else "failed"
    parts = [
        f"<h2>{escape(report.target)} {escape(report.precision)}: <span class='{status}'>{status}</span></h2>",
        f"<p class='soft'>{escape(report.coverage)}; computed in {escape(report.effective_precision)}</p>",
    ]
    if report.failures:
        parts.append("<ul>" + "".join(f"<li>{escape(text)}</li>" for text in report.failures) + "</ul>")
    first = report.first_divergence
    if first is not None:
        parts.append(
            f"<p>First over budget: stream {first.stream}, step {first.step}, <code>{escape(first.tensor)}</code> with "
            f"{number(first.error)}.</p>"
        )
    if bisection is not None:
        parts.append(f"<p><b>Bisected:</b> {escape(bisection.explanation)}</p>")
    parts += [_against_budget(report), *_charts(report), _argmax_changes(report)]
    if low_precision is not None:
        parts.append(_kept_in_fp32(low_precision))
    return f"<section>{''.join(parts)}</section>"


def _verdict(target: str, status: str) -> str:
    sign = {"passed": "✓", "failed": "✗", "not_run": "?"}[status]
    return f"<span class='verdict {status}'>{sign} {escape(target)} {status.replace('_', ' ')}</span>"


def _against_budget(report: ParityReport) -> str:
    """Return the table of measurements, with their budgets where they have one."""
    budget = report.budget
    rows = [
        (f"one-step error p99, of {report.one_step.tensor}", report.one_step.p99, budget.one_step_p99),
        (f"free-run error p99, of {report.free_run.tensor}", report.free_run.p99, budget.free_run_p99),
        ("KL mean", report.kl_mean, budget.kl_mean),
        ("KL p99.9", report.kl_p999, budget.kl_p999),
    ]
    if report.split is not None:
        rows.insert(2, (f"fed in single tokens p99, of {report.split.tensor}", report.split.p99, budget.free_run_p99))
    if report.staggered is not None:
        staggered = report.staggered
        rows.insert(2, (f"lanes of different age p99, of {staggered.tensor}", staggered.p99, budget.free_run_p99))
    counted = [
        ("argmax agreement", f"{report.argmax_agreement:.4%}", f"{budget.agreement:.2%}"),
        (
            "argmax changes, unexcused + excused",
            f"{report.unexcused_argmax_changes} + {report.excused_argmax_changes}",
            "",
        ),
        ("masks and counters that differ", str(report.mask_mismatches), "0"),
    ]
    if report.mask_decisions:
        limit = f"{MASK_DECISIONS_PER_1000:g}" if budget.precision == "fp32" else ""
        counted.append(("mask decisions excused in 1000 steps", f"{report.mask_decisions_per_1000_steps:.2f}", limit))
    drift, gain = report.drift, report.gain
    counted += [
        ("free-run error of the first output, mean", number(report.free_run_mean), ""),
        (
            f"gain, free run over one step{f', of {gain.tensor}' if gain else ''}",
            f"{gain.ratio:.2f}" if gain else "-",
            "",
        ),
        ("drift exponent", f"{drift.exponent:.2f} [{drift.low:.2f}, {drift.high:.2f}]" if drift else "-", ""),
        ("error of active slots, p99", number(report.state_error_p99), ""),
        ("conditioning floor: error that any fp32 implementation has", number(report.conditioning_floor), ""),
    ]
    lines = [
        f"<tr><td>{escape(name)}</td><td class='number'>{number(value)}</td><td class='number'>{number(limit)}</td>"
        f"<td>{_gauge(value, limit)}</td></tr>"
        for name, value, limit in rows
    ]
    lines += [
        f"<tr><td>{escape(name)}</td><td class='number'>{value}</td><td class='number'>{limit}</td><td></td></tr>"
        for name, value, limit in counted
    ]
    return (
        "<div class='wide'><table><tr><th>measured</th><th class='number'>value</th><th class='number'>budget</th>"
        f"<th>share of budget (log)</th></tr>{''.join(lines)}</table></div>"
    )


def _gauge(value: float, limit: float) -> str:
    """Return a bar for value / limit on a log scale of four decades; full and red beyond the limit."""
    within = value <= limit
    share = 100.0 if not within else 100 * max(0.02, min(1.0, 1 + np.log10(max(value, 1e-30) / limit) / 4))
    return f"<span class='gauge'><i class='{'' if within else 'bad'}' style='width:{share:.0f}%'></i></span>"


def _charts(report: ParityReport) -> list[str]:
    curves = report.curves
    parts = []
    stream = _stream_chart(report)
    if stream:
        text = "A flat curve is a bounded error; a slope of 1/2 is a random walk, a slope of 1 linear growth."
        text += " The gap between free run and one step is the error that the stream accumulates."
        parts.append(_headed("Error of the first output over the stream", text, stream))
    states = _states_chart(report)
    if states:
        text = "Largest error over states and streams: after one step from the reference's state, and in the free run."
        parts.append(_headed("Error of the worst state, one step against free run", text, states))
    if curves.states:
        columns = [str(step) for step in curves.sampled.tolist()]
        shown = {name: errors for name, errors in curves.states.items() if np.nan_to_num(errors, nan=1.0).any()}
        exact = len(curves.states) - len(shown)
        text = (
            "Darker cells are closer to the budget; the palest is four decades below. Over budget: red, with a cross."
        )
        text += f" {exact} of {len(curves.states)} states are exact and not shown." if exact else ""
        chart = heat_map(shown, columns, report.budget.free_run_p99, "sampled step") if shown else ""
        parts.append(_headed("Error of every state, free run, the worst stream", text, chart))
    if report.state_error_by_age:
        text = "Does the error of a slot grow with its age?"
        parts.append(_headed("Error of active slots by age", text, _ages(report)))
    margins = histogram(
        curves.margins, curves.argmax_changes, curves.excused_margin, "margin, in units of the outputs' rms", "outputs"
    )
    if margins:
        argmax_changes = int(curves.argmax_changes.sum())
        text = (
            f"Margin of the reference's largest logit over the second, for {len(curves.argmax_changes):,} outputs; "
            f"{argmax_changes} with another argmax on the target{' (red)' if argmax_changes else ''}."
        )
        parts.append(_headed("Margins and agreement", text, margins))
    return parts


def _stream_chart(report: ParityReport) -> str:
    curves = report.curves
    steps = np.arange(1, report.steps + 1)
    ends = np.array([1, max(report.steps, 2)])
    lines = [
        Line("free run, p50 over streams", steps, curves.free_run_p50, "one"),
        Line("free run, p99", steps, curves.free_run_p99, "two"),
        Line("one step, p50", curves.sampled + 1, curves.one_step_p50, "three"),
        Line("budget of the free run (p99)", ends, np.full(2, report.budget.free_run_p99), "budget"),
    ]
    if report.conditioning_floor is not None:
        lines.append(Line("conditioning floor (fp32 rounding)", ends, np.full(2, report.conditioning_floor), "floor"))
    if report.drift is not None:
        fitted = steps[report.steps // 4 :]
        level = float(np.median(curves.free_run_p50[report.steps // 2 :]))
        line = level * (fitted / (0.75 * report.steps)) ** report.drift.exponent
        lines.append(Line(f"drift, exponent {report.drift.exponent:.2f}", fitted, line, "fit"))
    first = report.first_divergence
    mark = None if first is None else (first.step + 1.0, first.error, f"first over budget: {first.tensor}")
    return log_chart(lines, "step, counted from 1", "relative error", mark)


def _states_chart(report: ParityReport) -> str:
    curves, budget = report.curves, report.budget
    if not curves.states:
        return ""
    steps = curves.sampled + 1
    ends = np.array([1, max(report.steps, 2)])
    lines = [
        Line("free run", steps, np.fmax.reduce(list(curves.states.values())), "one"),
        Line("one step", steps, np.fmax.reduce(list(curves.one_step.values())), "three"),
        Line("budget of the free run (p99)", ends, np.full(2, budget.free_run_p99), "budget"),
        Line("budget of one step (p99)", ends, np.full(2, budget.one_step_p99), "floor"),
    ]
    return log_chart(lines, "step, counted from 1", "relative error")


def _ages(report: ParityReport) -> str:
    middle = np.array([np.sqrt(item.start * item.end) for item in report.state_error_by_age])
    lines = [
        Line("p50", middle, np.array([item.p50 for item in report.state_error_by_age]), "one"),
        Line("p99", middle, np.array([item.p99 for item in report.state_error_by_age]), "two"),
    ]
    return log_chart(lines, "age of the slot, steps", "relative error") or "<p>All slots are exact.</p>"


def _argmax_changes(report: ParityReport) -> str:
    """Return the table of argmax changes; it is open if one is not excused."""
    if not report.argmax_changes:
        return ""
    rows = []
    for change in report.argmax_changes:
        places = (
            change.stream,
            change.step,
            change.token,
            change.decision,
            change.reference,
            change.target,
            f"{change.margin:.2e}",
        )
        cells = "".join(f"<td class='number'>{place}</td>" for place in places)
        verdict = "excused" if change.excused else "<span class='failed'>not excused</span>"
        rows.append(f"<tr>{cells}<td>{verdict}</td></tr>")
    names = ("stream", "step", "token", "decision", "reference", "target", "margin")
    head = "".join(f"<th class='number'>{name}</th>" for name in names)
    omitted = (
        f"<p class='soft'>{report.argmax_changes_left_off:,} more are not listed.</p>"
        if report.argmax_changes_left_off
        else ""
    )
    return (
        f"<details{' open' if report.unexcused_argmax_changes else ''}><summary>Argmax changes: "
        f"{report.unexcused_argmax_changes:,} not excused, {report.excused_argmax_changes:,} excused</summary>"
        "<p class='soft'>A change is excused up to a margin of "
        f"{report.curves.excused_margin:.2e}, in units of the rms of the outputs.</p><div class='wide'>"
        f"<table><tr>{head}<th></th></tr>{''.join(rows)}</table></div>{omitted}</details>"
    )


def _kept_in_fp32(facts: QuantizationResult) -> str:
    """Return the section on linear ops that a low-precision artifact keeps in fp32, with the reasons."""
    rows = "".join(
        f"<tr><td>{escape(reason)}</td><td class='number'>{len(names)}</td>"
        f"<td><code>{escape(', '.join(names))}</code></td></tr>"
        for reason, names in facts.by_reason().items()
    )
    head = "<tr><th>reason</th><th class='number'>linear ops</th><th>nodes</th></tr>"
    text = f"Scheme of the other linear ops: {facts.scheme}." if rows else f"None. Scheme: {facts.scheme}."
    return _headed("Kept in fp32", text, f"<table>{head}{rows}</table>" if rows else "")


def _headed(title: str, text: str, chart: str) -> str:
    return f"<h3>{escape(title)}</h3><p class='soft'>{escape(text)}</p><div class='wide'>{chart}</div>"
