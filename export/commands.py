"""What the commands on a bundle do. None of them needs torch."""

from __future__ import annotations

import importlib.util
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import click
import numpy as np

from nsm.bundle import Bundle
from nsm.errors import InputError, MissingDependencyError
from nsm.export import doctor as doctor_module
from nsm.export.adding import add_target
from nsm.export.console import (
    PARITY_COLUMNS,
    Terminal,
    lanes_of,
    low_precision_lines,
    parity_row,
    size,
    stream_lines,
)
from nsm.export.guard import Limits
from nsm.export.sequences import read_sequences, sequence_axes
from nsm.files import check_output_file, replacing
from nsm.runtimes.opening import chosen_artifact, open_artifact, open_bundle
from nsm.runtimes.session import Session
from nsm.runtimes.status import refuse_failed
from nsm.runtimes.targets import find_target
from nsm.runtimes.threads import chosen_threads
from nsm.spec import VALID
from nsm.trace import Array

_OUTPUTS = "an .npz of outputs that nsm run wrote"


def roofline(path: Path, target: str | None, precision: str | None, threads: int | None, as_json: bool) -> None:
    """Compare with what the arithmetic allows; see `nsm roofline --help`."""
    if importlib.util.find_spec("onnx") is None:
        raise MissingDependencyError(
            "The roofline is counted on the bundle's graphs, which needs the package onnx; it is not installed. "
            'Install it with: pip install "nsm-toolkit[quantize]"'
        )
    from nsm.export import roofline as roofline_module

    terminal = Terminal(quiet=as_json)
    bundle = Bundle(path)
    bundle.verify()
    artifact = chosen_artifact(bundle, target, precision)
    refuse_failed(path, artifact)
    threads = chosen_threads(threads, bundle.manifest.work)
    with (
        roofline_module.products(find_target(artifact.target), threads) as machine,
        open_artifact(bundle, artifact, threads=threads) as session,
        terminal.stage("Measuring in turns") as progress,
    ):
        calls = roofline_module.calls_of(session)
        work = {entry: roofline_module.work_of(bundle.locate(f"graphs/{entry}.onnx")) for entry in calls}
        reached = roofline_module.measure_reached(work, calls, machine, session.reset, progress=progress)
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
        f"\n{artifact.label} here: {facts['gflop_per_second']:.0f} GFLOP/s on a large product, "
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


def build(
    path: Path, target: str, device: str | None, precision: str, limits: Limits, force: bool, as_json: bool
) -> None:
    """Build a target into a bundle; see `nsm build --help`."""
    terminal = Terminal(quiet=as_json)
    replaced = Bundle(path).holds(find_target(target).name, precision)
    with terminal.stage(f"Building {find_target(target).name}") as progress:
        artifact = add_target(path, target, device, progress, precision, limits, force)
    if as_json:
        click.echo(json.dumps({"bundle": str(path), "artifacts": [asdict(artifact)], "replaced": replaced}))
        return
    terminal.table(PARITY_COLUMNS, [parity_row(asdict(artifact), artifact.nbytes)])
    if artifact.parity["status"] == "not_run":
        terminal.say(f"\n{artifact.target}: NOT RUN. {artifact.parity['reason']}", "yellow")
    for line in low_precision_lines(artifact):
        terminal.say(line)
    for note in artifact.notes:
        terminal.say(f"{note[0].upper()}{note[1:]}.")
    done = "Replaced in" if replaced else "Added to"
    option = "" if precision == "fp32" else f" --precision {precision}"
    terminal.say(f"\n{done} {path}. Next:\n  nsm parity {path} --target {artifact.target}{option}")


def inspect(path: Path, targets: Sequence[str], precisions: Sequence[str], as_json: bool) -> None:
    """Describe a bundle; see `nsm inspect --help`."""
    bundle = Bundle(path)
    bundle.verify()
    manifest = bundle.manifest
    if targets or precisions:
        shown = bundle.artifacts([find_target(name).name for name in targets], precisions)
        manifest = replace(manifest, artifacts=tuple(shown))
    if as_json:
        click.echo(json.dumps({"bundle": str(path), "verified": True, **manifest.to_json()}))
        return
    terminal, spec = Terminal(), manifest.spec
    terminal.say(
        f"{path}: {manifest.model['class']}, {manifest.model['parameters']:,} parameters, fingerprint "
        f"{manifest.fingerprint[:12]}; {lanes_of(spec.batch)}, chunks of {spec.chunk_size} tokens; all files verified"
    )
    terminal.say(f"made {manifest.created} by: {manifest.command}")
    terminal.say("with " + ", ".join(f"{name} {version}" for name, version in manifest.versions.items()) + "\n")
    for entry in spec.entries:
        tensors = [("input", item) for item in entry.inputs] + [("output", item) for item in entry.outputs]
        rows = [[kind, item.name, item.dtype, str(list(item.shape)), _range(item)] for kind, item in tensors]
        work = manifest.work.get(entry.name)
        does = "" if work is None else f": {work.flops / 1e6:,.1f} MFLOP, {size(work.nbytes)} read and written a call"
        terminal.table(("", "name", "dtype", "shape", "values"), rows, f"Entry {entry.name}{does}")
    states = [
        [
            s.name,
            s.dtype,
            str(list(s.shape)),
            s.init,
            ", ".join(e.name for e in spec.entries if s.name in e.writes) or "-",
        ]
        for s in spec.states
    ]
    title = f"\nStates, {size(spec.state_nbytes)} in all"
    terminal.table(("name", "dtype", "shape", "starts from", "written by"), states, title)
    if manifest.examination:
        lines = [[item.name, item.status, item.detail] for item in manifest.examination]
        terminal.table(("experiment", "", "what it showed, or why it was skipped"), lines, "\nExamination")
    rows = [parity_row(asdict(artifact), artifact.nbytes) for artifact in manifest.artifacts]
    terminal.table(PARITY_COLUMNS, rows, "\nArtifacts")
    for artifact in manifest.artifacts:
        for note in artifact.notes:
            terminal.say(f"{artifact.label}: {note}")
        for line in low_precision_lines(artifact):
            terminal.say(line)
    for line in stream_lines(manifest):
        terminal.say(line)
    for failed in manifest.failed:
        terminal.say(f"{failed.target}: not in the bundle. {failed.reason}")


