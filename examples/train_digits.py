"""Train an NSM to classify handwritten digits in a stream, and save it with real sequences for the export.

python examples/train_digits.py --output digits.pt
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import digits
import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.nn import functional

import nsm
from nsm.models import StreamModel

# Digits until the streams restart; until then the state is carried from update to update, without gradients.
DIGITS_PER_STREAM = 8


def build(adaptive: bool, width: int = 48, slots: int = 16) -> StreamModel:
    """Return a new model with `slots` slots per layer; if adaptive, it starts with them and uses up to 64."""
    sizes: dict[str, Any] = {
        "vocab_size": digits.VOCABULARY,
        "d_model": width,
        "output_dim": digits.CLASSES,
        "num_layers": 2,
        "num_heads": 4,
        "chunk_size": digits.CHUNK,
        "gate_type": "mingru",
    }
    if adaptive:
        return nsm.AdaptiveNSM(**sizes, state_dim=2 * width, max_states=64, initial_states=slots)
    return nsm.SimpleNSM(**sizes, num_states=slots)


def slots_in_use(model: StreamModel, ids: NDArray[np.int64]) -> str:
    """Return the mean number of active slots per layer at the end of streams [B, T], such as "12.5 + 3.0"."""
    with torch.no_grad():
        _, state = model(torch.from_numpy(ids), return_state=True)
    masks = [value for name, value in state.items() if name.endswith(".mask")]
    return " + ".join(f"{mask.sum(-1).double().mean():.1f}" for mask in masks)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default="digits.pt", show_default=True)
@click.option("--steps", default=1600, show_default=True, help="Updates of the weights.")
@click.option("--batch", default=64, show_default=True, help="Streams per batch.")
@click.option("--digits-per-update", default=1, show_default=True, help="Digits per backpropagation.")
@click.option("--learning-rate", default=4e-3, show_default=True)
@click.option("--adaptive", is_flag=True, help="Use banks that prune and allocate up to 64 slots.")
@click.option("--slots", type=click.IntRange(1, 64), default=16, show_default=True, help="Initial slots of a bank.")
@click.option("--width", default=48, show_default=True, help="d_model, a multiple of 8.")
@click.option("--seed", default=0, show_default=True)
def main(
    output: Path,
    steps: int,
    batch: int,
    digits_per_update: int,
    learning_rate: float,
    adaptive: bool,
    slots: int,
    width: int,
    seed: int,
) -> None:
    """Train on 1437 digits, test on 360 others, and save the model to OUTPUT."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    train, test = digits.load()
    model = build(adaptive, width, slots)
    optimiser = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, steps, pct_start=0.1)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    state, restart = None, DIGITS_PER_STREAM // digits_per_update
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}")) as progress:
        task = progress.add_task("training", total=steps, loss=float("nan"))
        for step in range(steps):
            picked = generator.integers(0, len(train.labels), batch * digits_per_update)
            images = digits.varied(train.images[picked], generator).reshape(batch, digits_per_update, 8, 8)
            ids = torch.from_numpy(digits.tokens(images).reshape(batch, -1))
            labels = torch.from_numpy(train.labels[picked].reshape(batch, digits_per_update))
            logits, state = model(ids, None if step % restart == 0 else state, return_state=True)
            state = {name: value.detach() for name, value in state.items()}
            asked = logits.view(batch, digits_per_update, digits.TOKENS, digits.CLASSES)[:, :, 64:]
            wanted = labels[:, :, None].expand(-1, -1, digits.CHUNK)
            loss = functional.cross_entropy(asked.flatten(0, 2), wanted.flatten())
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            progress.update(task, advance=1, loss=loss.item())
    model.eval()
    test_ids, test_labels = digits.streams(test, 8)
    accuracy = float((digits.classify(model, test_ids) == test_labels).mean())
    used = f", {slots_in_use(model, test_ids)} slots in use at the end of the streams" if adaptive else ""
    samples, _ = digits.streams(train, 40)
    nsm.save(model, output, samples=samples)
    parameters = sum(p.numel() for p in model.parameters())
    click.echo(f"{output}: {parameters:,} parameters, test accuracy {accuracy:.2%} on chained digits{used}")


if __name__ == "__main__":
    main()
