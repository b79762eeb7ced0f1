"""The transformer against attention over all tokens so far, token by token; and its rings."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nsm.baselines import TransformerLM
from nsm.baselines.transformer_layer import TransformerLayer
from nsm.spec import COUNT

Stir = Callable[[nn.Module], None]
TOKENS = torch.randint(0, 20, (2, 37), generator=torch.Generator().manual_seed(0))


def close(one: Tensor, other: Tensor) -> None:
    """The model's rotations are kept in float32."""
    assert_close(one, other, rtol=1e-5, atol=1e-5)


def attend_token_by_token(model: TransformerLM, layer: TransformerLayer, tokens: Tensor) -> Tensor:
    """A rotation of a pair of numbers is the multiplication with a complex one."""
    heads, context, width = model.shape
    length, half = tokens.shape[1], width // 2
    parts = layer.qkv(layer.norm(tokens)).reshape(len(tokens), length, 3, heads, width)
    speed = 10000.0 ** (-torch.arange(half).double() / half)
    speed = (speed * model.period / 2 / math.pi).round() / model.period * 2 * math.pi
    angles = torch.arange(length)[:, None] * speed
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    query, key = (torch.complex(part[..., :half], part[..., half:]) * turn for part in parts[:, :, :2].unbind(2))
    value, attended = parts[:, :, 2], []
    for now in range(length):
        seen = slice(max(0, now - context + 1), now + 1)
        scores = torch.einsum("bhe,bnhe->bhn", query[:, now], key[:, seen].conj()).real / width**0.5
        attended.append(torch.einsum("bhn,bnhe->bhe", scores.softmax(-1), value[:, seen]).flatten(1))
    tokens = tokens + layer.out(torch.stack(attended, 1))
    fed: Tensor = tokens + layer.feed_forward(layer.forward_norm(tokens))
    return fed


@torch.no_grad()
@pytest.mark.parametrize("context", [1, 2, 6, 16, 37, 50])
@pytest.mark.parametrize("pieces", [1, 5, 16, 37])
def test_the_transformer_is_full_attention_with_a_mask(stir: Stir, context: int, pieces: int) -> None:
    model = TransformerLM(20, 8, 2, 2, context)
    stir(model)
    hidden = model.embed(TOKENS)
    for layer in model.layers:
        assert isinstance(layer, TransformerLayer)
        hidden = attend_token_by_token(model, layer, hidden)
    close(model(TOKENS), model.head(hidden))
    state, outputs = model.initial_state(2), []
    for piece in TOKENS.split(pieces, 1):
        output, state = model.step(piece, state)
        outputs.append(output)
    close(torch.cat(outputs, 1), model.head(hidden))


@torch.no_grad()
def test_writing_the_rows_of_the_graph_into_the_rings_is_the_state(stir: Stir) -> None:
    model = TransformerLM(20, 8, 2, 2, context=6)
    stir(model)
    _, state = model.step(TOKENS[:, :9], model.initial_state(2))
    inputs = {"tokens": TOKENS[:, 9:13], "valid": torch.tensor([4, 3])}
    outputs, rows = model.graph("step", inputs, state)
    expected_outputs, expected = model.call("step", inputs, state)
    assert torch.equal(outputs["outputs"], expected_outputs["outputs"])
    assert state[COUNT].tolist() == [9, 9]
    assert rows.pop(COUNT).tolist() == expected.pop(COUNT).tolist() == [13, 12]
    for name, new in rows.items():
        assert new.shape == (2, 2, 4, 4)
        ring = state[name].clone()
        for lane, valid in enumerate((4, 3)):
            for turn in range(valid):
                ring[lane, :, (9 + turn) % 6] = new[lane, :, turn]
        assert torch.equal(ring, expected[name])


@torch.no_grad()
@pytest.mark.parametrize("context", [8, 6])
@pytest.mark.parametrize("valid", [0, 1, 2, 3, 4])
def test_a_stream_is_the_same_however_old_it_is(stir: Stir, context: int, valid: int) -> None:
    """Where the count goes back by a period, in either lane, no bit of what follows tells it from a younger stream."""
    model = TransformerLM(20, 8, 2, 2, context)
    stir(model)
    assert model.period % context == 0
    streams = []
    for start in (model.period - 18, 2 * model.period - 18):
        _, state = model.step(TOKENS[:, :16], {**model.initial_state(2), COUNT: torch.tensor([start, start])})
        assert state[COUNT].tolist() == [start + 16, start + 16]
        middle, state = model.step(TOKENS[:, 16:20], state, torch.tensor([valid, 4]))
        outputs, state = model.step(TOKENS[:, 20:], state)
        streams.append({"middle": middle[1], "outputs": outputs, **state})
    for name, value in streams[0].items():
        assert torch.equal(value, streams[1][name]), name
    assert state[COUNT].tolist() == [model.period + valid + 15, model.period + 19]


@torch.no_grad()
def test_positions_are_relative(stir: Stir) -> None:
    """Also to float32: the rotations of late positions are as exact as those of early ones."""
    model = TransformerLM(20, 8, 2, 2, context=8)
    stir(model)
    model.float()
    early, _ = model.step(TOKENS, {**model.initial_state(2), COUNT: torch.tensor([8, 8])})
    late, _ = model.step(TOKENS, {**model.initial_state(2), COUNT: torch.tensor([model.period + 8008] * 2)})
    assert_close(late, early, rtol=1e-4, atol=1e-4)
