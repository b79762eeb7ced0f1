"""Export five common kinds of plain PyTorch models with as_step; print errors, speed, and int8.

    python examples/foreign_models.py

The models do not use nsm. Their weights are random: the table shows that the export works, and the time of a step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import nsm
from nsm import Carried
from nsm.errors import NsmError
from nsm.export.cli.bench import lane_tokens
from nsm.runtimes.bench import bench

TARGETS = ("onnxruntime", "openvino")


class VoiceActivity(nn.Module):
    """Voice activity [B, 1] of frames of 512 samples [B, 512]: convolutions within a frame, a GRU over frames."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(1, 64, 64, 32), nn.ReLU(), nn.Conv1d(64, 64, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(448, 128)
        )
        self.memory = nn.GRUCell(128, 128)
        self.head = nn.Linear(128, 1)

    def forward(self, frame: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.memory(self.features(frame[:, None]), hidden)
        return torch.sigmoid(self.head(hidden)), hidden


class Recurrent(nn.Module):
    """A language model: ids [B, T] -> logits [B, T, 256], four layers of LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 256)
        self.memory = nn.LSTM(256, 256, num_layers=4, batch_first=True)
        self.head = nn.Linear(256, 256)

    def forward(self, ids: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        outputs, state = self.memory(self.embed(ids), state)
        return self.head(outputs), state


class StateSpace(nn.Module):
    """A selective state-space layer (as in Gu & Dao 2023), token by token: x [B, 128] -> [B, 128]."""

    def __init__(self, width: int = 128, inner: int = 256, size: int = 16) -> None:
        super().__init__()
        self.enter = nn.Linear(width, 2 * inner)
        self.kernel = nn.Parameter(torch.randn(inner, 4) * 0.5)
        self.chosen = nn.Linear(inner, 2 * size + 1)
        self.decay = nn.Parameter(torch.log(torch.arange(1.0, size + 1)).repeat(inner, 1))
        self.leave = nn.Linear(inner, width)
        self.size = size

    def forward(self, x: Tensor, tail: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, gate = self.enter(x).chunk(2, -1)
        tail = torch.cat([tail[:, :, 1:], value[:, :, None]], -1)
        value = functional.silu((tail * self.kernel).sum(-1))
        b, c, step = self.chosen(value).split([self.size, self.size, 1], -1)
        step = functional.softplus(step)[:, :, None]
        kept = torch.exp(-step * torch.exp(self.decay))
        memory = kept * memory + step * value[:, :, None] * b[:, None]
        return x + self.leave((memory * c[:, None]).sum(-1) * functional.silu(gate)), tail, memory


class TimeMix(nn.Module):
    """An RWKV-like layer (Peng et al. 2023), token by token, in the step protocol: x [B, 128] -> [B, 128]."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.rand(3, width))
        self.receive, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width, bias=False)
        self.rate = nn.Parameter(torch.linspace(-3, 1, width))
        self.width = width

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        return {name: torch.zeros(batch, self.width) for name in ("before", "numerator", "denominator")}

    def step(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        r, k, v = (x * m + state["before"] * (1 - m) for m in self.mix)
        weight = torch.exp(self.key(k).clamp(max=20))
        kept = torch.exp(-torch.exp(self.rate))
        numerator = kept * state["numerator"] + weight * self.value(v)
        denominator = kept * state["denominator"] + weight
        answer = torch.sigmoid(self.receive(r)) * numerator / (denominator + 1e-6)
        return x + self.out(answer), {"before": x, "numerator": numerator, "denominator": denominator}


class Cached(nn.Module):
    """Attention over a carried cache of the last 64 keys and values: x [B, 128] -> [B, 128]."""

    def __init__(self, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, filled: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.project(self.norm(x)).chunk(3, -1))
        keys = torch.cat([keys[:, :, 1:], k[:, :, None]], 2)
        values = torch.cat([values[:, :, 1:], v[:, :, None]], 2)
        filled = torch.cat([filled[:, 1:], torch.ones_like(filled[:, :1])], 1)
        scores = (keys @ q[..., None]).squeeze(-1) * q.shape[-1] ** -0.5
        shares = scores.masked_fill(filled[:, None] == 0, -1e9).softmax(-1)
        x = x + self.out((shares[:, :, None] @ values).flatten(1))
        return x + self.feed_forward(x), keys, values, filled


def voice() -> nsm.adapters.AdaptedModel:
    return nsm.as_step(VoiceActivity(), [Carried("hidden", torch.zeros(1, 128))], token_shape=(512,))


def recurrent() -> nsm.adapters.AdaptedModel:
    states = [(Carried("hidden", torch.zeros(4, 1, 256), 1), Carried("cell", torch.zeros(4, 1, 256), 1))]
    return nsm.as_step(Recurrent(), states, vocab_size=256, timed=True)


def state_space() -> nsm.adapters.AdaptedModel:
    return nsm.as_step(StateSpace(), [torch.zeros(1, 256, 4), torch.zeros(1, 256, 16)], token_shape=(128,))


def time_mix() -> nsm.adapters.AdaptedModel:
    return nsm.as_step(TimeMix(), token_shape=(128,))


def cached() -> nsm.adapters.AdaptedModel:
    cache = torch.zeros(1, 4, 64, 32)
    return nsm.as_step(Cached(), [cache, cache, torch.zeros(1, 64)], token_shape=(128,))


MODELS: dict[str, Callable[[], nsm.adapters.AdaptedModel]] = {
    "conv + GRU voice activity, frames of 512": voice,
    "LSTM, 4 layers, any number of ids": recurrent,
    "selective state space (Mamba-like)": state_space,
    "time mixing (RWKV-like), step protocol": time_mix,
    "attention, cache of 64": cached,
}


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    model: str
    parameters: int
    precision: str
    target: str
    error: str
    step_us: str


def rows_of(name: str, folder: Path, steps: int) -> list[Row]:
    """Export one model in fp32 and int8 on all targets, and measure it."""
    torch.manual_seed(0)
    model = MODELS[name]()
    parameters = sum(p.numel() for p in model.module.parameters())
    random = np.random.default_rng(0)
    spec = model.token_spec
    shape = (16, 32 * steps, *spec.shape) if model.timed else (16, steps, *spec.shape)
    samples: np.ndarray = random.standard_normal(shape).astype(np.float32)
    if spec.maximum is not None:
        samples = random.integers(0, spec.maximum + 1, shape)
    rows = []
    for precision in ("fp32", "int8"):
        for target in TARGETS:
            output = folder / f"{len(list(folder.iterdir()))}.nsm"
            try:
                bundle = nsm.export_model(
                    model, target, output, samples, precision=precision, golden_steps=steps, allow_slower=True
                )
            except NsmError as error:
                rows.append(Row(name, parameters, precision, target, str(error).split(". ")[0][:60], "-"))
                continue
            measured = bundle.manifest.artifacts[0].parity.free_run
            assert measured is not None
            with nsm.open(bundle) as session:
                (latency,) = bench([session], 200, lane_tokens(bundle))
            rows.append(Row(name, parameters, precision, target, f"{measured.p99:.1e}", f"{latency.call_us:.0f}"))
    return rows


@click.command()
@click.option("--steps", default=64, show_default=True, help="Calls per golden stream.")
@click.option("--only", help="Only models whose name contains this text.")
def main(steps: int, only: str | None) -> None:
    """Export the models, and print a table."""
    console = Console()
    table = Table("model", "parameters", "precision", "target", "free-run p99, or error", "us per step", box=None)
    names = [name for name in MODELS if only is None or only in name]
    with tempfile.TemporaryDirectory() as folder:
        for name in track(names, "exporting", console=Console(stderr=True)):
            for row in rows_of(name, Path(folder), steps):
                table.add_row(row.model, f"{row.parameters:,}", row.precision, row.target, row.error, row.step_us)
    console.width = max(console.width, 150)
    console.print(table)


if __name__ == "__main__":
    main()
