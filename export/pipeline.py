"""The main path: a model becomes a verified bundle."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import math
import platform
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nsm.bundle import GOLDEN, GRAPHS, STATE_INIT, Bundle, graph_file
from nsm.errors import InputError, MissingDependencyError, NsmError, UnsupportedError
from nsm.export.options import ExportOptions
from nsm.export.sources import Source, parse_constants, parse_shapes, parse_states, read_sequences
from nsm.export.verify import (
    Limits,
    Outcome,
    Reach,
    TargetPlan,
    build_checked,
    build_target,
    checked_sequences,
    compared_offline,
    find_reach,
    may_count,
    plan_targets,
    record,
    settle,
    synthetic,
    with_limit,
)
from nsm.manifest import Experiment, Manifest
from nsm.quantization import Calibration, check_enough, check_recurrent
from nsm.runtimes import TARGETS, Progress, find_target
from nsm.runtimes.opening import open_artifact
from nsm.runtimes.parity import check_budgets, parse_budgets
from nsm.spec import StepSpec
from nsm.staging import check_output, staged, write_manifest
from nsm.trace import Array, Origin

_PACKAGES = tuple(
    dict.fromkeys(("torch", "onnx", "onnxscript", *(name for target in TARGETS.values() for name in target.packages)))
)
"""Packages whose versions are recorded in a bundle."""

_PAST_FILLING = 16
"""Minimum number of tokens in a golden trace after the states of a foreign model are full."""


class Stages(Protocol):
    """Protocol of a progress display: every stage is a `with` block that may report steps."""

    def stage(self, name: str) -> AbstractContextManager[Progress]: ...


class _Silent:
    def stage(self, name: str) -> AbstractContextManager[Progress]:  # noqa: ARG002
        return nullcontext(lambda _done, _total: None)


@dataclass(frozen=True)
class Plan:
    """A checked export request with its loaded model; nothing is built yet.

    Args:
        options: the request.
        source: the model.
        spec: the spec of the model, for the lanes and tokens per call of `options`.
        targets: the artifacts to build.
        limits: limits on the cost of low precision.
        sequences: sequences for the parity check, [T] ids or [T, *token] each.
        origin: whether `sequences` are recorded or synthetic.
        output: the bundle to write.
        calibration: sequences for int8 calibration.
        steps: calls per stream of the golden trace.
        examination: results of the experiments on a foreign model.
        larger: the `source` before `--compact`; None without it.
    """

    options: ExportOptions
    source: Source
    spec: StepSpec
    targets: tuple[TargetPlan, ...]
    limits: Limits
    sequences: list[Array]
    origin: Origin
    output: Path
    calibration: list[Array]
    steps: int
    examination: tuple[Experiment, ...] = ()
    larger: Source | None = None


def open_source(model: Path, options: ExportOptions) -> Source:
    """Load a model file: a checkpoint, a torch.export program (`.pt2`) or an ONNX graph (`.onnx`).

    Raises:
        CheckpointError: the checkpoint is invalid.
        InputError, UnsupportedError: the states cannot be found, or the model is not a step.
        MissingDependencyError: a package that reads the file is not installed.
    """
    suffix = model.suffix.lower()
    states = parse_states(options.states)
    if suffix == ".onnx":
        _require(("onnx", "onnxruntime"), "export,onnxruntime")
        from nsm.export.sources.onnx import load_onnx

        shapes = parse_shapes(options.shapes)
        return load_onnx(
            model,
            states,
            parse_constants(options.constants),
            options.vocab_size,
            shapes,
            options.input,
            options.no_states,
            options.capacity,
        )
    _require(("torch", "onnx", "onnxscript"), "export")
    from nsm.export.sources import TorchSource

    for option, given in (
        ("--constant", options.constants),
        ("--shape", options.shapes),
        ("--input", options.input),
        ("--no-state", options.no_states),
    ):
        if given:
            raise InputError(f"{option} applies to foreign .onnx files only; given {model}. Leave it out.")
    if suffix == ".pt2":
        from nsm.export.sources import load_program

        checkpoint, messages = load_program(model, states, options.vocab_size, options.capacity)
        return TorchSource(checkpoint, messages)
    if states or options.vocab_size is not None or options.capacity is not None:
        raise InputError(
            f"--state, --vocab-size and --capacity apply to foreign .pt2 and .onnx files only; {model} is a "
            "checkpoint, which declares its states. Leave them out."
        )
    from nsm.models import load_checkpoint

    return TorchSource(load_checkpoint(model))


def plan(model: Path | Source, options: ExportOptions) -> Plan:
    """Check the request and load the model; write nothing.

    Args:
        model: a file, or a source; a source needs `options.output`.
        options: the request.

    Raises:
        InputError and subclasses: invalid request, checkpoint or data.
        UnsupportedError: a target lacks the precision, or the model lacks a requested feature.
        MissingDependencyError: a package is not installed.
    """
    targets = plan_targets(options.targets, options.precision, options.device)
    if options.batch < 1 or options.num_samples < 1 or options.steps < 1:
        raise InputError(
            f"--batch, --num-samples and --golden-steps must be at least 1; given {options.batch}, "
            f"{options.num_samples} and {options.steps}."
        )
    limits = Limits(options.max_fp32_share, options.allow_slower, parse_budgets(options.budgets))
    source = open_source(model, options) if isinstance(model, Path) else model
    source.spec(options.batch, options.tokens_per_call, options.debug_outputs)  # checks the sizes
    for item in targets:
        if item.policy is not None:
            length = options.tokens_per_call or source.chunk_size
            check_recurrent(source.largest_weights, item.target.name, item.precision, item.policy, length)
    static = any(item.policy is not None and item.policy.scheme == "static" for item in targets)
    steps = _golden_steps(source, options)
    sequences, origin = _sequences(source, options, static, steps)
    checked_sequences(source, sequences)
    calibration = _calibration(source, options) if static else []
    output = options.output or Path(f"{model.stem if isinstance(model, Path) else source.kind}.nsm")
    check_output(output, options.force)
    larger, examination = None, source.examination.experiments if source.examination else ()
    if options.compact:
        larger, source = source, compacted(source, sequences if origin == "recorded" else [])
    elif options.offline is not None:
        examination = compared_offline(source, options.offline, sequences)
    spec = source.spec(options.batch, options.tokens_per_call, options.debug_outputs)
    check_budgets(limits.accepted, spec)
    return Plan(
        options, source, spec, targets, limits, sequences, origin, output, calibration, steps, examination, larger
    )


def compacted(source: Source, sequences: list[Array]) -> Source:
    """Remove the slots that neither `sequences` nor the model's calibration sequences use.

    Raises:
        UnsupportedError: the model has no bank.
        ConfigError, InputError: see `nsm.models.compaction.compact`.
    """
    from nsm.export.sources import TorchSource

    if not isinstance(source, TorchSource):
        raise UnsupportedError(f"--compact removes slots of a bank; {source.kind} has no bank. Leave it out.")
    return source.compacted(sequences)


def export(model: Path | Source, options: ExportOptions, stages: Stages | None = None) -> Bundle:
    """Export a model to one bundle with one or several targets.

    If only some targets fail and `options.strict` is not set, the bundle is written with the other targets before the
    error of the first failed target is raised.

    Args:
        model: a file, or a source; a source needs `options.output`.
        options: the request.
        stages: shows the progress; None shows nothing.

    Returns:
        The bundle with all targets.

    Raises:
        ParityError: a target is over budget; the bundle is kept as `{output}.failed`.
        BuildError: a target cannot be built.
        OutputExistsError: the bundle exists, and `options.force` is not set.
        NsmError: see `plan`.
    """
    bundle, error = run(plan(model, options), stages or _Silent())
    if error is not None:
        raise error
    return bundle


def run(planned: Plan, stages: Stages) -> tuple[Bundle, NsmError | None]:
    """Export as planned; return the bundle and the error of the first failed target, or None."""
    options, source, spec = planned.options, planned.source, planned.spec
    with staged(planned.output, options.force) as stage:
        with stages.stage("Recording the reference") as progress:
            found = find_reach(source, spec, planned.sequences)
            spec = found.of(spec)
            trace = record(
                source,
                planned.sequences,
                _steps_within(spec, planned.steps),
                options.tokens_per_call,
                planned.origin,
                progress,
                options.debug_outputs,
            )
            trace.save(stage / GOLDEN)
        with stages.stage("Exporting ONNX"):
            (stage / GRAPHS).mkdir()
            source.write_graphs(spec, stage / GRAPHS, options.opset)
            free = replace(spec, capacity=None)
            if spec.capacity is None and may_count(spec, found.bounded):
                spec = _without_end(stage / GRAPHS, spec, found, trace.steps)
            initial: dict[str, Any] = dict(source.initial_arrays(options.batch))
            np.savez(stage / STATE_INIT, allow_pickle=False, **initial)
        manifest = _manifest(planned, spec, stage / GRAPHS)
        write_manifest(stage, manifest)
        bundle = Bundle(stage)
        calibration = _calibrated(bundle, planned, stages)
        outcomes: list[Outcome] = []
        for item in planned.targets:
            name = item.target.name
            try:
                with stages.stage(f"Building {name}") as progress:
                    accepted = build_checked(bundle, item, calibration, planned.limits, trace, progress)
                    if found.counters is not None and not accepted.failed:
                        limited = with_limit(bundle, accepted.artifact, source.reference(free), found)
                        accepted = replace(accepted, artifact=limited)
                outcomes.append(Outcome.of(accepted, options.require_parity))
            except NsmError as error:
                outcomes.append(Outcome(name, error=error))
                if options.strict:
                    break
        failure = settle(stage, planned.output, manifest, outcomes, options.strict)
    return Bundle(planned.output), failure


def _steps_within(spec: StepSpec, steps: int) -> int:
    """Return the calls of the golden trace: `steps`, limited by the model's capacity."""
    return steps if spec.capacity is None else min(steps, spec.capacity // spec.entry("step").tokens)


def _without_end(graphs: Path, spec: StepSpec, found: Reach, steps: int) -> StepSpec:
    """Return the spec of a model without a capacity, after bounding its counters in the graphs if that is exact.

    Raises:
        UnsupportedError: a graph writes at a position that grows without a known end.
    """
    from nsm.export.graphs import wrap_counters
    from nsm.export.verify import check_positions

    check_positions(graphs / graph_file("step"), spec, found.bounded)
    return spec if found.counters is None else wrap_counters(graphs, spec, found.counters, steps)


def _calibrated(bundle: Bundle, planned: Plan, stages: Stages) -> Calibration | None:
    """Calibrate on the fp32 graph of a bundle and save the scales; None if no artifact needs them."""
    if not planned.calibration:
        return None
    from nsm.quantization import calibrate

    with stages.stage("Calibrating") as progress:
        target = find_target("onnxruntime")
        exact = build_target(bundle.path, bundle.manifest.spec, target, None)
        with open_artifact(bundle, exact) as session:
            graph = bundle.path / GRAPHS / graph_file("step")
            calibration = calibrate(graph, session, planned.calibration, progress)
    calibration.save(bundle.path)
    return calibration


def _manifest(planned: Plan, spec: StepSpec, graphs: Path) -> Manifest:
    """Return the manifest without artifacts."""
    from nsm.export.graphs import entry_work

    source = planned.source
    work = {entry.name: entry_work(graphs / graph_file(entry.name)) for entry in spec.entries}
    return Manifest(
        spec=spec,
        fingerprint=source.fingerprint,
        model={"class": source.kind, "config": source.config, "parameters": source.parameters},
        artifacts=(),
        files=(),
        versions=versions(),
        command=planned.options.command,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        work={name: item for name, item in work.items() if item is not None},
        examination=planned.examination,
    )


def _require(packages: Sequence[str], extra: str) -> None:
    """Raise `MissingDependencyError` if one of the packages is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"Exporting needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed. "
            f'Install with: pip install "nsm-toolkit[{extra}]". '
            "(nsm build adds targets to an existing bundle without torch.)"
        )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that an export uses."""
    found = {"python": platform.python_version(), "nsm": importlib.metadata.version("nsm-toolkit")}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _golden_steps(source: Source, options: ExportOptions) -> int:
    """Return the steps of the golden trace; by default enough to fill the states of a foreign model."""
    if options.golden_steps is not None or source.examination is None:
        return options.steps
    tokens = source.examination.filled + _PAST_FILLING
    return max(options.steps, math.ceil(tokens / (options.tokens_per_call or source.chunk_size)))


def _sequences(source: Source, options: ExportOptions, static: bool, steps: int) -> tuple[list[Array], Origin]:
    """Return the sequences of the parity check; with `static`, from the first half of a text file."""
    if options.data is not None:
        parts = 2 * options.num_samples if static else options.num_samples
        axes = 1 + len(source.token_spec.shape)
        return read_sequences(options.data, parts, axes)[: options.num_samples], "recorded"
    if source.golden:
        return source.golden[: options.num_samples], "recorded"
    length = steps * (options.tokens_per_call or source.chunk_size)
    return synthetic(source, options.num_samples, length), "synthetic"


def _calibration(source: Source, options: ExportOptions) -> list[Array]:
    """Return the calibration sequences: the model's own, or those of `--data` that the parity check does not use.

    Raises:
        InputError: no sequence, too few or too short sequences, or sequences that the model does not accept.
    """
    if options.data is not None:
        count = 2 * options.num_samples if options.data.suffix.lower() == ".txt" else None
        # Check all sequences, so that an error counts them as the file does.
        axes = 1 + len(source.token_spec.shape)
        found = checked_sequences(source, read_sequences(options.data, count, axes))[options.num_samples :]
    else:
        found = checked_sequences(source, source.calibration)
    length = options.tokens_per_call or source.chunk_size
    found = [sequence for sequence in found if len(sequence) >= length]
    if not found:
        where = (
            f"{options.data} has only the {options.num_samples} sequences of the parity check"
            if options.data
            else "MODEL has only the sequences of the parity check"
        )
        raise InputError(
            f"int8 calibration needs real sequences of at least one call ({length} tokens) that the parity check does "
            f"not use; {where}. Give more with --data, save some with nsm.save(model, path, samples=...), lower "
            "--num-samples, or give --precision int8-weights, which needs no calibration. Random sequences are not "
            "used: their ranges may differ from those of your streams."
        )
    check_enough(found, length)
    return found
