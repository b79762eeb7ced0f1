"""The attention layer: a pre-norm transformer layer with a bounded window, whole, in chunks and token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nsm.errors import ConfigError
from nsm.modules.attention_layer import AttentionLayer
from nsm.modules.protocol import Clock, LayerState
from tests.nsm.variants import stir

CHUNK, DIM = 3, 6


def make_layer(window: int = 7, **changes: Any) -> AttentionLayer:
    torch.manual_seed(0)
    layer = AttentionLayer(**{"token_dim": DIM, "num_heads": 2, "window": window, "chunk_size": CHUNK, **changes})
    stir(layer)
    return layer.double()


def random_tokens(lanes: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(lanes, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(layer: AttentionLayer, tokens: Tensor) -> Tensor:
    """From the start of a stream, as one reads it in a paper; the attention has a test of its own."""
    tokens = tokens + layer.attention(layer.norm(tokens)) @ layer.out.weight.T
    narrow, wide = layer.feed_forward[0], layer.feed_forward[2]
    result: Tensor = tokens + wide(torch.nn.functional.gelu(narrow(layer.forward_norm(tokens))))
    return result


def clock(filled: int, offset: int, lanes: int) -> Clock:
    return Clock(torch.full((lanes,), filled), torch.full((lanes,), offset), None)


def token_by_token(layer: AttentionLayer, tokens: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
    outputs, filled, lanes = [], 0, tokens.shape[0]
    for place in range(tokens.shape[1]):
        offset = place % CHUNK
        output, changed, routing = layer.decode(tokens[:, place : place + 1], state, clock(filled, offset, lanes))
        assert routing is None
        outputs.append(output)
        full = torch.full((lanes,), offset == CHUNK - 1)
        state = {**state, **changed}
        state = {**state, **layer.commit(state, full, clock(filled, offset + 1, lanes))}
        if offset == CHUNK - 1:
            filled = min(layer.carried_rows, filled + CHUNK)
    return torch.cat(outputs, 1), state


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [3, 4, 7, 8])
def test_scan_is_the_layer_of_the_paper(window: int, causal: bool) -> None:
    layer, tokens = make_layer(window, causal=causal), random_tokens(2, 4 * CHUNK)
    output, state, routing = layer.scan(tokens, layer.initial_state(2), clock(0, 0, 2))
    assert routing is None
    assert set(state) <= {spec.name[2:] for spec in layer.state_specs("0", 2)}
    assert_close(output, whole(layer, tokens), rtol=1e-9, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("window", [3, 4, 8])
@pytest.mark.parametrize("length", [2, CHUNK, 10])
def test_token_by_token_is_the_layer_of_the_paper_and_leaves_the_same_state(window: int, length: int) -> None:
    layer, tokens = make_layer(window), random_tokens(2, length)
    output, state = token_by_token(layer, tokens, layer.initial_state(2))
    assert_close(output, whole(layer, tokens), rtol=1e-9, atol=1e-10)
    padded = torch.cat([tokens, random_tokens(2, -length % CHUNK, seed=1)], 1)
    initial = layer.initial_state(2)
    _, left, _ = layer.scan(padded, initial, clock(0, 0, 2), torch.full((2,), length))
    for role, value in {**initial, **left}.items():
        assert_close(state[role], value, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_the_window_is_all_that_a_token_sees() -> None:
    layer, tokens = make_layer(window=4), random_tokens(1, 12)
    changed = tokens.clone()
    changed[:, 5] += torch.randn(DIM)
    differs = (whole(layer, tokens) != whole(layer, changed)).any(-1)[0]
    assert differs.tolist() == [5 <= place < 9 for place in range(12)]


@torch.no_grad()
def test_a_commit_leaves_the_lanes_that_are_not_full_bit_for_bit() -> None:
    layer = make_layer()
    _, state = token_by_token(layer, random_tokens(3, 5), layer.initial_state(3))
    full = torch.tensor([False, True, False])
    after = layer.commit(state, full, clock(CHUNK, CHUNK, 3))
    for role, value in after.items():
        assert torch.equal(value[~full], state[role][~full]), role
        assert not torch.equal(value[full], state[role][full]), role
    assert not bool(after["open_key"][1].any())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("window", "carried"), [(3, 3), (4, 3), (5, 6), (8, 9)])
def test_the_initial_state_is_what_the_specs_declare(batch: int, window: int, carried: int) -> None:
    layer = make_layer(window).float()
    assert layer.carried_rows == carried
    assert layer.periods == ()
    state, specs = layer.initial_state(batch), layer.state_specs("7", batch)
    assert [spec.name for spec in specs] == [f"7.{role}" for role in state]
    for spec, value in zip(specs, state.values(), strict=True):
        assert value.shape == spec.shape
        assert value.dtype == getattr(torch, spec.dtype)
        assert spec.init == "zeros"
        assert not bool(value.any())
    assert state["key"].shape == (batch, 2, carried, DIM // 2)


def test_gradients_reach_every_parameter() -> None:
    layer = make_layer()
    output, _, _ = layer.scan(random_tokens(2, 4 * CHUNK), layer.initial_state(2), clock(0, 0, 2))
    torch.autograd.backward((output * random_tokens(2, 4 * CHUNK, seed=1)).sum())
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"feed_forward": 0.0}, "feed_forward must be finite and > 0; given 0.0"),
        ({"feed_forward": float("inf")}, "feed_forward must be finite and > 0; given inf"),
        ({"feed_forward": float("nan")}, "feed_forward must be finite and > 0; given nan"),
        ({"num_heads": 4}, "num_heads must divide token_dim=6; given 4"),
        ({"window": 2}, "window counts .*given window=2, chunk_size=3"),
    ],
)
def test_what_makes_no_layer_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_layer(**arguments)
