"""Train an NSM on associative recall over a distance that exceeds its windows.

    python examples/train_recall.py --output recall.pt

A stream has N key-value pairs among noise in its first 4 N tokens, then 48 tokens of noise, and asks for the N values
in its last 4 N tokens. Pairs and questions are at least 49 tokens apart; two layers with windows of 16 tokens and
convolutions of 4 reach 36 tokens back. A model that recalls the values has therefore kept the pairs in the bank. If
the bank is reset before the questions, the recall must fall to chance (1 in 32).
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from click.core import ParameterSource
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.nn import functional

import nsm
from nsm.modules.bank import GateType, Routing

CHUNK, GAP, PAIRS = 16, 48, 4
# Ids: 1 .. 15 noise, 16 .. 31 keys, 32 .. 63 values.
NOISE, KEYS, VALUES, VOCABULARY = 16, 16, 32, 64
NOT_ASKED = -100

Ids = NDArray[np.int64]


def batch(count: int, generator: np.random.Generator, pairs: int = PAIRS) -> tuple[Ids, Ids]:
    """Return streams and targets, [count, 8 * pairs + 48]: the values at the questions, NOT_ASKED elsewhere."""
    segment = 4 * pairs
    length = 2 * segment + GAP
    ids = generator.integers(1, NOISE, (count, length))
    wanted = np.full((count, length), NOT_ASKED)
    keys = generator.permuted(np.tile(np.arange(KEYS), (count, 1)), axis=1)[:, :pairs] + NOISE
    values = generator.integers(NOISE + KEYS, VOCABULARY, (count, pairs))
    places = generator.permuted(np.tile(np.arange(segment // 2) * 2, (count, 1)), axis=1)[:, :pairs]
    rows = np.arange(count)[:, None]
    ids[rows, places], ids[rows, places + 1] = keys, values
    order = generator.permuted(np.tile(np.arange(pairs), (count, 1)), axis=1)
    asked = length - segment + 4 * np.arange(pairs)
    ids[rows, asked], wanted[rows, asked] = keys[rows, order], values[rows, order]
    return ids, wanted


def pairs_at(update: int, updates: int, pairs: int) -> int:
    """Return the number of pairs with `--grow`: PAIRS at first, doubled after every fifth of the updates."""
    return min(pairs, PAIRS << 5 * update // updates)


def accuracy(logits: NDArray[np.float32], wanted: Ids) -> float:
    """Return the share of correct values at the questions."""
    asked = wanted != NOT_ASKED
    return float((logits.argmax(-1) == wanted)[asked].mean())


def chosen_options() -> str:
    """Return the options of the command line, without --output, as text."""
    context, words = click.get_current_context(), []
    for parameter in context.command.params:
        name = parameter.name or ""
        if name != "output" and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            value = context.params[name]
            for one in value if isinstance(value, tuple) else (value,):
                words += [parameter.opts[0]] if one is True else [parameter.opts[0], str(one)]
    return " ".join(words) or "the defaults"


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default="recall.pt", show_default=True)
@click.option("--steps", default=2000, show_default=True, help="Updates of the weights.")
@click.option("--pairs", type=click.IntRange(1, KEYS), default=PAIRS, show_default=True)
@click.option("--states", default=16, show_default=True, help="Slots per bank.")
@click.option("--width", default=64, show_default=True, help="d_model.")
@click.option("--state-dim", default=128, show_default=True)
@click.option("--routing-heads", default=4, show_default=True)
@click.option("--routing", default="softmax", show_default=True, help="softmax, sparsemax, entmax or topk.")
@click.option("--top-k", type=int, help="Slots per token, for --routing topk.")
@click.option("--gate", default="mingru", show_default=True, help="gru, lstm or mingru.")
@click.option("--consolidate-every", default=1, show_default=True, help="Chunks between consolidations; 0: never.")
@click.option("--communication", is_flag=True, help="Slots attend to each other during consolidation.")
@click.option(
    "--hierarchy",
    type=int,
    multiple=True,
    help="Period in chunks of a slower bank; repeatable. The banks share the slots.",
)
@click.option("--memory-rows", default=0, show_default=True, help="Rows of an external memory.")
@click.option("--streams", default=64, show_default=True, help="Streams per update.")
@click.option(
    "--grow", is_flag=True, help=f"Start with {PAIRS} pairs and double them after every fifth of the updates."
)
@click.option("--seed", default=0, show_default=True)
def main(
    output: Path,
    steps: int,
    pairs: int,
    states: int,
    width: int,
    state_dim: int,
    routing_heads: int,
    routing: Routing,
    top_k: int | None,
    gate: GateType,
    consolidate_every: int,
    communication: bool,
    hierarchy: tuple[int, ...],
    memory_rows: int,
    streams: int,
    grow: bool,
    seed: int,
) -> None:
    """Train on random streams, and save the model to OUTPUT."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    model = nsm.SimpleNSM(
        vocab_size=VOCABULARY,
        d_model=width,
        state_dim=state_dim,
        num_states=states,
        num_heads=4,
        chunk_size=CHUNK,
        gate_type=gate,
        routing_heads=routing_heads,
        routing=routing,
        top_k=top_k,
        consolidate_every=consolidate_every,
        communication=communication,
        hierarchy=hierarchy,
        memory_rows=memory_rows,
    )
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, steps)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("recall {task.fields[recall]:.3f}")) as progress:
        task = progress.add_task("training", total=steps, recall=0.0)
        for update in range(steps):
            ids, wanted = batch(streams, generator, pairs_at(update, steps, pairs) if grow else pairs)
            logits = model(torch.from_numpy(ids))
            loss = functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(wanted.flatten()))
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            progress.update(task, advance=1, recall=accuracy(logits.detach().numpy(), wanted))
    ids, wanted = batch(1000, generator, pairs)
    with torch.no_grad():
        found = accuracy(model.eval()(torch.from_numpy(ids)).numpy(), wanted)
    nsm.save(model, output, samples=ids[:16])
    parameters = sum(p.numel() for p in model.parameters())
    click.echo(
        f"{output}: {parameters:,} parameters, recall {found:.2%} of {1000 * pairs} questions, with {chosen_options()}"
    )


if __name__ == "__main__":
    main()
