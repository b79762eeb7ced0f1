"""Small models that each show one publicly reported fault of streaming deployment; `CASES` lists them.

The models do not use nsm. Every module takes one token x [B, width] and its states, and returns the outputs and the
new states, unless its docstring says otherwise.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from nsm import Carried

WIDTH = 6
Right = Literal["equal", "refused", "stops"]


@dataclass(frozen=True)
class Case:
    """A model and the reports that it represents.

    Args:
        name: short name for the table.
        reports: `owner/repository#number` each; empty if the case was found in this project.
        build: returns the module in eval mode, and its declared states as `nsm.as_step` takes them.
        right: the correct verdicts: "equal" (outputs equal the loop's), "refused" (an error before the stream runs),
            "stops" (an error at the end of a table).
        options: further arguments of `nsm.as_step`.
        steps: tokens per lane.
    """

    name: str
    reports: tuple[str, ...]
    build: Callable[[], tuple[nn.Module, Any]]
    right: tuple[Right, ...]
    options: Mapping[str, Any] = field(default_factory=lambda: {"token_shape": (WIDTH,)})
    steps: int = 500


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(1, *shape, dtype=dtype)


def count() -> Tensor:
    """Return a counter for one lane, int64 [1]."""
    return torch.zeros(1, dtype=torch.int64)


class Leaky(nn.Module):
    """h' = tanh(W x + h/2), y = 2 h': the base of the models below."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def advance(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.linear(x) + 0.5 * h)
        return 2 * h, h


# -- states that are not an argument and a result ----------------------------------------------------------------------


class HiddenBuffer(nn.Module):
    """Keeps a queue in a registered buffer, which forward updates by `how`, and one declared state."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.queue: Tensor
        self.register_buffer("queue", torch.zeros(1, 4, WIDTH))
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, h: Tensor) -> Any:
        after = torch.cat([self.queue[:, 1:], x[:1, None]], 1)
        if self.how == "assigned":
            self.queue = after
        elif self.how == "copied into":
            self.queue.copy_(after)
        else:
            self.queue.mul_(0.9).add_(x[:1, None])
        h = torch.tanh(self.linear(x) + 0.5 * h + self.queue.mean(1))
        return 2 * h, h


class ShadowAttribute(Leaky):
    """Has an attribute that every call overwrites before reading it, so it carries no state."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = torch.zeros(0)

    def forward(self, x: Tensor, h: Tensor) -> Any:
        self.memory = h
        self.memory = 0.9 * self.memory + self.linear(x)
        return (self.memory > 0).float() + self.memory, self.memory


class PythonCounter(Leaky):
    """Counts its calls in a Python attribute, and negates its outputs from call 50 on."""

    calls = 0

    def forward(self, x: Tensor, h: Tensor) -> Any:
        self.calls += 1
        y, h = self.advance(x, h)
        return (y if self.calls < 50 else -y), h


class _Window:
    """A cache class with a Python integer, as in libraries for language models."""

    def __init__(self) -> None:
        self.seen = 0


class PythonWindow(nn.Module):
    """Attention over the last 16 tokens; their number is a Python integer, which tracing freezes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 3 * WIDTH)
        self.window = _Window()

    def forward(self, x: Tensor, past: Tensor) -> Any:
        query, key, value = self.linear(x).chunk(3, -1)
        past = torch.cat([past[:, 1:], torch.cat([key, value], -1)[:, None]], 1)
        self.window.seen = min(self.window.seen + 1, 16)
        keys, values = past[:, -self.window.seen :].chunk(2, -1)
        weights = torch.einsum("bd,btd->bt", query, keys).softmax(-1)
        return torch.einsum("bt,btd->bd", weights, values), past


class DroppedState(nn.Module):
    """Carries h of an LSTM cell, and starts c from zero in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(WIDTH, WIDTH)

    def forward(self, x: Tensor, h: Tensor) -> Any:
        h, _ = self.cell(x, (h, torch.zeros_like(h)))
        return h + 0, h


class NeverRead(Leaky):
    """Returns a second state that it never reads."""

    def forward(self, x: Tensor, h: Tensor, unused: Tensor) -> Any:  # noqa: ARG002
        y, h = self.advance(x, h)
        return y, h, h * 3


class InPlace(Leaky):
    """Modifies its state argument in place."""

    def forward(self, x: Tensor, h: Tensor) -> Any:
        h.mul_(0.5).add_(self.linear(x))
        return torch.tanh(h), h


class GrowingCache(nn.Module):
    """Concatenates to a cache without a limit."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, past: Tensor) -> Any:
        past = torch.cat([past, self.linear(x)[:, None]], 1)
        return past.mean(1), past


class Random(Leaky):
    """Draws random numbers by `how`, even in eval mode."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor, h: Tensor) -> Any:
        x = functional.dropout(x, 0.2, training=True) if self.how == "dropout" else x + 0.01 * torch.rand_like(x)
        return self.advance(x, h)


# -- lanes -------------------------------------------------------------------------------------------------------------


class FirstLanePosition(Leaky):
    """Uses the position of lane 0 for all lanes."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", torch.randn(16, WIDTH))

    def forward(self, x: Tensor, h: Tensor, position: Tensor) -> Any:
        y, h = self.advance(x + self.table.index_select(0, position[:1] % 16), h)
        return y, h, position + 1


class MixedLanes(Leaky):
    """Mixes states over the lanes by `how`."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.norm = nn.BatchNorm1d(WIDTH, affine=False, track_running_stats=False)

    def forward(self, x: Tensor, h: Tensor) -> Any:
        mixed = {
            "mean": lambda: h.mean(0, keepdim=True),
            "rolled": lambda: h.roll(1, 0),
            "first": lambda: h[:1],
            "scaled": lambda: h / (1 + h.abs().amax()),
        }[self.how]()
        return self.advance(x, mixed.expand_as(h))


class NoRunningStatistics(Leaky):
    """BatchNorm without running statistics normalises over the lanes of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, track_running_stats=False)

    def forward(self, x: Tensor, h: Tensor) -> Any:
        y, h = self.advance(x, h)
        return self.norm(y), h


class AttentionOverLanes(nn.Module):
    """nn.MultiheadAttention without batch_first over a cache [B, T, D]: it attends over the lanes."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, cache: Tensor) -> Any:
        y = self.attention(cache, cache, cache, need_weights=False)[0].mean(1)
        return self.linear(x) + y, torch.cat([cache[:, 1:], x[:, None]], 1)


class OwnPosition(Leaky):
    """The correct version of `FirstLanePosition`: every lane has its own position."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", torch.randn(16, WIDTH))

    def forward(self, x: Tensor, h: Tensor, position: Tensor) -> Any:
        y, h = self.advance(x + self.table[position % 16], h)
        return y, h, position + 1


# -- pairs -------------------------------------------------------------------------------------------------------------


class Cell(nn.Module):
    """An LSTM cell whose state is a mapping, returned in another order of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(WIDTH, WIDTH)

    def forward(self, x: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        h, c = self.cell(x, (state["h"], state["c"]))
        return torch.tanh(h), {"c": c, "h": h}


class OrderedCell(Cell):
    """Like `Cell`, with an OrderedDict."""

    def forward(self, x: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        y, after = super().forward(x, state)
        return y, OrderedDict(after)


class PositionalCell(nn.Module):
    """forward(x, h, c), declared as c and h."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(WIDTH, WIDTH)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        h, c = self.cell(x, (h, c))
        return torch.tanh(h), h, c


# -- counters and tables -----------------------------------------------------------------------------------------------


class SampleCounter(Leaky):
    """Computes a phase from a sample counter, 441 samples per frame."""

    def forward(self, x: Tensor, n: Tensor, h: Tensor) -> Any:
        phase = (n % 1000).to(torch.float32) / 1000
        y, h = self.advance(x + phase[:, None], h)
        return y, n + 441, h


class SampleRing(nn.Module):
    """A ring buffer whose position is n // 441 % 16."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, n: Tensor, ring: Tensor) -> Any:
        place = torch.div(n, 441, rounding_mode="floor") % 16
        ring = ring.scatter(1, place[:, None, None].expand(-1, 1, WIDTH), x[:, None])
        read = (place + 13) % 16
        return self.linear(ring.gather(1, read[:, None, None].expand(-1, 1, WIDTH))[:, 0]), n + 441, ring


class Table(nn.Module):
    """Writes each token at its position in a table of 100 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, table: Tensor, position: Tensor) -> Any:
        index = position[:, None, None].expand(-1, 1, WIDTH)
        table = table.scatter(1, index, self.linear(x)[:, None])
        return table.sum(1), table, position + 1


class StaticCache(nn.Module):
    """Attention over a cache of 64 positions, written at the current position and masked after it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Any:
        query, key, value = self.linear(x).chunk(3, -1)
        index = position[:, None, None].expand(-1, 1, WIDTH)
        keys, values = keys.scatter(1, index, key[:, None]), values.scatter(1, index, value[:, None])
        scores = torch.einsum("bd,btd->bt", query, keys) / math.sqrt(WIDTH)
        scores = scores.masked_fill(torch.arange(64) > position[:, None], -math.inf)
        return torch.einsum("bt,btd->bd", scores.softmax(-1), values), keys, values, position + 1


class LearnedPositions(Leaky):
    """A table of 128 learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(128, WIDTH)

    def forward(self, x: Tensor, h: Tensor, position: Tensor) -> Any:
        y, h = self.advance(x + self.positions(position), h)
        return y, h, position + 1


class Ring(nn.Module):
    """A ring buffer of 16, written at its position, read 13 positions later; the position wraps around in the state."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, place: Tensor, ring: Tensor) -> Any:
        ring = ring.scatter(1, place[:, None, None].expand(-1, 1, WIDTH), x[:, None])
        read = (place + 13) % 16
        return (
            self.linear(ring.gather(1, read[:, None, None].expand(-1, 1, WIDTH))[:, 0]),
            (place + 1) % 16,
            ring,
        )


class ScalarCounter(Leaky):
    """A counter of shape [], one for all lanes."""

    def forward(self, x: Tensor, h: Tensor, n: Tensor) -> Any:
        y, h = self.advance(x + (n % 10).to(torch.float32) / 10, h)
        return y, h, n + 1


# -- operators ---------------------------------------------------------------------------------------------------------


class GateOrder(nn.Module):
    """nn.GRU inside a module, any number of tokens per call: x [B, T, width], h [1, B, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor, h: Tensor) -> Any:
        return self.memory(x, h)


class Projected(nn.Module):
    """nn.LSTM with projections, one token per call."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(WIDTH, 12, num_layers=2, proj_size=5)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        y, (h, c) = self.memory(x[None], (h, c))
        return y[0], h, c


class Spectrum(nn.Module):
    """A GRU over the magnitude spectrum of overlapping frames."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.GRUCell(17, 17)
        self.linear = nn.Linear(17, 4)

    def forward(self, x: Tensor, past: Tensor, h: Tensor) -> Any:
        magnitude = torch.view_as_real(torch.fft.rfft(torch.cat([past, x], 1))).square().sum(-1)
        h = self.memory(torch.log1p(magnitude), h)
        return self.linear(h), x + 0, h


class ComplexState(nn.Module):
    """A diagonal complex state, carried as pairs of real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(0.3 * torch.randn(WIDTH, dtype=torch.complex64))
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, h: Tensor) -> Any:
        z = torch.exp(self.rate) * torch.view_as_complex(h.contiguous()) * 0.3 + self.linear(x)
        return z.real, torch.view_as_real(z)


class Branch(Leaky):
    """Branches in Python on the value of a tensor."""

    def forward(self, x: Tensor, h: Tensor) -> Any:
        y, h = self.advance(x, h)
        return (y if bool(h.sum() > 0) else -y), h


class Residuals(nn.Module):
    """Three residual single-head attentions over 4 tokens and a cache of 12; crashes a compiler of OpenVINO."""

    def __init__(self, layers: int = 3, width: int = 16) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))

    def forward(self, x: Tensor, caches: Tensor) -> Any:
        after = []
        for cache, projection in zip(caches, self.projections, strict=True):
            block = torch.cat([cache, x], 1)
            query, key, value = projection(block).chunk(3, -1)
            x = x + (query[:, 12:] @ key.transpose(1, 2) / 4).softmax(-1) @ value
            after.append(block[:, -12:])
        return x, torch.stack(after)


