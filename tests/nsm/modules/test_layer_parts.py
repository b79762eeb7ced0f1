"""What a layer promises beside its numbers: lanes, time scales, adaptation, gradients, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nsm.errors import ConfigError, InputError
from nsm.modules.bank.adaptation import Adaptation
from nsm.modules.layer import NSMLayer
from nsm.modules.ops.layout import to_bank
from nsm.modules.protocol import LayerState
from nsm.modules.reference import ReferenceLayer
from tests.nsm.modules.layers import (
    CHUNK,
    DIM,
    SLOTS,
    VARIANTS,
    causal_only,
    clock,
    make_layer,
    random_tokens,
    scan,
)


@pytest.fixture(params=VARIANTS.values(), ids=list(VARIANTS))
def layer(request: pytest.FixtureRequest) -> NSMLayer:
    return make_layer(**request.param)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3, 4, 13])
def test_forward_runs_a_sequence_from_the_beginning(layer: NSMLayer, length: int) -> None:
    tokens = random_tokens(2, length)
    output, states = layer(tokens)
    assert output.shape == (2, length, DIM)
    for lane in range(2):
        stream = ReferenceLayer(layer)
        assert_close(output[lane], stream.run(tokens[lane]), rtol=1e-6, atol=1e-7)
        assert_close(to_bank(states, layer.heads)[lane], stream.pending, rtol=1e-6, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gru", "communication, some slots masked", "memory", "both ways"])
def test_forward_starts_from_the_bank_and_mask_that_it_is_given(name: str) -> None:
    layer, tokens = make_layer(**VARIANTS[name]), random_tokens(2, 9)
    bank = torch.randn(2, *layer.manager.bank.shape).double()
    mask = torch.tensor([[True, False, True, True, False, True], [False, False, True, False, True, False]])
    output, states = layer(tokens, bank, mask)
    for lane in range(2):
        stream = ReferenceLayer(layer, bank[lane], mask[lane])
        assert_close(output[lane], stream.run(tokens[lane]), rtol=1e-6, atol=1e-7)
        found = to_bank(states, layer.heads)[lane]
        assert_close(found[:, mask[lane]], stream.pending[:, mask[lane]], rtol=1e-6, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("name", causal_only)
def test_a_commit_leaves_the_lanes_that_are_not_full_bit_for_bit(name: str) -> None:
    layer = make_layer(**VARIANTS[name])
    _, state = scan(layer, random_tokens(3, 2 * CHUNK + 3), 1)
    full = torch.tensor([False, True, False])
    after = layer.commit(state, full, clock(layer, 2 * CHUNK, 3))
    for role, value in after.items():
        assert torch.equal(value[~full], state[role][~full]), role
        if role.startswith("open_"):
            assert not bool(value[full].any()), role
    assert not torch.equal(after["bank"][full], state["bank"][full])


@torch.no_grad()
def test_without_consolidation_a_commit_is_what_was_written_and_nothing_else() -> None:
    layer = make_layer(consolidate_every=0)
    _, state = scan(layer, random_tokens(2, 3), 1)
    after = layer.commit(state, torch.tensor([True, True]), clock(layer, 0, 2))
    keep, update = layer.router.transition(state["open_weight"], state["open_write"])
    assert_close(after["bank"], keep * state["bank"] + update, rtol=1e-12, atol=1e-12)
    assert not [name for name, _ in layer.named_parameters() if "propagator" in name or "bank_norm" in name]


@torch.no_grad()
def test_consolidation_runs_on_the_lanes_whose_turn_it_is() -> None:
    layer, plain = make_layer(consolidate_every=3, gate_type="lstm"), make_layer(consolidate_every=0)
    plain.load_state_dict(layer.state_dict(), strict=False)
    _, state = scan(layer, random_tokens(2, 3), 1)
    now = clock(layer, 0, 2)._replace(chunk=torch.tensor([1, 2]))
    after = layer.commit(state, torch.tensor([True, True]), now)
    written = plain.commit(
        {role: part for role, part in state.items() if role != "cell"}, torch.tensor([True] * 2), now
    )
    assert torch.equal(after["bank"][0], written["bank"][0])
    assert torch.equal(after["cell"][0], state["cell"][0])
    assert not bool((after["bank"][1] == written["bank"][1]).any())
    assert not bool((after["cell"][1] == state["cell"][1]).any())


# -- time scales -------------------------------------------------------------------------------------------------


def after_each_chunk(layer: NSMLayer, count: int) -> list[LayerState]:
    state, states = layer.initial_state(1), []
    for index in range(count):
        tokens = random_tokens(1, CHUNK, seed=index)
        _, state, _ = layer.scan(tokens, state, clock(layer, index * CHUNK, 1))
        states.append(state)
    return states


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [{"consolidate_every": 0}, {"gate_type": "gru"}, {"gate_type": "lstm"}, {"communication": True}],
    ids=["never consolidated", "gru", "lstm", "communication"],
)
def test_a_slower_group_changes_only_every_so_many_chunks(changes: dict[str, Any]) -> None:
    layer = make_layer(hierarchy=(2, 3), **changes)
    states = after_each_chunk(layer, 7)
    previous = layer.initial_state(1)
    for number, state in enumerate(states, 1):
        moved = (state["bank"] != previous["bank"]).flatten(0, 1).any(-1).any(0)
        groups = moved.reshape(3, 2).any(1).tolist()
        assert groups == [True, number % 2 == 0, number % 3 == 0], number
        previous = state


@torch.no_grad()
@pytest.mark.parametrize("slot", range(SLOTS))
def test_tokens_read_all_time_scales(slot: int) -> None:
    layer = make_layer(hierarchy=(2, 3), consolidate_every=0)
    tokens, state = random_tokens(1, CHUNK), layer.initial_state(1)
    bank = state["bank"].clone()
    bank[..., slot, :] += 1.0
    one, _, _ = layer.scan(tokens, state, clock(layer, 0, 1))
    other, _, _ = layer.scan(tokens, {**state, "bank": bank}, clock(layer, 0, 1))
    assert not bool((one == other).all(-1).any())


@torch.no_grad()
def test_tokens_write_to_the_fastest_group_alone() -> None:
    layer = make_layer(hierarchy=(2, 3), consolidate_every=0)
    _, _, (weights, mask) = layer.scan(random_tokens(1, CHUNK), layer.initial_state(1), clock(layer, 0, 1))
    assert weights.shape == (1, 1, layer.heads, CHUNK, 2)
    assert_close(weights.sum(-1), torch.ones(1, 1, layer.heads, CHUNK).double())
    assert mask.tolist() == [[[True] * SLOTS]]
    assert layer.periods == (2, 3)


# -- adaptation --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("gate_type", ["gru", "lstm"])
def test_a_slot_that_is_allocated_begins_at_its_learned_value_and_a_pruned_one_is_empty(gate_type: str) -> None:
    layer = make_layer(adaptation=Adaptation(0.3, 0.35, 0.5), initial_states=4, gate_type=gate_type)
    # The first slot is about to be pruned, and the free ones have rested.
    layer.manager.importance.copy_(torch.tensor([-1.0, 0.0, 0.0, 1.0, 0.0, 0.0]))
    learned = to_bank(layer.manager.bank.unsqueeze(0), layer.heads)
    previous, allocated, pruned = layer.initial_state(1), 0, 0
    for state in after_each_chunk(layer, 40):
        new = (state["mask"] & ~previous["mask"])[0]
        gone = (previous["mask"] & ~state["mask"])[0]
        for role in ("bank", "cell") if gate_type == "lstm" else ("bank",):
            assert torch.equal(state[role][..., new, :], learned[..., new, :])
            assert not bool(state[role][..., ~state["mask"][0], :].any())
        allocated, pruned, previous = allocated + int(new.sum()), pruned + int(gone.sum()), state
    assert allocated > 0
    assert pruned > 0


# -- declaration, learning, refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_the_initial_state_is_what_the_specs_declare(layer: NSMLayer, batch: int) -> None:
    layer = layer.float()
    state, specs = layer.initial_state(batch), layer.state_specs("7", batch)
    assert [spec.name for spec in specs] == [f"7.{role}" for role in state]
    manager = layer.manager
    bank = to_bank(torch.where(manager.mask[:, None], manager.bank, 0.0).unsqueeze(0), layer.heads)
    learned = {
        "bank": bank,
        "cell": bank,
        "mask": manager.mask,
        "importance": manager.get_importance_scores(),
    }
    for spec, (role, value) in zip(specs, state.items(), strict=True):
        assert value.shape == spec.shape
        assert value.dtype == getattr(torch, spec.dtype)
        assert spec.init == ("learned" if role in learned else "zeros")
        assert torch.equal(value, learned.get(role, torch.zeros((), dtype=value.dtype)).expand(value.shape))


def loss_of(layer: NSMLayer, tokens: Tensor) -> Tensor:
    output, _ = layer(tokens)
    target = random_tokens(tokens.shape[0], tokens.shape[1], seed=1)
    result: Tensor = (output * target).sum()
    return result


def test_gradients_reach_every_parameter(layer: NSMLayer) -> None:
    torch.autograd.backward(loss_of(layer, random_tokens(2, 7 * CHUNK + 1)))
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
        assert float(parameter.grad.abs().max()) > 0, name
    if layer.adaptation is None:
        bank, importance = layer.manager.bank.grad, layer.manager.importance.grad
        assert bank is not None
        assert importance is not None
        assert torch.equal(bank.abs().sum(-1) > 0, layer.manager.mask)
        assert torch.equal(importance.abs() > 0, layer.manager.mask)


@torch.no_grad()
def test_forward_changes_nothing_in_the_layer(layer: NSMLayer) -> None:
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer(random_tokens(2, 9))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("state_dim", [2, 6, 30, 64])
def test_any_even_state_dim(state_dim: int) -> None:
    layer = make_layer(state_dim=state_dim, routing_heads=4)
    assert (state_dim // 2) % layer.heads == 0
    assert layer.router.num_heads == layer.consolidation.propagator.num_blocks // 2 == layer.heads
    assert layer(random_tokens(1, 5))[1].shape == (1, SLOTS, state_dim)


@pytest.mark.parametrize(
    ("tokens", "states", "mask", "message"),
    [
        ((2, 5, DIM + 1), None, None, rf"tokens .* = \[B, T, {DIM}\].*given \[2, 5, {DIM + 1}\]"),
        ((5, DIM), None, None, rf"\[B, T, {DIM}\].*given \[5, {DIM}\]"),
        ((2, 0, DIM), None, None, rf"T >= 1; given \[2, 0, {DIM}\]"),
        (
            (2, 5, DIM),
            (2, SLOTS - 1, 12),
            None,
            rf"states .* = \[2, {SLOTS}, 12\].*given \[2, {SLOTS - 1}, 12\]",
        ),
        ((2, 5, DIM), (2, SLOTS, 10), None, rf"given \[2, {SLOTS}, 10\]"),
        ((2, 5, DIM), (1, SLOTS, 12), None, rf"given \[1, {SLOTS}, 12\]"),
        (
            (2, 5, DIM),
            None,
            torch.ones(2, SLOTS - 1).bool(),
            rf"mask .* = \[2, {SLOTS}\].*given \[2, {SLOTS - 1}\]",
        ),
        ((2, 5, DIM), None, torch.ones(2, SLOTS), "bool mask.*of torch.float32"),
    ],
)
def test_what_is_not_of_the_layer_s_sizes_is_refused(
    tokens: tuple[int, ...], states: tuple[int, ...] | None, mask: Tensor | None, message: str
) -> None:
    layer = make_layer(state_dim=12)
    bank = None if states is None else torch.zeros(states).double()
    with pytest.raises(InputError, match=message):
        layer(torch.zeros(tokens).double(), bank, mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk_size": 1}, "chunk_size must be at least 2; given 1"),
        ({"chunk_size": 8, "window": 7}, "reaches back at least chunk_size tokens.*given window=7, chunk_size=8"),
        ({"conv_width": 1}, "conv_width must be >= 2, .*given 1, 4.0, 0"),
        ({"feed_forward": 0}, "feed_forward finite and > 0, .*given 4, 0, 0"),
        ({"feed_forward": float("inf")}, "feed_forward finite and > 0, .*given 4, inf, 0"),
        ({"feed_forward": float("nan")}, "feed_forward finite and > 0, .*given 4, nan, 0"),
        ({"consolidate_every": -1}, "consolidate_every must be >= 0; given -1"),
        ({"memory_rows": -1}, "memory_rows >= 0; given 4, 4.0, -1"),
        ({"memory_rows": 1}, "A memory needs at least 2 rows"),
        ({"num_heads": 5}, "num_heads must divide token_dim=6; given 5"),
        ({"gate_type": "rnn"}, "gate_type must be one of gru, lstm, mingru; given 'rnn'"),
        ({"gate_type": "rnn", "consolidate_every": 0}, "gate_type must be one of gru, lstm, mingru; given 'rnn'"),
        ({"communication": True, "consolidate_every": 0}, "communication needs consolidate_every >= 1"),
        ({"initial_states": 7}, "initial_states must be between 1 and max_states=6; given 7"),
        ({"num_states": 0}, "num_states=0"),
        ({"state_dim": 1}, "state_dim=1"),
        ({"state_dim": 7}, "even state_dim.*state_dim=7"),
        ({"routing": "topk", "top_k": 7}, "top_k in 1 .. num_states=6"),
        ({"routing": "topk", "top_k": 4, "hierarchy": (2,)}, "top_k in 1 .. num_states=3"),
        ({"hierarchy": (1,)}, r"each >= 2.*hierarchy=\(1,\), num_states=6"),
        ({"hierarchy": (4, 2)}, r"ascending.*hierarchy=\(4, 2\)"),
        ({"hierarchy": (2, 2)}, r"hierarchy=\(2, 2\)"),
        ({"hierarchy": (2, 3, 4)}, r"shared out evenly.*hierarchy=\(2, 3, 4\), num_states=6"),
        ({"hierarchy": (2,), "adaptation": Adaptation()}, "leave either hierarchy or adaptation out"),
    ],
)
def test_what_makes_no_layer_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_layer(**arguments)
