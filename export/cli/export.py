"""`nsm-export`: export a model to a bundle, and report the result."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nsm.adapters.validate import summary
from nsm.bundle import Bundle
from nsm.errors import InputError, ParityError, SlowerError, UnsupportedError
from nsm.export import pipeline
from nsm.export.graphs import OPSET
from nsm.export.options import ExportOptions
from nsm.export.report import PARITY_COLUMNS, Terminal, low_precision_lines, parity_row, stream_lines
from nsm.export.verify import DRIFT_STEPS, judged_briefly
from nsm.files import settled
from nsm.runtimes import find_target
from nsm.staging import FAILED_SUFFIX

if TYPE_CHECKING:
    from nsm.export.analysis import Savings
    from nsm.export.pipeline import Plan


def export(model: Path, as_json: bool, dry_run: bool, options: dict[str, Any]) -> None:
    """Export a model; see `nsm-export --help`.

    Args:
        options: the fields of `ExportOptions`; an `opset` of None means the default.
    """
    terminal = Terminal(quiet=as_json)
    opset, output = options["opset"], options["output"]
    options = {**options, "opset": opset or OPSET, "output": output and settled(output)}
    planned = pipeline.plan(model, ExportOptions(**options))
    _check_debug_outputs(planned)
    if opset is not None and model.suffix.lower() == ".onnx":
        _check_opset(planned, opset)
    for message in planned.source.messages:
        terminal.message(message)
    if planned.examination:
        terminal.announce(summary(planned.examination))
    if planned.origin == "synthetic":
        terminal.remark(
            "The model has no sequences, so parity is checked on random tokens (synthetic). "
            "Give real sequences with --data, or with nsm.save(model, path, samples=...).",
            "yellow",
        )
    steps = planned.steps
    if planned.options.precision != "fp32" and steps < DRIFT_STEPS:
        terminal.remark(f"Low precision is {judged_briefly(steps)}.", "yellow")
    if dry_run:
        facts = {"output": str(planned.output), "source": planned.origin, "streams": len(planned.sequences)}
        if as_json:
            click.echo(json.dumps({"dry_run": True, "bundle": None, "artifacts": [], **facts}))
        terminal.say(f"The request is valid. The export would write {planned.output}; nothing was written.")
        return
    try:
        bundle, failure = pipeline.run(planned, terminal)
    except ParityError:
        if as_json:
            kept = Bundle(planned.output.with_name(planned.output.name + FAILED_SUFFIX))
            found = kept.manifest.to_json()["artifacts"]
            click.echo(json.dumps({"bundle": None, "kept_as": str(kept.path), "artifacts": found}))
        raise
    except SlowerError as error:
        if as_json:
            click.echo(json.dumps({"bundle": None, "kept_as": None, "artifacts": error.artifacts}))
        raise
    found = bundle.manifest.to_json()
    saved = _measure_savings(terminal, planned, bundle) if planned.larger is not None else None
    if as_json:
        more = {} if saved is None else {"compact": asdict(saved)}
        written = {name: found[name] for name in ("artifacts", "failed")}
        click.echo(json.dumps({"bundle": str(bundle.path), **written, **more}))
    else:
        _show(terminal, planned, bundle, saved)
    if failure is not None:
        raise failure


def _show(terminal: Terminal, planned: Plan, bundle: Bundle, saved: Savings | None) -> None:
    terminal.say()
    if saved is not None:
        _show_savings(terminal, saved)
    _show_artifacts(terminal, bundle)
    for line in stream_lines(bundle.manifest):
        terminal.say(line)
    _say_fewer_steps(terminal, planned, bundle)
    shown = next((a.target for a in bundle.manifest.artifacts if a.parity.status == "passed"), None)
    terminal.say(f"\nWrote {bundle.path}. Next:")
    terminal.say(f"  nsm inspect {bundle.path}")
    if shown:
        terminal.say(f"  nsm bench {bundle.path} --target {shown}")
        terminal.say(f"  python -c \"import nsm; session = nsm.open('{bundle.path}', target='{shown}')\"")


def _check_debug_outputs(planned: Plan) -> None:
    """Raise `UnsupportedError` if the model has no debug outputs."""
    options, source = planned.options, planned.source
    if not options.debug_outputs:
        return
    without, with_them = (source.spec(options.batch, options.tokens_per_call, debug) for debug in (False, True))
    if without == with_them:
        raise UnsupportedError(
            f"--debug-outputs shows how tokens are routed to the slots of a bank; {source.kind} has no bank. "
            "Leave it out."
        )


def _check_opset(planned: Plan, opset: int) -> None:
    """Raise `InputError` if a foreign file has a newer operator set than `opset`."""
    from nsm.export.sources.onnx import OnnxSource
    from nsm.export.sources.onnx.file import opset_of

    assert isinstance(planned.source, OnnxSource)
    own = opset_of(planned.source.given.foreign.model)
    if own > opset:
        raise InputError(
            f"--opset {opset} is older than the operator set of {planned.source.kind}, which is {own}; graphs "
            f"are converted to newer ones only. Give --opset {own} or leave it out, or export the file again."
        )


def _show_savings(terminal: Terminal, saved: Savings) -> None:
    columns = [
        ("slots", *saved.slots, "{:,}"),
        ("parameters", *saved.parameters, "{:,}"),
        ("state per lane, bytes", *saved.state_bytes, "{:,}"),
        ("FLOPs per step", *saved.flops, "{:,.0f}"),
    ]
    if saved.step_us is not None:
        columns.append((f"us per step, {saved.target}", *saved.step_us, "{:,.0f}"))
    lines = [[name, f.format(old), f.format(new), f"{1 - new / old:.0%}"] for name, old, new, f in columns]
    terminal.table(("compact", "before", "after", "saved"), lines)
    terminal.say()


def _show_artifacts(terminal: Terminal, bundle: Bundle) -> None:
    terminal.table(PARITY_COLUMNS, [parity_row(artifact) for artifact in bundle.manifest.artifacts])
    for artifact in bundle.manifest.artifacts:
        if artifact.parity.status == "not_run":
            terminal.say(f"\n{artifact.target}: NOT RUN. {artifact.parity.reason}", "yellow")
            if checked := find_target(artifact.target).checked_when_built:
                terminal.say(f"Instead, {checked}.")
            for note in artifact.notes:
                terminal.say(f"{note[0].upper()}{note[1:]}.")
            terminal.say(
                f"To check it, run on a machine with the hardware: nsm parity {bundle.path} --target {artifact.target}"
            )
    for artifact in bundle.manifest.artifacts:
        for line in low_precision_lines(artifact):
            terminal.say(line)


def _say_fewer_steps(terminal: Terminal, planned: Plan, bundle: Bundle) -> None:
    """Print a remark if the model's capacity allows fewer calls than `--golden-steps`."""
    spec, asked = bundle.manifest.spec, planned.options.golden_steps
    if asked is None or spec.capacity is None:
        return
    most = spec.capacity // spec.entry("step").tokens
    if asked > most:
        terminal.remark(
            f"Checked {most:,} calls per stream instead of {asked:,}: the model's capacity ends there.", "yellow"
        )


def _measure_savings(terminal: Terminal, planned: Plan, bundle: Bundle) -> Savings:
    from nsm.export.analysis import measure_savings

    with terminal.stage("Measuring the savings"):
        return measure_savings(planned, bundle)
