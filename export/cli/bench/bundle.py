"""`nsm bench BUNDLE`: measure a bundle's targets, also against another bundle or PyTorch."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from nsm.bundle import Bundle
from nsm.errors import DeviceUnavailableError, InputError, MissingDependencyError, ParityError
from nsm.export.report import Terminal, lanes_of, size
from nsm.manifest import Artifact
from nsm.results import Ratio
from nsm.runtimes import find_target
from nsm.runtimes.bench import Latency, Steppable, bench, check_steps, fresh_peak_mb, paired_ratio
from nsm.runtimes.opening import open_artifact, refuse_failed
from nsm.spec import VALID, TensorSpec
from nsm.trace import Array

PYTORCH = ("eager", "compile")
"""Values of `--against` other than bundles."""

COLUMNS = ("target", "precision", "p50 us", "p90 us", "p99 us", "tokens/s", "speed", "decode us", "memory", "size")


@dataclass(frozen=True)
class Entrant:
    """One participant of a benchmark, and the facts known before the measurement.

    Args:
        name: display name, also used for `ratio.against` of other entrants.
        target: target of the artifact; "eager" or "compile" for PyTorch.
        precision, effective_precision: requested and effective precision of the artifact.
        stream: a session, or an object with the same calls.
        artifact_mb: size of the artifact's files in MB; None for PyTorch.
        peak_rss_mb: peak memory in MB of a process that runs only this artifact; None for PyTorch.
        threads: number of threads; None if the library chose it.
    """

    name: str
    target: str
    precision: str
    effective_precision: str
    stream: Steppable
    artifact_mb: float | None = None
    peak_rss_mb: float | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Measured:
    """Results: speed relative to `against` for `step` and `decode`, None without a baseline."""

    entrant: Entrant
    latency: Latency
    against: str | None = None
    ratio: Ratio | None = None
    decode_ratio: Ratio | None = None

    def to_json(self, steps: int) -> dict[str, Any]:
        """Return the result; other tools rely on these keys."""
        entrant, latency, decode = self.entrant, self.latency, self.latency.decode
        spec = entrant.stream.spec
        return {
            "target": entrant.target,
            "precision": entrant.precision,
            "effective_precision": entrant.effective_precision,
            "steps": steps,
            "batch": spec.batch,
            "tokens_per_call": spec.entry("step").inputs[0].shape[1],
            "latency_us": _percentiles(latency),
            "tokens_per_second": latency.tokens_per_second,
            "decode_us": None if decode is None else {**_percentiles(decode), "call": decode.call_us},
            "ratio": self._beside(self.ratio),
            "decode_ratio": self._beside(self.decode_ratio),
            "state_bytes": spec.state_nbytes,
            "threads": entrant.threads,
            "peak_rss_mb": entrant.peak_rss_mb,
            "artifact_mb": entrant.artifact_mb,
        }

    def _beside(self, ratio: Ratio | None) -> dict[str, Any] | None:
        return None if ratio is None else {"against": self.against, **asdict(ratio)}


def bench_bundle(
    path: Path,
    targets: Sequence[str],
    precisions: Sequence[str],
    steps: int,
    threads: int | None,
    against: str | None,
    model: Path | None,
    as_json: bool,
) -> None:
    """Measure; see `nsm bench --help`."""
    check_options(steps, threads)
    _check_against(against, model)
    terminal = Terminal(quiet=as_json)
    if path.is_file():
        raise InputError(
            f"{path} is a file; a bundle is a directory written by nsm-export. To measure every target of a "
            f"checkpoint: nsm bench --all {path}"
        )
    bundle = Bundle(path)
    bundle.verify()
    tokens = lane_tokens(bundle)
    with ExitStack() as stack:
        entrants = _open_targets(bundle, targets, precisions, threads, terminal, stack)
        rivals: list[Entrant] = []
        beside: list[int | None] = [None, *[0] * (len(entrants) - 1)]
        if against in PYTORCH and model is not None:
            rivals = [_open_pytorch(against, model, bundle, tokens, threads, terminal, stack)]
            beside = [len(entrants)] * len(entrants)
        elif against is not None:
            rivals, chosen = _open_rivals(Path(against), bundle, entrants, threads, terminal, stack)
            beside = [len(entrants) + index for index in chosen]
        everyone = [*entrants, *rivals]
        with terminal.stage("Measuring in turns") as progress:
            latencies = bench([item.stream for item in everyone], steps, tokens, progress)
    found = [
        compared(entrant, latency, None if index is None else (everyone[index].name, latencies[index]))
        for entrant, latency, index in zip(everyone, latencies, [*beside, *[None] * len(rivals)], strict=True)
    ]
    if as_json:
        rows = [item.to_json(steps) for item in found]
        other = {"against": rows[len(entrants) :]} if rivals else {}
        click.echo(json.dumps({"threads": threads, "results": rows[: len(entrants)], **other}))
        return
    terminal.say()
    terminal.table(COLUMNS, [_row(item) for item in found], heading(found, steps))
    explain(terminal, " or ".join(dict.fromkeys(item.against for item in found if item.against)))


def check_options(steps: int, threads: int | None) -> None:
    """Raise `InputError` for an invalid number of steps or threads."""
    check_steps(steps)
    if threads is not None and threads < 1:
        raise InputError(f"--threads must be at least 1; given {threads}.")


def lane_tokens(bundle: Bundle) -> Array:
    """Return the recorded inputs for every lane, [T, B, K, ...]."""
    inputs = dict(bundle.trace().inputs)
    inputs.pop(VALID, None)
    (tokens,) = inputs.values()
    lanes = np.resize(np.arange(len(tokens)), bundle.manifest.spec.batch)
    return np.ascontiguousarray(np.swapaxes(tokens[lanes], 0, 1))


def open_entrant(bundle: Bundle, artifact: Artifact, name: str, threads: int | None, stack: ExitStack) -> Entrant:
    """Open an artifact with verified files, and measure its memory; `stack` closes it.

    Raises:
        DeviceUnavailableError, MissingDependencyError: the artifact does not run on this machine.
        RunError: the process that measures the memory failed.
    """
    session = stack.enter_context(open_artifact(bundle, artifact, threads=threads))
    peak = fresh_peak_mb(bundle.path, artifact.target, artifact.precision, threads)
    effective = session.effective_precision
    size = artifact.nbytes / 1e6
    return Entrant(name, artifact.target, artifact.precision, effective, session, size, peak, session.threads)


def compared(entrant: Entrant, latency: Latency, against: tuple[str, Latency] | None) -> Measured:
    """Compare an entrant with `against`, the name and latency of another entrant of the same `bench`."""
    if against is None:
        return Measured(entrant, latency)
    name, other = against
    both = latency.decode, other.decode
    decode = None if both[0] is None or both[1] is None else paired_ratio(both[1].rounds_us, both[0].rounds_us)
    return Measured(entrant, latency, name, paired_ratio(other.rounds_us, latency.rounds_us), decode)


def heading(found: Sequence[Measured], steps: int) -> str:
    """Return the title of a table of results."""
    entry = found[0].entrant.stream.spec.entry("step").inputs[0]
    threads = {item.entrant.threads for item in found}
    (same,) = threads if len(threads) == 1 else (None,)
    used = "" if same is None else f", {same} thread" + "s" * (same > 1)
    return (
        f"{steps} calls of {entry.shape[1]} tokens on {lanes_of(entry.shape[0])}{used}, "
        f"in {len(found[0].latency.rounds_us)} rounds, in turns"
    )


def speed(ratio: Ratio | None) -> str:
    """Format a ratio as `1.31x (1.28-1.36)`; a dash for None."""
    return "-" if ratio is None else f"{ratio.median:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})"


def decode_us(latency: Latency) -> str:
    """Format the microseconds per single token; a dash for a model without `decode`."""
    return "-" if latency.decode is None else f"{latency.decode.call_us:.0f}"


def explain(terminal: Terminal, against: str) -> None:
    """Print the legend of the table; `against` is the baseline of `speed`, if any."""
    lines = ["decode: microseconds per single token, commits included"]
    if against:
        lines.insert(0, f"speed: relative to {against} in the same round, median and 95 % interval over rounds")
    terminal.say("\n" + ";\n".join(lines) + ".")


def _percentiles(latency: Latency) -> dict[str, float]:
    return {"p50": latency.p50_us, "p90": latency.p90_us, "p99": latency.p99_us}


def _row(found: Measured) -> list[str]:
    entrant, latency = found.entrant, found.latency
    return [
        entrant.name,
        entrant.precision,
        f"{latency.p50_us:.0f}",
        f"{latency.p90_us:.0f}",
        f"{latency.p99_us:.0f}",
        f"{latency.tokens_per_second:,.0f}",
        speed(found.ratio) if found.against else "1.00x",
        decode_us(latency),
        "-" if entrant.peak_rss_mb is None else f"{entrant.peak_rss_mb:.0f} MB",
        "-" if entrant.artifact_mb is None else size(entrant.artifact_mb * 1e6),
    ]


def _check_against(against: str | None, model: Path | None) -> None:
    if against in PYTORCH:
        if model is None:
            raise InputError(
                f"--against {against} runs the model in PyTorch and needs the checkpoint of the bundle. Give it: "
                f"--against {against} --model model.pt"
            )
        if importlib.util.find_spec("torch") is None:
            raise MissingDependencyError(
                f"--against {against} needs torch, which is not installed. "
                'Install it with: pip install "nsm-toolkit[torch]"'
            )
    elif model is not None:
        raise InputError(
            f"--model is used with --against {' or '.join(PYTORCH)} only. Add one of them, or leave out --model."
        )


def _open_targets(
    bundle: Bundle,
    targets: Sequence[str],
    precisions: Sequence[str],
    threads: int | None,
    terminal: Terminal,
    stack: ExitStack,
) -> list[Entrant]:
    """Open the artifacts of these targets and precisions; without targets, all that run on this machine."""
    entrants: list[Entrant] = []
    failed: ParityError | None = None
    for artifact in bundle.artifacts([find_target(name).name for name in targets], precisions):
        try:
            refuse_failed(bundle.path, artifact)
            with terminal.stage(f"Opening {artifact.label}"):
                entrants.append(open_entrant(bundle, artifact, artifact.label, threads, stack))
        except (DeviceUnavailableError, MissingDependencyError, ParityError) as error:
            if targets:
                raise
            failed = error if isinstance(error, ParityError) else failed
            terminal.remark(f"{artifact.label}: not measured. {error}")
    if not entrants:
        raise failed or DeviceUnavailableError("None of the bundle's targets runs on this machine.")
    return entrants


def _open_rivals(
    path: Path, bundle: Bundle, entrants: Sequence[Entrant], threads: int | None, terminal: Terminal, stack: ExitStack
) -> tuple[list[Entrant], list[int]]:
    """Open another bundle's artifacts; return them, and the index of the rival of each entrant. See `_rival_of`."""
    other = Bundle(path)
    other.verify()
    mine, theirs = (item.manifest.spec.entry("step").inputs[0] for item in (bundle, other))
    if _inputs(mine) != _inputs(theirs):
        raise InputError(
            f"{path} takes inputs {_inputs(theirs)}; expected {_inputs(mine)}, as {bundle.path}. Export models over "
            "the same tokens with the same --batch and --tokens-per-call."
        )
    wanted = [_rival_of(item, other) for item in entrants]
    rivals = {}
    for artifact in wanted:
        name = f"{path.resolve().name}: {artifact.label}"
        if artifact.label not in rivals:
            refuse_failed(path, artifact)
            with terminal.stage(f"Opening {name}"):
                rivals[artifact.label] = open_entrant(other, artifact, name, threads, stack)
    return list(rivals.values()), [list(rivals).index(artifact.label) for artifact in wanted]


