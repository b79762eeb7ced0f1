"""Models of all kinds, how they are exported and opened, and what PyTorch says of one of their lanes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from nsm.baselines.transformer import TransformerLM
from nsm.export.builders import openvino
from nsm.export.builders.base import Request
from nsm.export.graphs.exporter import export_onnx, initial_arrays
from nsm.export.sources.torch import TorchSource
from nsm.export.verify.golden import synthetic
from nsm.models import AdaptiveNSM, HybridModel, SimpleNSM, StepModel, fingerprint
from nsm.runtimes.session.session import Session
from nsm.runtimes.targets import find_target
from nsm.spec import StepSpec
from nsm.trace import Array, Arrays

CHUNK = 4
_ANY: dict[str, Any] = {"d_model": 8, "num_heads": 2, "chunk_size": CHUNK}
_NSM: dict[str, Any] = {**_ANY, "routing_heads": 2, "output_dim": 5, "feed_forward": 1.0}
_IDS: dict[str, Any] = {**_NSM, "vocab_size": 20, "num_states": 6}
_ADAPTIVE: dict[str, Any] = {
    **_NSM,
    "input_dim": 3,
    "state_dim": 16,
    "max_states": 6,
    "initial_states": 3,
    "num_layers": 1,
}

ADAPTIVE, DEFAULTS, PLAIN = "adaptive, vectors", "adaptive, default thresholds", "transformer"
LSTM, TOP_K = "lstm, every third chunk, wide window", "mingru, top-k, some masked"


@dataclass(frozen=True)
class Variant:
    """A model with weights of a seed, and how many lanes, and chunks a call of `step`, its graphs have."""

    make: Callable[[], StepModel]
    lanes: int = 3
    chunks: int = 1
    seed: int = 0


VARIANTS: dict[str, Variant] = {
    LSTM: Variant(
        lambda: SimpleNSM(
            **_IDS, num_layers=1, gate_type="lstm", window=40, consolidate_every=3, initial_states=4, communication=True
        ),
        chunks=2,
    ),
    "hierarchy, sparsemax, memory": Variant(
        lambda: SimpleNSM(**_IDS, num_layers=1, hierarchy=(2, 3), routing="sparsemax", memory_rows=3)
    ),
    ADAPTIVE: Variant(
        lambda: AdaptiveNSM(**_ADAPTIVE, prune_threshold=0.3, allocate_threshold=0.35, novelty_threshold=0.5),
        lanes=1,
        chunks=2,
    ),
    # With this seed slots come and go at the thresholds that a model has unless told otherwise.
    DEFAULTS: Variant(lambda: AdaptiveNSM(**_ADAPTIVE), seed=3),
    "hybrid, lstm, communication": Variant(
        lambda: HybridModel(
            **_IDS,
            num_attention_layers=1,
            num_nsm_layers=1,
            attention_window=7,
            gate_type="lstm",
            communication=True,
        ),
        lanes=1,
    ),
    # Where two scores change places, routing jumps. Here scores depend on the last two tokens alone: there are only 400
    # of a head and slot, and none of them is so near another that rounding could tell.
    TOP_K: Variant(
        lambda: SimpleNSM(
            **_IDS, num_layers=1, gate_type="mingru", routing="topk", top_k=2, conv_width=2, initial_states=3
        )
    ),
    "both ways, entmax": Variant(lambda: SimpleNSM(**_IDS, num_layers=1, routing="entmax", causal=False)),
    PLAIN: Variant(lambda: TransformerLM(20, num_layers=1, context=10, **_ANY)),
}


@dataclass(frozen=True)
class Exported:
    model: StepModel
    spec: StepSpec
    directory: Path

    def open(self, target: str) -> Session:
        found = find_target(target)
        files = {e.name: self.directory / found.folder / f"{e.name}{found.suffix}" for e in self.spec.entries}
        runtime = found.runtime_module().load(files, self.spec, "cpu", 1)
        return Session(runtime, self.spec, initial_arrays(self.model, self.spec.batch), fingerprint(self.model), target)


class Exporter(Protocol):
    """Gives a variant as graphs with so many lanes, None for its own."""

    def __call__(self, name: str, lanes: int | None = None) -> Exported: ...


class Opener(Protocol):
    """Gives a variant, and a session over it on a target that has just been reset."""

    def __call__(self, name: str, target: str, lanes: int | None = None) -> tuple[Exported, Session]: ...


@torch.no_grad()
def export_variant(name: str, lanes: int, directory: Path) -> Exported:
    """The graphs of a variant, and what OpenVINO makes of them."""
    variant = VARIANTS[name]
    torch.manual_seed(variant.seed)
    model = variant.make().eval()
    _stir(model)
    spec = model.spec(lanes, variant.chunks * CHUNK)
    (directory / "graphs").mkdir()
    export_onnx(model, spec, directory / "graphs")
    openvino.build(Request(directory, directory / "openvino", spec, None))
    return Exported(model, spec, directory)


def _stir(model: nn.Module) -> None:
    """Random weights all over, so that nothing hides behind a gate that starts closed."""
    for name, parameter in model.named_parameters():
        parameter.add_(torch.randn_like(parameter), alpha=1.0 if name.endswith("importance") else 0.3)


def make_tokens(model: StepModel, lanes: int, length: int, seed: int) -> Array:
    return np.stack(synthetic(TorchSource.of(model), lanes, length, seed))


@torch.no_grad()
def offline(model: StepModel, history: Array) -> tuple[Array, Arrays]:
    """Outputs and state of one lane, which PyTorch runs in one piece from the beginning."""
    if not len(history):
        return np.empty(0), {name: value[0].numpy() for name, value in model.initial_state(1).items()}
    outputs, state = model(torch.from_numpy(history[None]), return_state=True)
    return outputs[0].numpy(), {name: value[0].numpy() for name, value in state.items()}


def lane_of(session: Session, lane: int) -> Arrays:
    state = session.read_state()
    return {spec.name: state[spec.name][spec.lane_index(lane)] for spec in session.spec.states}


def assert_close(given: Arrays, wanted: Arrays, about: str) -> None:
    assert set(given) == set(wanted)
    for name, value in wanted.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(given[name], value, rtol=1e-5, atol=1e-5, err_msg=f"{about}: {name}")
        else:
            np.testing.assert_array_equal(given[name], value, err_msg=f"{about}: {name}")