def doctor(as_json: bool) -> None:
    """Examine the installation; see `nsm doctor --help`."""
    findings = doctor_module.examine()
    if as_json:
        click.echo(json.dumps({"findings": [asdict(item) for item in findings], "targets": doctor_module.usable()}))
        return
    rows = [[item.piece, item.found or "missing", item.purpose, "" if item.found else item.mend] for item in findings]
    Terminal().table(("piece", "found", "for", "to get it"), rows)


def run(
    path: Path,
    target: str | None,
    precision: str | None,
    data: Path | None,
    output: Path | None,
    force: bool,
    allow_failed: bool,
    as_json: bool,
) -> None:
    """Feed sequences; see `nsm run --help`."""
    terminal = Terminal(quiet=as_json)
    if output is not None:
        if not output.parent.is_dir():
            raise InputError(f"The folder {output.parent} of --output does not exist. Make it first.")
        check_output_file(output, _OUTPUTS, _is_outputs, force)
    bundle = Bundle(path)
    with open_bundle(bundle, target, precision=precision, allow_failed=allow_failed) as session:
        sequences = _recorded(bundle) if data is None else read_sequences(data, axes=sequence_axes(session.spec))
        results: dict[str, Array] = {}
        summaries: list[dict[str, Any]] = []
        with terminal.stage(f"Running on {session.target}") as progress:
            for index, sequence in enumerate(sequences):
                outputs = _feed(session, sequence)
                for name, value in outputs.items():
                    results[f"{index}/{name}"] = value
                    summaries.append(
                        {"sequence": index, "tokens": len(value), "output": name, "last": int(value[-1].argmax())}
                    )
                progress(index + 1, len(sequences))
    if output is not None:
        check_output_file(output, _OUTPUTS, _is_outputs, force)
        with replacing(output) as file:
            np.savez(file, allow_pickle=False, **dict(results))
    if as_json:
        click.echo(json.dumps({"target": session.target, "output": output and str(output), "sequences": summaries}))
        return
    rows = [[str(s["sequence"]), f"{s['tokens']:,}", str(s["last"])] for s in summaries]
    terminal.table(("sequence", "tokens", "argmax of the last output"), rows)
    terminal.say(f"\nWrote {output}." if output else "\nGive --output FILE.npz to keep the outputs.")


def _is_outputs(file: IO[bytes]) -> bool:
    """Whether an .npz has arrays of the names that `run` gives them, `0/outputs` for instance, and no others."""
    try:
        with zipfile.ZipFile(file) as archive:
            return all(re.fullmatch(r"\d+/.+\.npy", name) for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def _feed(session: Session, sequence: Array) -> dict[str, Array]:
    """One sequence on lane 0, from a fresh state; the other lanes idle."""
    spec = session.spec.entry("step").inputs[0]
    if sequence.shape[1:] != spec.shape[2:]:
        raise InputError(f"The model takes sequences of shape {['T', *spec.shape[2:]]}; given {list(sequence.shape)}.")
    session.reset()
    tokens = np.zeros((session.batch, *sequence.shape), sequence.dtype)
    tokens[0] = sequence
    valid = np.zeros(session.batch, np.int64)
    valid[0] = len(sequence)
    return {name: value[0] for name, value in session.feed(tokens, valid).items()}


def _recorded(bundle: Bundle) -> list[Array]:
    """The golden sequences, without padding."""
    inputs = dict(bundle.trace().inputs)
    inputs.pop(VALID, None)
    (tokens,) = inputs.values()
    return [stream.reshape(-1, *stream.shape[2:]) for stream in tokens]


def _range(item: Any) -> str:
    return "" if item.minimum is None else f"{item.minimum} .. {item.maximum}"
