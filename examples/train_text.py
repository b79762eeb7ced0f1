"""Train a byte-level language model: an NSM of a million parameters, or a baseline of equal size on the same batches.

python examples/train_text.py --model nsm --output text.pt
python examples/train_text.py --model nsm-compared --output trained.pt        (the NSM of compare.py, 7.3 million)
nsm-export text.pt --target openvino && nsm run text.nsm --prompt "def "
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np
import text
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.nn import functional

import nsm
from nsm.models import StepModel

_VALIDATION_BATCHES = 16


@click.command()
@click.option("--model", "name", type=click.Choice(list(text.MODELS)), default="nsm", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Save the model here.")
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="A text file.  [default: Python's library]")
@click.option("--steps", type=click.IntRange(1), default=300, show_default=True, help="Updates of the weights.")
@click.option("--count", default=16, show_default=True, help="Sequences per batch.")
@click.option("--learning-rate", default=3e-3, show_default=True)
@click.option(
    "--embedding-std",
    type=click.FloatRange(0, min_open=True),
    help="Standard deviation of the initial embeddings.  [default: the model's]",
)
@click.option("--seed", default=0, show_default=True)
def main(
    name: str,
    output: Path | None,
    data: Path | None,
    steps: int,
    count: int,
    learning_rate: float,
    embedding_std: float | None,
    seed: int,
) -> None:
    """Train on windows of 256 bytes, and print the loss on held-out text in nats per byte."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    train, held_out = text.corpus(data)
    model = text.build(name)
    if embedding_std is not None:
        table = model.get_parameter("embed.weight")
        with torch.no_grad():
            table.mul_(embedding_std / table.std())
    if len(held_out) < 64 * model.chunk_size + 2:
        raise click.UsageError(
            f"The held-out tenth of the text has {len(held_out):,} bytes; expected at least "
            f"{64 * model.chunk_size + 2:,}. Give a longer text."
        )
    optimiser = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.1, betas=(0.9, 0.98))
    # OneCycleLR needs a warm-up of at least two steps.
    warm_up = min(0.3, max(0.1, 2 / steps))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, steps, pct_start=warm_up)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    started = time.perf_counter()
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}")) as progress:
        task = progress.add_task("training", total=steps, loss=float("nan"))
        for _ in range(steps):
            loss = _loss(model, *text.batch(train, count, text.CONTEXT, generator))
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            progress.update(task, advance=1, loss=loss.item())
    took = time.perf_counter() - started
    fixed = np.random.default_rng(1)
    with torch.no_grad():
        model.eval()
        losses = [
            float(_loss(model, *text.batch(held_out, 16, text.CONTEXT, fixed))) for _ in range(_VALIDATION_BATCHES)
        ]
    if output is not None:
        nsm.save(model, output, samples=text.batch(held_out, 16, 64 * model.chunk_size, fixed)[0])
    parameters = sum(p.numel() for p in model.parameters())
    click.echo(f"{name}: {parameters:,} parameters, held out {np.mean(losses):.4f} nats per byte, {took:.0f} s")


def _loss(model: StepModel, ids: text.Ids, wanted: text.Ids) -> torch.Tensor:
    logits = model(torch.from_numpy(ids))
    return functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(wanted.flatten()))


if __name__ == "__main__":
    main()
