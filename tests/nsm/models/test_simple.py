"""SimpleNSM: its two forms, what each leaves to defaults, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from nsm.errors import ConfigError, InputError
from nsm.models.simple import SimpleNSM
from nsm.modules.layer import NSMLayer

IDS: dict[str, Any] = {"vocab_size": 11, "d_model": 8, "num_states": 4, "num_heads": 2, "chunk_size": 4}
VECTORS: dict[str, Any] = {"input_dim": 3, "state_dim": 16, "num_states": 4, "num_heads": 2, "chunk_size": 4}


def make(arguments: dict[str, Any], **changes: Any) -> SimpleNSM:
    torch.manual_seed(0)
    return SimpleNSM(**{**arguments, **changes}).eval()


def sizes_of(model: SimpleNSM) -> dict[str, int]:
    layer = model.layers[0]
    assert isinstance(layer, NSMLayer)
    slots, state_dim = layer.manager.bank.shape
    return {
        "d_model": layer.norm.normalized_shape[0],
        "state_dim": state_dim,
        "num_states": slots,
        "num_layers": len(model.layers),
        "num_heads": layer.attention.local.num_heads,
        "output_dim": model.output_dim,
        "chunk_size": model.chunk_size,
        "window": layer.attention.local.window,
    }


def test_over_ids_the_defaults_are_the_documented_ones() -> None:
    model = SimpleNSM(vocab_size=50)
    assert sizes_of(model) == {
        "d_model": 256,
        "state_dim": 512,
        "num_states": 64,
        "num_layers": 2,
        "num_heads": 8,
        "output_dim": 50,
        "chunk_size": 16,
        "window": 16,
    }
    assert model.max_seq_length == 1024


def test_over_vectors_the_defaults_are_the_documented_ones() -> None:
    model = SimpleNSM(input_dim=5)
    assert sizes_of(model) == {
        "d_model": 64,
        "state_dim": 128,
        "num_states": 16,
        "num_layers": 2,
        "num_heads": 4,
        "output_dim": 10,
        "chunk_size": 16,
        "window": 16,
    }
    assert model.max_seq_length is None


@pytest.mark.parametrize(
    ("sizes", "heads"),
    [
        ({"input_dim": 3, "state_dim": 126}, 1),
        ({"input_dim": 3, "state_dim": 100}, 2),
        ({"vocab_size": 9, "d_model": 60}, 4),
        ({"vocab_size": 9, "d_model": 63}, 1),
    ],
)
def test_any_width_has_heads_that_divide_it(sizes: dict[str, Any], heads: int) -> None:
    model = SimpleNSM(**sizes)
    assert sizes_of(model)["num_heads"] == model.config["num_heads"] == heads


@pytest.mark.parametrize("arguments", [IDS, VECTORS], ids=["ids", "vectors"])
def test_what_is_given_is_what_is_built(arguments: dict[str, Any]) -> None:
    given = {
        "d_model": 6,
        "state_dim": 10,
        "num_states": 3,
        "num_layers": 3,
        "num_heads": 3,
        "output_dim": 7,
        "chunk_size": 5,
        "window": 9,
    }
    model = make(arguments, **given)
    assert sizes_of(model) == given
    length = 12
    tokens = torch.randn(2, length, 3) if model.token_spec.shape else torch.randint(0, 11, (2, length))
    assert model(tokens).shape == (2, length, 7)


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        (IDS, {}),
        (IDS, {"output_dim": 5, "max_seq_length": 9, "initial_states": 2, "prune_threshold": 0.2}),
        (IDS, {"gate_type": "lstm", "consolidate_every": 3, "communication": True, "routing_heads": 2, "window": 6}),
        (IDS, {"consolidate_every": 0, "state_dim": 6, "num_layers": 1, "routing": "topk", "top_k": 2}),
        (IDS, {"hierarchy": (2,), "memory_rows": 3, "gate_type": "mingru", "causal": False}),
        (VECTORS, {}),
        (VECTORS, {"d_model": 6, "num_heads": 3, "output_dim": 2, "gate_type": "lstm"}),
    ],
)
def test_the_config_builds_the_same_model_again(arguments: dict[str, Any], changes: dict[str, Any]) -> None:
    model = make(arguments, **changes)
    twin = SimpleNSM(**model.config).eval()
    twin.load_state_dict(model.state_dict())
    assert twin.config == model.config
    assert twin.spec() == model.spec()
    assert twin.max_seq_length == model.max_seq_length
    tokens = torch.randn(2, 9, 3) if model.token_spec.shape else torch.randint(0, 11, (2, 9))
    assert torch.equal(twin(tokens), model(tokens))


@torch.no_grad()
def test_a_single_vector_is_a_stream_of_one() -> None:
    model = make(VECTORS)
    vectors = torch.randn(5, 3)
    single, state = model(vectors, return_state=True)
    stream, stream_state = model(vectors.unsqueeze(1), return_state=True)
    assert single.shape == (5, 10)
    assert torch.equal(single, stream[:, 0])
    for name, value in state.items():
        assert torch.equal(value, stream_state[name]), name


@torch.no_grad()
def test_single_vectors_one_after_the_other_are_a_sequence() -> None:
    model = make(VECTORS)
    vectors = torch.randn(2, 9, 3)
    state = model.initial_state(2)
    outputs = []
    for place in range(9):
        output, state = model(vectors[:, place], state, return_state=True)
        outputs.append(output)
    assert_close(torch.stack(outputs, 1), model(vectors), rtol=1e-5, atol=1e-5)


def test_the_longest_call_is_no_part_of_the_weights() -> None:
    short, long = make(IDS, max_seq_length=4), make(IDS, max_seq_length=4096)
    long.load_state_dict(short.state_dict())
    tokens = torch.randint(0, 11, (1, 4))
    assert torch.equal(short(tokens), long(tokens))
    with pytest.raises(InputError, match="max_seq_length=4"):
        short(torch.randint(0, 11, (1, 5)))
    assert long(torch.randint(0, 11, (1, 5))).shape == (1, 5, 11)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one; given vocab_size=None, input_dim=None"),
        ({"vocab_size": 5, "input_dim": 3}, "exactly one; given vocab_size=5, input_dim=3"),
        ({"input_dim": 3, "max_seq_length": 9}, r"max_seq_length belongs to the form over ids \(vocab_size=...\)"),
    ],
)
def test_a_mixture_of_the_forms_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SimpleNSM(**arguments)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        *[(IDS, name) for name in ("vocab_size", "d_model", "state_dim", "num_states", "output_dim", "max_seq_length")],
        *[(IDS, name) for name in ("num_layers", "num_heads")],
        *[(VECTORS, name) for name in ("input_dim", "d_model", "state_dim", "num_states", "output_dim", "num_layers")],
    ],
)
@pytest.mark.parametrize("value", [0, -3])
def test_sizes_below_one_are_refused_by_name(arguments: dict[str, Any], name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"SimpleNSM needs {name} >= 1.*given {value}"):
        make(arguments, **{"d_model": 8, name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide token_dim=8; given 3"),
        ({"chunk_size": 1}, "chunk_size must be at least 2"),
        ({"window": 3}, "reaches back at least chunk_size tokens"),
        ({"gate_type": "rnn"}, "gate_type must be one of gru, lstm, mingru; given 'rnn'"),
        ({"consolidate_every": -1}, "consolidate_every must be >= 0"),
        ({"routing_heads": 0}, "routing_heads must be at least 1; given 0"),
        ({"initial_states": 5}, "initial_states must be between 1 and max_states=4; given 5"),
        ({"prune_threshold": 2.0}, "prune_threshold is an importance"),
        ({"state_dim": 1}, "state_dim=1"),
        ({"state_dim": 7}, "even state_dim"),
        ({"routing": "topk"}, "goes with top_k"),
    ],
)
@pytest.mark.parametrize("arguments", [IDS, VECTORS], ids=["ids", "vectors"])
def test_what_a_layer_refuses_the_model_refuses(
    arguments: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(arguments, **{"d_model": 8, **changes})
