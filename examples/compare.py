"""Compare an exported NSM with the usual sequence models: time a token, and memory, on one backend, side by side.

python examples/compare.py --target openvino --output comparison

All models have about the same number of parameters and go through the same export and parity check. Weights are
untrained: time does not depend on them. The transformers are in their strong form: a call takes 16 new tokens, reads
a cache of N earlier ones in place, and gives their keys and values, which are written into it; nothing is copied.
Every model takes turns with the NSM in blocks, two sessions in a process, so whatever else the machine does hits both.
Memory is that of a process which does nothing but run the one model: Python, numpy, the backend, weights and state.
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
# NSM against the transformer of the same width, and against the narrow, deep one, as the project's goals and the
# claims about NSM have them, by context.
GOALS = {512: 1.15, 1024: 1.45, 2048: 2.2, 4096: 3.3, 16384: 12.0}
CLAIMS = {512: 1.5, 1024: 2.3, 2048: 3.7, 4096: 5.8}
# Calls after which a process has all the memory it needs: the state is allocated whole before the first.
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
    """Of one model. Times are medians over rounds, in microseconds; `ratio` is the median of the paired ratios of its
    time a call to the NSM's, `low` and `high` their quartiles. `resident_mb` is of a process of its own.
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
    """What is compared, by name; the NSM first."""
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
    """Export a model, with its parity checked on made-up streams."""
    from nsm.export import ExportOptions, export

    checkpoint = directory.with_suffix(".pt")
    nsm.save(model.eval(), checkpoint)
    export(checkpoint, ExportOptions([target], output=directory, num_samples=2, golden_steps=8))
    checkpoint.unlink()
    return directory


def measure(sessions: Mapping[str, Session], rounds: int, calls: int) -> dict[str, np.ndarray]:
    """Microseconds a call of `step` and of `decode`, by session: [2, rounds]."""
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
    """Resident memory of a fresh process that streams so many tokens, in MB; see `stream`."""
    command = [sys.executable, __file__, "--stream", str(bundle), "--target", target, "--tokens", str(tokens)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(result.stdout)
    return found


def stream(bundle: Path, target: str, tokens: int) -> dict[str, float]:
    """Stream tokens in this process and watch its resident memory; no torch here, which takes memory of its own.

    `rss_mb` is the most that was seen, every 100 steps and at the end; `range_mb` and `slope_mb`, of the second half
    against the first, are from step 1000 on, NaN for a stream that is shorter.
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
    """Times of every model but the first next to the first's, measured in turn: [2 models, 2 entries, rounds].

    Two sessions at a time: the threads and caches of others would be a part of what is measured.
    """
    base, *others = bundles
    times = {}
    for name in others:
        with nsm.open(bundles[base], target=target) as one, nsm.open(bundles[name], target=target) as other:
            measured = measure({base: one, name: other}, rounds, calls)
        times[name] = np.stack([measured[base], measured[name]])
    return times


def rows_of(bundles: Mapping[str, Path], target: str, rounds: int, calls: int) -> list[Row]:
    """Measure the times of every model next to the NSM, and then the memory of each by itself."""
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
    """The tables, for people."""
    console = Console(width=140)
    table = Table(title=f"{target}: 16 tokens a call", header_style="bold", box=None)
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
    goals = Table(title="against what was hoped for", header_style="bold", box=None)
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
    """Time a token over context, one line a family."""
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
    axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel=f"us a token ({target})")
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    low, high = axes.get_ylim()
    ticks = [tick for tick in (20, 50, 100, 200, 500, 1000, 2000, 5000) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def write_facts(output: Path, target: str, rows: list[Row], memory: Mapping[str, Mapping[str, float]]) -> None:
    """Everything that was measured, as OUTPUT.json."""
    facts = {"target": target, "rows": [asdict(row) for row in rows], "memory": memory}
    with replacing(output.with_suffix(".json")) as file:
        file.write((json.dumps(facts, indent=1) + "\n").encode())


def check_output(output: Path) -> None:
    """Raise `OutputExistsError` where OUTPUT.json or OUTPUT.png would replace what this script did not write."""
    facts, picture = output.with_suffix(".json"), output.with_suffix(".png")
    check_output_file(facts, "a table of this script", json_with("target", "rows", "memory"))
    if not facts.exists():
        check_output_file(picture)


@click.command()
@click.option("--target", default="openvino", show_default=True, help="openvino or onnxruntime.")
@click.option("--contexts", default=",".join(map(str, CONTEXTS)), show_default=True, help="Of the transformers.")
@click.option("--rounds", default=15, show_default=True)
@click.option("--calls", default=40, show_default=True, help="Calls a round of each model.")
@click.option("--tokens", default=1_000_000, show_default=True, help="Length of the NSM's stream; 0: leave it out.")
@click.option("--output", type=click.Path(path_type=Path), help="Write OUTPUT.json and OUTPUT.png.")
@click.option("--stream", "streamed", type=click.Path(path_type=Path), hidden=True)
def main(
    target: str, contexts: str, rounds: int, calls: int, tokens: int, output: Path | None, streamed: Path | None
) -> None:
    """Build all models, measure them in turn, and print the tables."""
    if streamed is not None:
        click.echo(json.dumps(stream(streamed, target, tokens)))
        return
    if output is not None:
        check_output(output)
    chosen = tuple(int(part) for part in contexts.split(","))
    with tempfile.TemporaryDirectory() as folder:
        bundles = {}
        with Progress() as progress:
            made = models(chosen)
            task = progress.add_task("exporting", total=len(made))
            for index, (name, model) in enumerate(made.items()):
                bundles[name] = make_bundle(model, target, Path(folder) / f"{index}.nsm")
                progress.advance(task)
            del made
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