def _rival_of(entrant: Entrant, other: Bundle) -> Artifact:
    """Choose an artifact of another bundle: same target and precision, else same target, else first that passed."""
    same = [item for item in other.manifest.artifacts if item.target == entrant.target]
    exact = [item for item in same if item.precision == entrant.precision]
    return exact[0] if exact else other.preferred(same) if same else other.artifact()


def _open_pytorch(
    kind: str,
    model: Path,
    bundle: Bundle,
    tokens: Array,
    threads: int | None,
    terminal: Terminal,
    stack: ExitStack,
) -> Entrant:
    from nsm.export.sources import compiled_session, load_matching, model_session, torch_threads

    with terminal.stage("Compiling with torch" if kind == "compile" else "Loading into torch"):
        reference = load_matching(model, bundle)
        stack.enter_context(torch_threads(threads))
        spec, identity = bundle.manifest.spec, bundle.manifest.fingerprint
        stream = (
            compiled_session(reference, spec, identity, tokens)
            if kind == "compile"
            else model_session(reference, spec, identity)
        )
    return Entrant(kind, kind, "fp32", "fp32", stream, threads=threads)


def _inputs(item: TensorSpec) -> str:
    bounds = "" if item.minimum is None else f" of {item.minimum} .. {item.maximum}"
    return f"{item.dtype}{list(item.shape)}{bounds}"
