"""HybridModel: attention layers below, Neural State Machine layers above."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsm.errors import ConfigError
from nsm.models.hybrid import HybridModel
from nsm.modules.attention_layer import AttentionLayer
from nsm.modules.layer import NSMLayer
from tests.nsm.variants import CHUNK, make, other_tokens, random_tokens, run

SMALL: dict[str, Any] = {
    "vocab_size": 20,
    "d_model": 8,
    "num_states": 4,
    "num_attention_layers": 2,
    "num_nsm_layers": 3,
    "num_heads": 2,
    "chunk_size": 4,
    "attention_window": 9,
}


def make_hybrid(**changes: Any) -> HybridModel:
    torch.manual_seed(0)
    return HybridModel(**{**SMALL, **changes}).eval()


def test_attention_below_and_state_machines_above() -> None:
    model = make_hybrid(feed_forward=2.0, gate_type="mingru")
    assert [type(layer) for layer in model.layers] == [AttentionLayer] * 2 + [NSMLayer] * 3
    below, above = model.layers[0], model.layers[-1]
    assert isinstance(below, AttentionLayer)
    assert isinstance(above, NSMLayer)
    assert below.attention.window == 9
    assert above.attention.local.window == 4
    assert tuple(above.manager.bank.shape) == (4, 16)
    assert above.consolidation.propagator.gate_type == "mingru"
    assert below.feed_forward[0].out_features == above.feed_forward[0].out_features == 16
    assert model.carried_rows == 8
    assert model.output_dim == 20


def test_the_defaults_are_the_documented_ones() -> None:
    model = HybridModel(vocab_size=5, d_model=16, num_heads=2)
    assert [type(layer) for layer in model.layers] == [AttentionLayer] * 2 + [NSMLayer] * 4
    assert model.config["num_states"] == 64
    assert model.config["attention_window"] == 128
    assert model.config["state_dim"] == 32
    assert model.chunk_size == 16


@torch.no_grad()
def test_rows_of_the_longest_window_are_counted_and_the_others_have_enough() -> None:
    model = make_hybrid()
    _, state = run(model, random_tokens(model, 2, 5 * CHUNK))
    assert state["lane.filled"].tolist() == [8, 8]
    assert state["0.key"].shape == (2, 2, 8, 4)
    assert state["2.key"].shape == (2, 2, 4, 4)


@torch.no_grad()
def test_what_left_all_windows_is_remembered_by_the_banks() -> None:
    model = make("hybrid")
    tokens = random_tokens(model, 1, 40)
    changed = tokens.clone()
    changed[:, 0] = other_tokens(model, tokens)[:, 0]
    # A window of 7 tokens below; above it the convolution and a window of 4.
    assert 6 + 3 + 3 < 39
    assert not torch.equal(model(tokens)[:, -1], model(changed)[:, -1])


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"causal": False},
        {"hierarchy": (2,), "memory_rows": 3, "output_dim": 5, "state_dim": 12},
        {"routing": "topk", "top_k": 2, "consolidate_every": 3, "window": 6},
    ],
    ids=str,
)
def test_the_config_builds_the_same_model_again(changes: dict[str, Any]) -> None:
    model = make_hybrid(**changes)
    twin = HybridModel(**model.config).eval()
    twin.load_state_dict(model.state_dict())
    assert twin.config == model.config
    assert twin.spec(2) == model.spec(2)
    tokens = random_tokens(model, 2, 5 * CHUNK)
    assert torch.equal(twin(tokens), model(tokens))
    assert twin(tokens).shape == (2, 20, model.output_dim)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *[
            ({name: value}, f"HybridModel needs {name} >= 1.*given {value}")
            for name in ("vocab_size", "d_model", "num_states", "num_attention_layers", "num_nsm_layers", "num_heads")
            for value in (0, -1)
        ],
        ({"attention_window": 0}, "HybridModel needs attention_window >= 1; given 0"),
        ({"attention_window": 3}, "window counts .*given window=3, chunk_size=4"),
        ({"state_dim": 0}, "HybridModel needs state_dim >= 1; given 0"),
        ({"output_dim": 0}, "HybridModel needs output_dim >= 1; given 0"),
        ({"state_dim": -2}, "HybridModel needs state_dim >= 1; given -2"),
        ({"state_dim": 7}, "even state_dim"),
        ({"num_heads": 3}, "num_heads must divide token_dim=8; given 3"),
        ({"feed_forward": 0.0}, "feed_forward must be finite and > 0"),
    ],
)
def test_what_makes_no_model_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_hybrid(**changes)
