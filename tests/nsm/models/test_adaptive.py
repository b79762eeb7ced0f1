"""AdaptiveNSM: banks that adapt while they run, the same however the stream is cut, deployed or not."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nsm.errors import ConfigError
from nsm.models.adaptive import AdaptiveNSM
from nsm.models.base import State
from tests.nsm.variants import CHUNK, SLOTS, layers_of, make, random_tokens, run, run_token_by_token

LENGTH = 40 * CHUNK


def make_adaptive(**changes: Any) -> AdaptiveNSM:
    model = make("adaptive", **changes)
    assert isinstance(model, AdaptiveNSM)
    return model


def masks_after_each_chunk(model: AdaptiveNSM, tokens: Tensor, state: State | None = None) -> list[Tensor]:
    state, masks = model.initial_state(tokens.shape[0]) if state is None else state, []
    for chunk in tokens.split(CHUNK, 1):
        _, state = model.step(chunk, state)
        masks.append(torch.stack([state["0.mask"], state["1.mask"]]))
    return masks


@torch.no_grad()
def test_slots_come_and_go_while_a_stream_runs() -> None:
    model = make_adaptive()
    tokens = random_tokens(model, 3, LENGTH)
    masks = masks_after_each_chunk(model, tokens)
    came = sum(int((after & ~before).sum()) for before, after in pairwise(masks))
    went = sum(int((before & ~after).sum()) for before, after in pairwise(masks))
    assert came > 1
    assert went > 1
    assert all(bool(mask.any(-1).all()) for mask in masks)
    # Lanes decide for themselves, and the model stays as it was.
    assert any(not torch.equal(mask[:, 0], mask[:, 1]) for mask in masks)
    assert model.state_manager.num_active_states == 4


@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(1, LENGTH // 2 - 1), max_size=6), seed=st.integers(0, 100))
def test_decisions_are_the_same_however_a_stream_is_cut(cuts: list[int], seed: int) -> None:
    model, length = make_adaptive(), LENGTH // 2
    with torch.no_grad():
        tokens = random_tokens(model, 2, length, seed)
        whole = masks_after_each_chunk(model, tokens)
        state = model.initial_state(2)
        for start, end in pairwise(sorted({0, length, *cuts})):
            _, state = run(model, tokens[:, start:end], state)
            expected = whole[end // CHUNK - 1] if end >= CHUNK else None
            if expected is not None:
                assert torch.equal(torch.stack([state["0.mask"], state["1.mask"]]), expected)


@torch.no_grad()
def test_decisions_are_the_same_token_by_token_and_in_many_chunks_a_call() -> None:
    model = make_adaptive()
    tokens = random_tokens(model, 2, LENGTH // 2)
    expected = masks_after_each_chunk(model, tokens)[-1]
    _, single = run_token_by_token(model, tokens, model.initial_state(2))
    _, many = model.step(tokens, model.initial_state(2))
    for state in (single, many):
        assert torch.equal(torch.stack([state["0.mask"], state["1.mask"]]), expected)


@torch.no_grad()
def test_a_slot_rests_before_it_comes_back() -> None:
    """From 0.3 to 0.4 at 2 % of the way to 0.5 a commit: 35 commits."""
    model = make_adaptive()
    tokens = random_tokens(model, 4, 120 * CHUNK)
    gone: dict[tuple[int, ...], int] = {}
    for commit, (before, after) in enumerate(pairwise(masks_after_each_chunk(model, tokens))):
        for place in torch.nonzero(after & ~before).tolist():
            assert commit - gone.get(tuple(place), -1000) > 30
        gone |= {tuple(place): commit for place in torch.nonzero(before & ~after).tolist()}
    assert gone


@torch.no_grad()
def test_the_manager_says_what_is_active_when_a_stream_begins() -> None:
    model = AdaptiveNSM(input_dim=7, state_dim=16, max_states=8, initial_states=3, prune_threshold=0.1)
    assert len(model.state_managers) == 2
    assert model.state_manager is model.state_managers[0]
    assert model.state_manager.num_active_states == 3
    assert model.state_manager.memory_usage == pytest.approx(3 * 16 * 4 / 1e6)
    assert model.state_manager.allocate_states(2) == 2
    assert model.initial_state()["0.mask"].tolist() == [[True] * 5 + [False] * 3]
    assert model.initial_state()["1.mask"].tolist() == [[True] * 3 + [False] * 5]


@pytest.mark.parametrize(
    ("arguments", "shape", "output"),
    [({"input_dim": 7}, (7,), 7), ({"input_dim": 7, "output_dim": 3}, (7,), 3), ({"vocab_size": 9}, (), 9)],
)
def test_its_two_forms(arguments: dict[str, Any], shape: tuple[int, ...], output: int) -> None:
    model = AdaptiveNSM(state_dim=16, max_states=8, initial_states=3, **arguments)
    tokens = torch.randn(2, 20, *shape) if shape else torch.randint(0, 9, (2, 20))
    assert model(tokens).shape == (2, 20, output)
    assert model.config["d_model"] == 8


@torch.no_grad()
def test_the_config_builds_the_same_model_again() -> None:
    for model in (make_adaptive(), make("adaptive, lstm, memory, vectors")):
        twin = AdaptiveNSM(**model.config).eval()
        twin.load_state_dict(model.state_dict())
        assert twin.config == model.config
        assert twin.spec() == model.spec()
        tokens = random_tokens(model, 2, 5 * CHUNK)
        assert torch.equal(twin(tokens), model(tokens))


def test_thresholds_reach_the_layers() -> None:
    layers = layers_of(make_adaptive())
    assert len(layers) == 2
    for layer in layers:
        adaptation = layer.adaptation
        assert adaptation is not None
        found = (adaptation.prune_threshold, adaptation.allocate_threshold, adaptation.novelty_threshold)
        assert found == (0.3, 0.35, 0.5)
        assert layer.manager.max_states == SLOTS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "AdaptiveNSM takes either vocab_size .* exactly one; given vocab_size=None, input_dim=None"),
        ({"input_dim": 3, "vocab_size": 3}, "exactly one; given vocab_size=3, input_dim=3"),
        ({"input_dim": 3, "prune_threshold": 0.4}, "the gap keeps slots from flickering; given prune_threshold=0.4"),
        ({"input_dim": 3, "allocate_threshold": 1.0}, "allocate_threshold=1.0"),
        ({"input_dim": 3, "prune_threshold": -0.1}, "prune_threshold=-0.1"),
        ({"input_dim": 3, "novelty_threshold": 1.5}, "novelty_threshold=1.5"),
        ({"input_dim": 3, "initial_states": 65}, "initial_states must be between 1 and max_states=64; given 65"),
        ({"input_dim": 3, "max_states": 0}, "AdaptiveNSM needs max_states >= 1.*given 0"),
        ({"input_dim": 3, "state_dim": 7, "d_model": 8}, "even state_dim"),
        ({"input_dim": 3, "hierarchy": (2,)}, "leave either hierarchy or adaptation out"),
        ({"input_dim": 3, "output_dim": 0}, "AdaptiveNSM needs output_dim >= 1; given 0"),
        ({"input_dim": 3, "d_model": 0}, "AdaptiveNSM needs d_model >= 1; given 0"),
        ({"input_dim": 3, "d_model": -8}, "AdaptiveNSM needs d_model >= 1; given -8"),
    ],
)
def test_what_makes_no_model_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdaptiveNSM(**arguments)


@pytest.mark.parametrize(("state_dim", "heads"), [(256, 4), (126, 1), (100, 2)])
def test_any_width_has_heads_that_divide_it(state_dim: int, heads: int) -> None:
    with torch.device("meta"):
        model = AdaptiveNSM(input_dim=3, state_dim=state_dim)
    assert layers_of(model)[0].attention.local.num_heads == model.config["num_heads"] == heads
