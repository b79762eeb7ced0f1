"""Small models of every kind with random weights, and what the tests do with them again and again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nsm.models.adaptive import AdaptiveNSM
from nsm.models.base import State
from nsm.models.hybrid import HybridModel
from nsm.models.simple import SimpleNSM
from nsm.models.stream import StreamModel
from nsm.modules.layer import NSMLayer
from nsm.spec import OFFSET

CHUNK, SLOTS, VOCABULARY = 4, 6, 20
LONGEST = 4 * CHUNK + 3

_ANY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 8,
    "num_heads": 2,
    "chunk_size": CHUNK,
    "routing_heads": 2,
    "output_dim": 5,
    "feed_forward": 1.0,
}
_SIMPLE: dict[str, Any] = {**_ANY, "num_states": SLOTS, "num_layers": 2}
# Thresholds at which these short streams do prune and allocate.
_ADAPTIVE: dict[str, Any] = {
    **_ANY,
    "state_dim": 16,
    "max_states": SLOTS,
    "initial_states": 4,
    "prune_threshold": 0.3,
    "allocate_threshold": 0.35,
    "novelty_threshold": 0.5,
}
_HYBRID: dict[str, Any] = {**_ANY, "num_states": SLOTS, "num_attention_layers": 1, "num_nsm_layers": 1}
_VECTORS: dict[str, Any] = {"vocab_size": None, "input_dim": 3, "state_dim": 16}

Variant = tuple[type[StreamModel], dict[str, Any]]

VARIANTS: dict[str, Variant] = {
    "gru": (SimpleNSM, _SIMPLE),
    "lstm": (SimpleNSM, {**_SIMPLE, "gate_type": "lstm"}),
    "mingru": (SimpleNSM, {**_SIMPLE, "gate_type": "mingru"}),
    "never consolidated": (SimpleNSM, {**_SIMPLE, "consolidate_every": 0, "num_layers": 1}),
    "every third chunk, lstm": (SimpleNSM, {**_SIMPLE, "consolidate_every": 3, "gate_type": "lstm"}),
    "communication, some masked": (SimpleNSM, {**_SIMPLE, "communication": True, "initial_states": 3}),
    "sparsemax": (SimpleNSM, {**_SIMPLE, "routing": "sparsemax"}),
    "entmax": (SimpleNSM, {**_SIMPLE, "routing": "entmax"}),
    "topk": (SimpleNSM, {**_SIMPLE, "routing": "topk", "top_k": 2}),
    "hierarchy": (SimpleNSM, {**_SIMPLE, "hierarchy": (2, 3), "consolidate_every": 0}),
    "hierarchy, lstm, communication": (
        SimpleNSM,
        {**_SIMPLE, "hierarchy": (2,), "gate_type": "lstm", "communication": True},
    ),
    "memory": (SimpleNSM, {**_SIMPLE, "memory_rows": 3}),
    "wide window": (SimpleNSM, {**_SIMPLE, "window": 6}),
    "wider window, vectors": (SimpleNSM, {**_SIMPLE, **_VECTORS, "window": 11}),
    "adaptive": (AdaptiveNSM, _ADAPTIVE),
    "adaptive, lstm, memory, vectors": (
        AdaptiveNSM,
        {**_ADAPTIVE, **_VECTORS, "gate_type": "lstm", "memory_rows": 2, "consolidate_every": 2},
    ),
    "hybrid": (HybridModel, {**_HYBRID, "attention_window": 7}),
}
NOT_CAUSAL: dict[str, Variant] = {
    "both ways": (SimpleNSM, {**_SIMPLE, "causal": False}),
    "both ways, vectors, memory, hierarchy": (
        SimpleNSM,
        {**_SIMPLE, **_VECTORS, "causal": False, "memory_rows": 3, "hierarchy": (2,), "window": 7},
    ),
    "both ways, adaptive": (AdaptiveNSM, {**_ADAPTIVE, "causal": False}),
    "both ways, hybrid": (HybridModel, {**_HYBRID, "attention_window": 7, "causal": False}),
}


@torch.no_grad()
def stir(module: nn.Module) -> None:
    """Make all weights random, so that nothing hides behind a gate that starts near "keep" or a matrix of zeros."""
    for name, parameter in module.named_parameters():
        parameter.add_(torch.randn_like(parameter), alpha=1.0 if name.endswith("manager.importance") else 0.3)


def make(name: str, seed: int = 0, **changes: Any) -> StreamModel:
    """The variant of that name, in eval mode, with random weights."""
    torch.manual_seed(seed)
    kind, arguments = {**VARIANTS, **NOT_CAUSAL}[name]
    model = kind(**{**arguments, **changes})
    stir(model)
    return model.eval()


def random_tokens(model: StreamModel, lanes: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if model.token_spec.shape:
        return torch.randn(lanes, length, *model.token_spec.shape, generator=generator)
    return torch.randint(0, VOCABULARY, (lanes, length), generator=generator)


def other_tokens(model: StreamModel, tokens: Tensor) -> Tensor:
    """Tokens that differ from the given ones at every place."""
    return tokens + 1.0 if model.token_spec.shape else (tokens + 7) % VOCABULARY


def run(model: StreamModel, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    outputs, after = model(tokens, state, return_state=True)
    return outputs, after


def run_token_by_token(model: StreamModel, tokens: Tensor, state: State) -> tuple[Tensor, State]:
    """`decode` and `commit`, again and again."""
    outputs = []
    for place in range(tokens.shape[1]):
        output, state = model.decode(tokens[:, place : place + 1], state)
        outputs.append(output)
        state = model.commit(state)
    return torch.cat(outputs, 1), state


def layers_of(model: StreamModel) -> list[NSMLayer]:
    return [layer for layer in model.layers if isinstance(layer, NSMLayer)]


def lane_of(model: StreamModel, state: State, lane: int) -> State:
    return {spec.name: state[spec.name][spec.lane_index(lane)].unsqueeze(0) for spec in model.spec().states}


def poisoned(state: State, poison: float) -> State:
    """The state with this number in every masked slot."""
    result = dict(state)
    for name, mask in state.items():
        layer, _, role = name.partition(".")
        if role != "mask":
            continue
        for slotted in (f"{layer}.bank", f"{layer}.cell"):
            if slotted in state:
                result[slotted] = torch.where(mask[:, None, :, None], state[slotted], poison)
    return result


def same_bits(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def same_numbers(one: State, other: State) -> None:
    """1e-5: a piece of another length is another matrix product, which rounds differently, in float32."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert_close(value, other[name], rtol=1e-5, atol=1e-5, msg=f"{name}: {value} is not {other[name]}")


def zero_beyond_the_offset(state: State) -> bool:
    """Whether the open chunk holds nothing from its offset on."""
    rows = torch.arange(CHUNK) >= state[OFFSET][:, None]
    opened = {name: value for name, value in state.items() if name.partition(".")[2].startswith("open_")}
    assert opened
    return all(
        not bool(value.movedim(-2, 1)[rows].any()) for value in opened.values()
    )  # [B, ..., C, x]: tokens are the last axis but one
