"""Sizes and options of models: numpy's numbers make the same model as Python's, and other types are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch

from nsm.baselines import RWKVLM, MambaLM, RecurrentLM, TransformerLM
from nsm.errors import ConfigError
from nsm.models.adaptive import AdaptiveNSM
from nsm.models.base import StepModel
from nsm.models.checkpoint import fingerprint, load_checkpoint, save
from nsm.models.config import LayerOptions
from nsm.models.hybrid import HybridModel
from nsm.models.simple import SimpleNSM
from nsm.modules import NSMLayer

OPTIONS: dict[str, Any] = {
    "chunk_size": 4,
    "window": 8,
    "routing_heads": 2,
    "routing": "topk",
    "top_k": 1,
    "consolidate_every": 2,
    "communication": True,
    "conv_width": 3,
    "feed_forward": 2.5,
    "causal": False,
    "memory_rows": 4,
}
LANGUAGE: dict[str, Any] = {"vocab_size": 20, "d_model": 8, "num_layers": 1, "chunk_size": 4}
MODELS: dict[str, tuple[type[StepModel], dict[str, Any]]] = {
    "ids": (SimpleNSM, {"vocab_size": 20, "d_model": 8, "num_states": 4, "max_seq_length": 64, **OPTIONS}),
    "vectors": (SimpleNSM, {"input_dim": 3, "state_dim": 16, "num_states": (4, 6), "prune_threshold": 0.25}),
    "levels": (SimpleNSM, {"input_dim": 3, "state_dim": 16, "num_states": 4, "hierarchy": (2,), "initial_states": 3}),
    "adaptive": (
        AdaptiveNSM,
        {
            "input_dim": 3,
            "state_dim": 16,
            "max_states": (4, 4),
            "initial_states": 2,
            "prune_threshold": 0.125,
            "allocate_threshold": 0.5,
            "novelty_threshold": 0.75,
        },
    ),
    "hybrid": (
        HybridModel,
        {
            "vocab_size": 20,
            "d_model": 8,
            "num_states": (4, 6),
            "num_attention_layers": 1,
            "num_nsm_layers": 2,
            "num_heads": 2,
            "attention_window": 8,
            **OPTIONS,
        },
    ),
    "transformer": (TransformerLM, {**LANGUAGE, "num_heads": 2, "context": 8}),
    "recurrent": (RecurrentLM, LANGUAGE),
    "rwkv": (RWKVLM, {**LANGUAGE, "num_heads": 2, "feed_forward": 2.5}),
    "mamba": (MambaLM, {**LANGUAGE, "state_size": 4}),
}


def of_numpy(value: Any) -> Any:
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, tuple):
        return np.array(value)
    if isinstance(value, int):
        return np.int64(value)
    return np.float32(value) if isinstance(value, float) else value


@pytest.mark.parametrize("name", MODELS)
def test_numbers_of_numpy_make_the_same_model(tmp_path: Path, name: str) -> None:
    kind, arguments = MODELS[name]
    torch.manual_seed(0)
    wanted = kind(**arguments)
    torch.manual_seed(0)
    model = kind(**{name: of_numpy(value) for name, value in arguments.items()})
    assert json.dumps(model.config) == json.dumps(wanted.config)
    assert json.dumps(model.spec(2).to_json()) == json.dumps(wanted.spec(2).to_json())
    save(model, tmp_path / "model.pt")
    assert load_checkpoint(tmp_path / "model.pt").fingerprint == fingerprint(wanted)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("ids", {"vocab_size": 20.0}, r"vocab_size of SimpleNSM is a whole number; given 20\.0 of type float"),
    ("ids", {"d_model": 16.5}, r"d_model of SimpleNSM is a whole number; given 16\.5"),
    ("ids", {"num_states": 4.0}, r"num_states of SimpleNSM is a whole number; given 4\.0"),
    ("ids", {"num_states": [4.0]}, r"Every one of num_states of SimpleNSM is a whole number; given 4\.0"),
    ("ids", {"initial_states": 2.0}, r"initial_states of SimpleNSM is a whole number; given 2\.0"),
    ("ids", {"prune_threshold": "low"}, r"prune_threshold of SimpleNSM is a number; given 'low'"),
    ("ids", {"chunk_size": 8.5}, r"chunk_size of SimpleNSM is a whole number; given 8\.5"),
    ("ids", {"top_k": 1.0}, r"top_k of SimpleNSM is a whole number; given 1\.0"),
    ("ids", {"feed_forward": "4"}, r"feed_forward of SimpleNSM is a number; given '4'"),
    ("ids", {"causal": "no"}, r"causal of SimpleNSM is True or False; given 'no'"),
    ("levels", {"hierarchy": 2}, r"hierarchy of SimpleNSM is a list of whole numbers; given 2"),
    ("vectors", {"state_dim": "wide"}, r"state_dim of SimpleNSM is a whole number; given 'wide'"),
    ("adaptive", {"state_dim": 16.0}, r"state_dim of AdaptiveNSM is a whole number; given 16\.0"),
    ("adaptive", {"novelty_threshold": None}, r"novelty_threshold of AdaptiveNSM is a number; given None"),
    ("hybrid", {"d_model": 8.0}, r"d_model of HybridModel is a whole number; given 8\.0"),
    ("hybrid", {"window": 8.0}, r"window of HybridModel is a whole number; given 8\.0"),
    ("transformer", {"context": 8.0}, r"context of TransformerLM is a whole number; given 8\.0"),
    ("rwkv", {"feed_forward": float("inf")}, "feed_forward be finite and > 0; given 2, inf"),
    ("rwkv", {"feed_forward": float("nan")}, "feed_forward be finite and > 0; given 2, nan"),
    ("rwkv", {"feed_forward": None}, r"feed_forward of RWKVLM is a number; given None"),
]


@pytest.mark.parametrize(("name", "changes", "message"), WRONG, ids=[f"{n} {next(iter(c))}" for n, c, _ in WRONG])
def test_arguments_of_another_type_are_named(name: str, changes: dict[str, Any], message: str) -> None:
    kind, arguments = MODELS[name]
    with pytest.raises(ConfigError, match=message):
        kind(**{**arguments, **changes})


def test_the_options_of_the_models_are_those_of_their_layers() -> None:
    """Except the parameters that a model sets itself; the types are the same."""
    own = {"state_dim", "token_dim", "num_heads", "num_states", "initial_states", "prune_threshold", "adaptation"}
    hints = get_type_hints(NSMLayer.__init__)
    taken = {name: hint for name, hint in hints.items() if name not in {*own, "return"}}
    assert get_type_hints(LayerOptions) == taken