class LearnedStart(Leaky):
    """Its initial state is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, WIDTH))

    def forward(self, x: Tensor, h: Tensor) -> Any:
        return self.advance(x, h)


class Convolutions(nn.Module):
    """Two dilated causal convolutions with their tails as states [B, width, tail]."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(WIDTH, WIDTH, 3), nn.Conv1d(WIDTH, WIDTH, 3, dilation=4)

    def forward(self, x: Tensor, near: Tensor, far: Tensor) -> Any:
        near = torch.cat([near, x[:, :, None]], 2)
        hidden = torch.relu(self.one(near))
        far = torch.cat([far, hidden], 2)
        return self.two(far)[:, :, 0], near[:, :, 1:], far[:, :, 1:]


class RunningNorm(nn.Module):
    """Normalises by a running mean and deviation (Welford), with a float counter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, n: Tensor, mean: Tensor, spread: Tensor) -> Any:
        n = n + 1
        difference = x - mean
        mean = mean + difference / n
        spread = spread + difference * (x - mean)
        return self.linear((x - mean) * torch.rsqrt(spread / n + 1e-3)), n, mean, spread


class BooleanState(Leaky):
    """A bool state: whether the stream was ever loud."""

    def forward(self, x: Tensor, h: Tensor, loud: Tensor) -> Any:
        loud = loud | (x.amax(-1, keepdim=True) > 2)
        y, h = self.advance(x, h)
        return torch.where(loud, y, -y), h, loud


def _leaky(kind: Callable[[], nn.Module], *more: Any) -> Callable[[], tuple[nn.Module, Any]]:
    return lambda: (kind().eval(), [Carried("h", zeros(WIDTH)), *more])


def _with(kind: Callable[[], nn.Module], *states: Any) -> Callable[[], tuple[nn.Module, Any]]:
    return lambda: (kind().eval(), list(states))


def _ordered_cell() -> tuple[nn.Module, Any]:
    start = OrderedDict((name, Carried(name, zeros(WIDTH))) for name in ("h", "c"))
    return OrderedCell().eval(), [start]


def _learned() -> tuple[nn.Module, Any]:
    module = LearnedStart().eval()
    return module, [Carried("h", module.start)]


def _hidden(how: str) -> Callable[[], tuple[nn.Module, Any]]:
    return _leaky(lambda: HiddenBuffer(how))


def _mixed(how: str) -> Callable[[], tuple[nn.Module, Any]]:
    return _leaky(lambda: MixedLanes(how))


def _random(how: str) -> Callable[[], tuple[nn.Module, Any]]:
    return _leaky(lambda: Random(how))


_BUFFERS = ("pytorch/pytorch#60828", "microsoft/onnxruntime#10108", "microsoft/onnxruntime#11085")
_LANES = ("k2-fsa/sherpa#785", "NVIDIA-NeMo/Speech#12840", "snakers4/silero-vad#629")
_TABLES = ("openvinotoolkit/openvino#27483", "openvinotoolkit/openvino#37776")
_ORDER = ("k2-fsa/sherpa-onnx#844",)

CASES = (
    Case("buffer, assigned", _BUFFERS, _hidden("assigned"), ("refused",)),
    Case("buffer, copied into", _BUFFERS, _hidden("copied into"), ("refused",)),
    Case("buffer, added to", _BUFFERS, _hidden("added to"), ("refused",)),
    Case("attribute written before it is read", ("pytorch/pytorch#106217",), _leaky(ShadowAttribute), ("equal",)),
    Case("calls counted in Python", ("pytorch/pytorch#125424",), _leaky(PythonCounter), ("refused",)),
    Case(
        "window counted in Python",
        ("huggingface/transformers#37574",),
        _with(PythonWindow, Carried("past", zeros(16, 2 * WIDTH))),
        ("refused",),
    ),
    Case(
        "state reset in every call",
        ("openvinotoolkit/openvino#735", "microsoft/onnxruntime#2960"),
        _leaky(DroppedState),
        ("equal",),  # the module itself discards the state, on every target alike
    ),
    Case(
        "state that is never read",
        ("Denys88/rl_games#316",),
        _leaky(NeverRead, Carried("unused", zeros(WIDTH))),
        ("refused",),
    ),
    Case("state written in place", ("pytorch/pytorch#70280",), _leaky(InPlace), ("equal", "refused")),
    Case(
        "cache that grows",
        ("huggingface/transformers#26681",),
        _with(GrowingCache, Carried("past", zeros(1, WIDTH))),
        ("refused",),
    ),
    Case("dropout in forward", ("pytorch/pytorch#52758",), _random("dropout"), ("refused",)),
    Case("random numbers in forward", ("onnx/onnx#2831",), _random("rand"), ("refused",)),
    Case("lane 0's position for all", _LANES, _leaky(FirstLanePosition, Carried("position", count())), ("refused",)),
    Case("a position for each lane", _LANES, _leaky(OwnPosition, Carried("position", count())), ("equal", "stops")),
    Case("states averaged over lanes", _LANES, _mixed("mean"), ("refused",)),
    Case("states rolled over lanes", _LANES, _mixed("rolled"), ("refused",)),
    Case("lane 0's state for all", _LANES, _mixed("first"), ("refused",)),
    Case("states scaled by the largest lane", _LANES, _mixed("scaled"), ("refused",)),
    Case("BatchNorm without statistics", ("microsoft/onnxruntime#26584",), _leaky(NoRunningStatistics), ("refused",)),
    Case(
        "attention over the lanes",
        _LANES[:1],
        _with(AttentionOverLanes, Carried("cache", zeros(5, WIDTH))),
        ("refused",),
    ),
    Case(
        "dict returned in another order",
        _ORDER,
        _with(Cell, {name: Carried(name, zeros(WIDTH)) for name in ("h", "c")}),
        ("equal",),
    ),
    Case("OrderedDict in another order", _ORDER, _ordered_cell, ("equal",)),
    Case(
        "states declared in another order",
        _ORDER,
        _with(PositionalCell, Carried("c", zeros(WIDTH)), Carried("h", zeros(WIDTH))),
        ("refused",),
    ),
    Case(
        "remainder of a sample counter",
        ("openvinotoolkit/openvino#35829",),
        _with(SampleCounter, Carried("n", count()), Carried("h", zeros(WIDTH))),
        ("equal", "stops"),
        steps=60_000,
    ),
    Case(
        "quotient of a sample counter",
        ("openvinotoolkit/openvino#35823",),
        _with(SampleRing, Carried("n", count()), Carried("ring", zeros(16, WIDTH))),
        ("equal", "stops"),
        steps=60_000,
    ),
    Case(
        "table written past its end",
        _TABLES,
        _with(Table, Carried("table", zeros(100, WIDTH)), Carried("position", count())),
        ("refused", "stops"),
    ),
    Case(
        "cache of 64 places",
        _TABLES,
        _with(
            StaticCache,
            Carried("keys", zeros(64, WIDTH)),
            Carried("values", zeros(64, WIDTH)),
            Carried("position", count()),
        ),
        ("refused", "stops"),
    ),
    Case(
        "table of positions",
        _TABLES,
        _leaky(LearnedPositions, Carried("position", count())),
        ("refused", "stops"),
    ),
    Case(
        "ring with a place that wraps",
        ("sonos/tract#2323",),
        _with(Ring, Carried("place", count()), Carried("ring", zeros(16, WIDTH))),
        ("equal",),
    ),
    Case(
        "scalar counter",
        (),
        _leaky(ScalarCounter, Carried("n", torch.tensor(0), None)),
        ("equal", "stops"),
    ),
    Case(
        "GRU with its reset gate",
        ("microsoft/onnxscript#2852", "pytorch/pytorch#189225"),
        _with(GateOrder, Carried("h", zeros(1, WIDTH), 1)),
        ("equal",),
        {"token_shape": (WIDTH,), "timed": True},
    ),
    Case(
        "LSTM with projections",
        ("k2-fsa/icefall#621", "k2-fsa/sherpa#136"),
        _with(Projected, Carried("h", torch.zeros(2, 1, 5), 1), Carried("c", torch.zeros(2, 1, 12), 1)),
        ("equal", "refused"),
    ),
    Case(
        "spectrum of overlapping frames",
        ("pytorch/pytorch#107588", "pytorch/pytorch#44822"),
        _with(Spectrum, Carried("past", zeros(16)), Carried("h", zeros(17))),
        ("equal", "refused"),
        {"token_shape": (16,)},
    ),
    Case(
        "complex state",
        ("pytorch/pytorch#59246", "pytorch/pytorch#49793"),
        _with(ComplexState, Carried("h", zeros(WIDTH, 2))),
        ("equal", "refused"),
    ),
    Case("branch on the data", ("ultralytics/yolov5#5505",), _leaky(Branch), ("refused",)),
    Case(
        "three residual attentions",
        (),
        _with(Residuals, Carried("caches", torch.zeros(3, 1, 12, 16), 1)),
        ("equal", "refused"),
        {"token_shape": (4, 16)},
    ),
    Case("learned initial state", ("microsoft/onnxruntime#19270",), _learned, ("equal",)),
    Case(
        "tails of convolutions",
        ("NVIDIA-NeMo/Speech#5837",),
        _with(Convolutions, Carried("near", zeros(WIDTH, 2)), Carried("far", zeros(WIDTH, 8))),
        ("equal",),
    ),
    Case(
        "running mean and deviation",
        (),
        _with(
            RunningNorm,
            Carried("n", zeros(1)),
            Carried("mean", zeros(WIDTH)),
            Carried("spread", zeros(WIDTH)),
        ),
        ("equal",),
    ),
    Case(
        "bool state",
        (),
        _leaky(BooleanState, Carried("loud", torch.zeros(1, 1, dtype=torch.bool))),
        ("equal",),
    ),
)
