"""Compare time per token and memory of an exported NSM with other sequence models, on one backend.

python examples/compare.py --target openvino --output comparison

All models have about the same number of parameters and pass the same export and parity check. Weights are untrained:
time does not depend on them. The transformers use an efficient cache: a call takes 16 new tokens, reads a cache of N
earlier tokens in place, and returns the new keys and values, which are written into the cache without a copy. The
script measures each model in turns with the NSM, two sessions in one process, so that other load affects both. Memory
is that of a process that runs only one model: Python, numpy, the backend, weights and state.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import nsm
from nsm.bundle import Bundle
from nsm.files import check_output_file, json_with, replacing
from nsm.runtimes.session import Session

if TYPE_CHECKING:
    from nsm.models import StepModel

BYTES = 256
CONTEXTS = (512, 1024, 2048, 4096, 16384)
# Speed of NSM relative to the transformer of the same width (the project's goals), and relative to the narrow, deep
# transformer (the claims about NSM), by context.
GOALS = {512: 1.15, 1024: 1.45, 2048: 2.2, 4096: 3.3, 16384: 12.0}
CLAIMS = {512: 1.5, 1024: 2.3, 2048: 3.7, 4096: 5.8}
# Calls after which memory is stable: the state is allocated before the first call.
SETTLED = 50

NSM: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": BYTES,
        "d_model": 384,
        "state_dim": 384,
        "num_states": 32,
        "num_heads": 8,
        "num_layers": 2,
        "feed_forward": 8.6,
        "gate_type": "mingru",
    }
)


@dataclass(frozen=True)
class Row:
    """Results of one model.

    Args:
        name, parameters: of the model.
        context: tokens of a transformer's context, None for other models.
        state_bytes: size of the state.
        resident_mb: resident memory of a process that runs only this model.
        call_us, decode_us: microseconds per call, median over rounds.
        ratio: median of the paired ratios of the time per call to the NSM's.
        low, high: quartiles of these ratios.
        decode_ratio: as `ratio`, for `decode`.
    """

    name: str
    parameters: int
    context: int | None
    state_bytes: int
    resident_mb: float
    call_us: float
    decode_us: float
    ratio: float
    low: float
    high: float
    decode_ratio: float


def models(contexts: tuple[int, ...]) -> dict[str, StepModel]:
    """Return the compared models by name; the NSM comes first."""
    import torch

    from nsm.baselines import RWKVLM, MambaLM, RecurrentLM, TransformerLM
    from nsm.models import SimpleNSM

    torch.manual_seed(0)
    found: dict[str, StepModel] = {"nsm": SimpleNSM(**NSM)}
    for context in contexts:
        found[f"transformer d=384 L=4, {context}"] = TransformerLM(BYTES, 384, 4, 8, context)
    for context in contexts:
        found[f"transformer d=256 L=10, {context}"] = TransformerLM(BYTES, 256, 10, 8, context)
    found["lstm L=4"] = RecurrentLM(BYTES, 472, 4, "lstm")
    found["gru L=4"] = RecurrentLM(BYTES, 544, 4, "gru")
    found["rwkv L=4"] = RWKVLM(BYTES, 384, 4, feed_forward=3.0)
    found["mamba L=8"] = MambaLM(BYTES, 368, 8)
    return found


def make_bundle(model: StepModel, target: str, directory: Path) -> Path:
    """Export a model, with its parity checked on random streams."""
    from nsm.export import ExportOptions, export

    checkpoint = directory.with_suffix(".pt")
    nsm.save(model.eval(), checkpoint)
    export(checkpoint, ExportOptions([target], output=directory, num_samples=2, golden_steps=8))
    checkpoint.unlink()
    return directory


def measure(sessions: Mapping[str, Session], rounds: int, calls: int) -> dict[str, np.ndarray]:
    """Measure microseconds per call of `step` and of `decode`, [2, rounds] by session."""
    times = {name: np.zeros((2, rounds)) for name in sessions}
    generator = np.random.default_rng(0)
    with Progress() as progress:
        task = progress.add_task("measuring", total=rounds + 1)
        for number in range(-1, rounds):  # the first round is a warm-up
            for name, session in sessions.items():
                step = session.spec.entry("step").inputs[0]
                tokens = generator.integers(0, BYTES, (step.shape[0], step.shape[1] * calls))
                session.reset()
                started = time.perf_counter()
                for call in range(calls):
                    session.step(tokens[:, call * step.shape[1] : (call + 1) * step.shape[1]])
                stepped = time.perf_counter()
                for call in range(calls):
                    session.decode(tokens[:, call : call + 1])
                if number >= 0:
                    times[name][:, number] = (stepped - started, time.perf_counter() - stepped)
            progress.advance(task)
    return {name: value / calls * 1e6 for name, value in times.items()}


def memory_of(bundle: Path, target: str, tokens: int) -> dict[str, float]:
    """Return the resident memory in MB of a new process that streams tokens; see `stream`."""
    command = [sys.executable, __file__, "--stream", str(bundle), "--target", target, "--tokens", str(tokens)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(result.stdout)
    return found


def stream(bundle: Path, target: str, tokens: int) -> dict[str, float]:
    """Stream tokens in this process, and measure its resident memory. Torch, which needs memory, is not imported.

    Returns:
        `rss_mb`, the maximum, sampled every 100 steps and at the end; `range_mb` and `slope_mb` (mean of the second
        half minus mean of the first half) from step 1000 on, NaN for a shorter stream; `tokens` and `seconds`.
    """
    resident = []
    with nsm.open(bundle, target=target) as session:
        length = session.spec.entry("step").inputs[0].shape[1]
        inputs = np.random.default_rng(0).integers(0, BYTES, (64, session.batch, length))
        started = time.perf_counter()
        for step in range(tokens // length):
            session.step(inputs[step % 64])
            if step % 100 == 0:
                resident.append(_resident_mb())
        took = time.perf_counter() - started
        settled = resident[10:]
        resident.append(_resident_mb())
    half = len(settled) // 2
    return {
        "rss_mb": float(np.max(resident)),
        "range_mb": float(np.ptp(settled)) if settled else float("nan"),
        "slope_mb": float(np.mean(settled[half:]) - np.mean(settled[:half])) if half else float("nan"),
        "tokens": tokens,
        "seconds": took,
    }


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def pairs_of(bundles: Mapping[str, Path], target: str, rounds: int, calls: int) -> dict[str, np.ndarray]:
    """Measure the first model against each other model, in turns: [2 models, 2 entries, rounds] by name of the other.

    Only two sessions are open at a time: the threads and cache use of more sessions would affect the times.
    """
    base, *others = bundles
    times = {}
    for name in others:
        with nsm.open(bundles[base], target=target) as one, nsm.open(bundles[name], target=target) as other:
            measured = measure({base: one, name: other}, rounds, calls)
        times[name] = np.stack([measured[base], measured[name]])
    return times


def rows_of(bundles: Mapping[str, Path], target: str, rounds: int, calls: int) -> list[Row]:
    """Measure the times of every model in turns with the NSM, then the memory of each model alone."""
    times = pairs_of(bundles, target, rounds, calls)
    base = np.concatenate([pair[0] for pair in times.values()], 1)
    rows = []
    for name, path in bundles.items():
        mine, theirs = times.get(name, (base, base))
        paired = theirs / mine
        low, ratio, high = np.quantile(paired[0], [0.25, 0.5, 0.75])
        call, decode = np.median(theirs, 1)
        context = int(name.rsplit(", ", 1)[1]) if "transformer" in name else None
        manifest = Bundle(path).manifest
        length = manifest.spec.entry("step").inputs[0].shape[1]
        rows.append(
            Row(
                name,
                manifest.model["parameters"],
                context,
                manifest.spec.state_nbytes,
                memory_of(path, target, SETTLED * length)["rss_mb"],
                call,
                decode,
                ratio,
                low,
                high,
                float(np.median(paired[1])),
            )
        )
    return rows


def show(rows: list[Row], target: str) -> None:
    """Print the tables."""
    console = Console(width=140)
    table = Table(title=f"{target}: 16 tokens per call", header_style="bold", box=None)
    columns = (
        "model",
        "parameters",
        "us/call",
        "us/token",
        "against nsm",
        "quartiles",
        "us/decode",
        "against",
        "state kB",
        "MB resident",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.parameters / 1e6:.2f} M",
            f"{row.call_us:.0f}",
            f"{row.call_us / 16:.1f}",
            f"{row.ratio:.2f}x",
            f"{row.low:.2f}-{row.high:.2f}",
            f"{row.decode_us:.0f}",
            f"{row.decode_ratio:.2f}x",
            f"{row.state_bytes / 1e3:,.0f}",
            f"{row.resident_mb:.0f}",
        )
    console.print(table)
    base = rows[0]
    goals = Table(title="measured ratios and goals", header_style="bold", box=None)
    for column in ("context", "same width", "goal", "narrow, deep", "claim", "state saved"):
        goals.add_column(column, justify="right")
    wide = {row.context: row for row in rows if "d=384 L=4" in row.name}
    deep = {row.context: row for row in rows if "d=256" in row.name}
    for context, row in wide.items():
        assert context is not None
        goals.add_row(
            f"{context:,}",
            f"{row.ratio:.2f}x",
            f"{GOALS[context]:.2f}x" if context in GOALS else "-",
            f"{deep[context].ratio:.2f}x",
            f"{CLAIMS[context]:.1f}x" if context in CLAIMS else "-",
            f"{1 - base.state_bytes / row.state_bytes:.1%}",
        )
    console.print(goals)


def plot(rows: list[Row], target: str, path: Path) -> None:
    """Plot the time per token over the context, one line per model family."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    contexts = sorted({row.context for row in rows if row.context is not None})
    for label, key in (("transformer, d=256, 10 layers", "d=256"), ("transformer, d=384, 4 layers", "d=384 L=4")):
        values = [row.call_us / 16 for row in rows if key in row.name]
        axes.plot(contexts, values, marker="o", label=label)
    for row in rows:
        if row.context is None:
            style: dict[str, Any] = (
                {"linewidth": 2.5, "color": "black"} if row.name == "nsm" else {"linestyle": "--", "linewidth": 1.2}
            )
            axes.plot(contexts, [row.call_us / 16] * len(contexts), label=row.name, **style)
    axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel=f"us per token ({target})")
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    low, high = axes.get_ylim()
    ticks = [tick for tick in (20, 50, 100, 200, 500, 1000, 2000, 5000) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def write_facts(output: Path, target: str, rows: list[Row], memory: Mapping[str, Mapping[str, float]]) -> None:
    """Write all measurements to OUTPUT.json."""
    facts = {"target": target, "rows": [asdict(row) for row in rows], "memory": memory}
    with replacing(output.with_suffix(".json")) as file:
        file.write((json.dumps(facts, indent=1) + "\n").encode())


def check_output(output: Path) -> None:
    """Raise `OutputExistsError` if OUTPUT.json or OUTPUT.png would replace a file that this script did not write."""
    facts, picture = output.with_suffix(".json"), output.with_suffix(".png")
    check_output_file(facts, "a table of this script", json_with("target", "rows", "memory"))
    if not facts.exists():
        check_output_file(picture)


@click.command()
@click.option("--target", default="openvino", show_default=True, help="openvino or onnxruntime.")
@click.option(
    "--contexts", default=",".join(map(str, CONTEXTS)), show_default=True, help="Contexts of the transformers."
)
@click.option("--rounds", default=15, show_default=True)
@click.option("--calls", default=40, show_default=True, help="Calls per round and model.")
@click.option(
    "--tokens", default=1_000_000, show_default=True, help="Tokens of the NSM's stream for memory; 0 skips it."
)
@click.option("--output", type=click.Path(path_type=Path), help="Write OUTPUT.json and OUTPUT.png.")
@click.option("--stream", "streamed", type=click.Path(path_type=Path), hidden=True)
def main(
    target: str, contexts: str, rounds: int, calls: int, tokens: int, output: Path | None, streamed: Path | None
) -> None:
    """Export all models, measure them in turns, and print the tables."""
    if streamed is not None:
        click.echo(json.dumps(stream(streamed, target, tokens)))
        return
    if output is not None:
        check_output(output)
    chosen = tuple(int(part) for part in contexts.split(","))
    with tempfile.TemporaryDirectory() as folder:
        bundles = {}
        with Progress() as progress:
            compared = models(chosen)
            task = progress.add_task("exporting", total=len(compared))
            for index, (name, model) in enumerate(compared.items()):
                bundles[name] = make_bundle(model, target, Path(folder) / f"{index}.nsm")
                progress.advance(task)
            del compared
        rows = rows_of(bundles, target, rounds, calls)
        show(rows, target)
        if output is not None:
            plot(rows, target, output.with_suffix(".png"))
            write_facts(output, target, rows, {})
        memory = {}
        if tokens:
            last = [name for name in bundles if "d=384 L=4" in name][-1]
            for name, count in (("nsm", tokens), (last, 16 * 2000)):
                memory[name] = memory_of(bundles[name], target, count)
                found = memory[name]
                click.echo(
                    f"{name}: {count:,} tokens in {found['seconds']:.0f} s, {found['rss_mb']:.1f} MB resident; "
                    f"from step 1000 on a range of {found['range_mb']:.2f} MB, "
                    f"second half minus first {found['slope_mb']:+.3f} MB"
                )
            if output is not None:
                write_facts(output, target, rows, memory)


if __name__ == "__main__":
    main()
