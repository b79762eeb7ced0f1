"""A step around a model of transformers is compared with that model's own forward, without being asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, MistralConfig, MistralForCausalLM
from transformers.cache_utils import CacheLayerMixin

import nsm
from nsm.adapters.model import AdaptedModel
from nsm.errors import UnsupportedError

WINDOW, VOCABULARY = 24, 32


class Ring(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values [B, heads, WINDOW, width] of the last tokens, the newest at the end."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys: Tensor
        self.values: Tensor
        self.keys, self.values, self.is_initialized = keys, values, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: it is."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys = torch.cat([self.keys, key_states], 2)[:, :, -WINDOW:]
        self.values = torch.cat([self.values, value_states], 2)[:, :, -WINDOW:]
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return WINDOW, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return WINDOW


class Step(nn.Module):
    """Mistral, token by token; `frozen`: the position is a Python number, which a tracer freezes."""

    def __init__(self, *, frozen: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        config = MistralConfig(
            vocab_size=VOCABULARY, sliding_window=WINDOW, num_key_value_heads=1, initializer_range=0.2, **sizes
        )
        model: Any = MistralForCausalLM(config)
        self.model = model.eval()
        self.frozen, self.scale = frozen, scale

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        caches = {f"{name}{layer}": torch.zeros(batch, 1, WINDOW, 16) for layer in (0, 1) for name in ("key", "value")}
        return {"position": torch.zeros(batch, dtype=torch.int64), **caches}

    def step(self, ids: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        cache: Any = DynamicCache()
        cache.layers = [Ring(state[f"key{layer}"], state[f"value{layer}"]) for layer in (0, 1)]
        position = state["position"]
        seen = torch.zeros_like(position) if self.frozen else position
        filled = torch.arange(WINDOW) >= WINDOW - 1 - seen[:, None]
        given = self.model(
            input_ids=ids[:, None],
            cache=cache,
            use_cache=True,
            attention_mask=filled[:, None, None, :],
            position_ids=seen[:, None],
        )
        after = {"position": position + 1}
        for layer, ring in enumerate(cache.layers):
            after |= {f"key{layer}": ring.keys, f"value{layer}": ring.values}
        return given.logits[:, 0] * self.scale, after


def compared(model: AdaptedModel) -> tuple[str, str]:
    """Status and detail of the experiment `offline`."""
    assert model.examination is not None
    (found,) = (item for item in model.examination.experiments if item.name == "offline")
    return found.status, found.detail


def test_a_right_step_passes_past_its_window() -> None:
    status, _ = compared(nsm.as_step(Step(), vocab_size=VOCABULARY))
    assert status == "passed"


def test_a_frozen_position_is_refused_and_the_model_named() -> None:
    with pytest.raises(UnsupportedError, match=r"token 1 on.* model \(MistralForCausalLM\.forward\).*offline=False"):
        nsm.as_step(Step(frozen=True), vocab_size=VOCABULARY)


def test_the_comparison_can_be_left_out() -> None:
    status, _ = compared(nsm.as_step(Step(frozen=True), vocab_size=VOCABULARY, offline=False))
    assert status == "skipped"


def test_a_step_that_computes_something_else_is_not_compared() -> None:
    status, detail = compared(nsm.as_step(Step(scale=0.5), vocab_size=VOCABULARY))
    assert status == "skipped"
    assert "not compared with an offline run" in detail


def test_an_offline_run_that_is_given_comes_first() -> None:
    module = Step(scale=0.5)
    step = nsm.as_step(module, vocab_size=VOCABULARY, offline=lambda ids: module.model(ids).logits * 0.5)
    assert compared(step)[0] == "passed"
