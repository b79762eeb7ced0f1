"""What no output may see: what masked slots and empty windows hold, and tokens that come later."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsm.models.base import State
from nsm.models.stream import StreamModel
from nsm.spec import OFFSET
from tests.nsm.variants import (
    CHUNK,
    LONGEST,
    NOT_CAUSAL,
    SLOTS,
    VARIANTS,
    layers_of,
    make,
    other_tokens,
    poisoned,
    random_tokens,
    run,
    run_token_by_token,
    same_bits,
    same_numbers,
)

POISONS = [1e30, -1e30, 1e38]


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest) -> StreamModel:
    return make(request.param)


@pytest.fixture(scope="module", params=[*VARIANTS, *NOT_CAUSAL])
def any_model(request: pytest.FixtureRequest) -> StreamModel:
    return make(request.param)


def with_masks(state: State, mask: torch.Tensor) -> State:
    return {name: mask if name.endswith(".mask") else value for name, value in state.items()}


def same_but_in_masked_slots(one: State, other: State) -> None:
    """Bit for bit, except what lies in a masked slot of a bank or cell, and finite there too."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        layer, _, role = name.partition(".")
        if role in ("bank", "cell"):
            active = one[f"{layer}.mask"][:, None, :, None].expand(value.shape)
            assert torch.equal(value[active], other[name][active]), name
            assert bool(torch.isfinite(other[name]).all()), name
        else:
            assert torch.equal(value, other[name]), name


# -- poison ------------------------------------------------------------------------------------------------------


@settings(max_examples=5, deadline=None)
@given(
    masks=st.lists(st.lists(st.booleans(), min_size=SLOTS, max_size=SLOTS).filter(any), min_size=2, max_size=2),
    poison=st.sampled_from(POISONS),
)
def test_what_masked_slots_hold_changes_no_bit(any_model: StreamModel, masks: list[list[bool]], poison: float) -> None:
    """Also where groups of a hierarchy have no active slot at all."""
    model, tokens = any_model, random_tokens(any_model, 2, LONGEST)
    with torch.no_grad():
        clean = with_masks(model.initial_state(2), torch.tensor(masks))
        outputs, state = run(model, tokens, clean)
        other_outputs, other_state = run(model, tokens, poisoned(clean, poison))
    assert bool(torch.isfinite(outputs).all())
    assert torch.equal(outputs, other_outputs)
    same_but_in_masked_slots(state, other_state)


@torch.no_grad()
@pytest.mark.parametrize("poison", POISONS)
def test_what_masked_slots_hold_changes_no_bit_of_a_stream_of_single_tokens(model: StreamModel, poison: float) -> None:
    """One slot in three is masked, in every group of a hierarchy; the poison comes back after every commit."""
    tokens = random_tokens(model, 2, LONGEST)
    mask = torch.tensor([[True, True, False, True, True, False], [False, True, True, True, False, True]])
    clean = with_masks(model.initial_state(2), mask)
    spoiled = poisoned(clean, poison)
    for place in range(LONGEST):
        output, clean = model.decode(tokens[:, place : place + 1], clean)
        other_output, spoiled = model.decode(tokens[:, place : place + 1], spoiled)
        assert torch.equal(output, other_output), place
        clean, spoiled = model.commit(clean), model.commit(spoiled)
        same_but_in_masked_slots(clean, spoiled)
        if place % CHUNK == CHUNK - 1:
            spoiled = poisoned(spoiled, poison)


@torch.no_grad()
def test_some_slots_are_masked_where_the_variants_say_so() -> None:
    """Or the tests above would show nothing; and an active slot is felt."""
    model = make("gru")
    tokens, state = random_tokens(model, 2, LONGEST), model.initial_state(2)
    bank = state["0.bank"].clone()
    bank[..., 2, :] += 1.0
    assert not bool((run(model, tokens, state)[0] == run(model, tokens, {**state, "0.bank": bank})[0]).all(-1).any())
    few = make("communication, some masked")
    assert few.initial_state()["0.mask"].tolist() == [[True] * 3 + [False] * 3]


@torch.no_grad()
@pytest.mark.parametrize("poison", POISONS)
def test_an_empty_window_is_nothing(any_model: StreamModel, poison: float) -> None:
    """What lies in rows that are not there changes no bit: at the start, and while the windows fill."""
    model, tokens = any_model, random_tokens(any_model, 1, LONGEST)
    clean = model.initial_state(1)
    spoiled = {
        name: torch.full_like(value, poison) if name.endswith((".key", ".value")) else value
        for name, value in clean.items()
    }
    assert len(spoiled) > 3
    assert torch.equal(run(model, tokens, clean)[0], run(model, tokens, spoiled)[0])
    if model.causal:
        single, _ = run_token_by_token(model, tokens, clean)
        assert torch.equal(single, run_token_by_token(model, tokens, spoiled)[0])
    filled = {**clean, "lane.filled": torch.full((1,), model.carried_rows)}
    assert not torch.equal(run(model, tokens, clean)[0], run(model, tokens, filled)[0])


@torch.no_grad()
@pytest.mark.parametrize("name", ["memory", "both ways, vectors, memory, hierarchy"])
def test_an_empty_memory_gives_exactly_nothing(name: str) -> None:
    model = make(name)
    without = make(name, memory_rows=0)
    without.load_state_dict(model.state_dict(), strict=False)
    tokens = random_tokens(model, 2, 2 * CHUNK)
    outputs, plain = model(tokens), without(tokens)
    assert torch.equal(outputs[:, :CHUNK], plain[:, :CHUNK])
    assert not bool((outputs[:, CHUNK:] == plain[:, CHUNK:]).all(-1).any())


# -- causality ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("place", [0, 1, CHUNK - 1, CHUNK, 2 * CHUNK + 2, LONGEST - 1])
def test_no_output_sees_a_later_token(model: StreamModel, place: int) -> None:
    tokens = random_tokens(model, 2, LONGEST)
    changed = tokens.clone()
    changed[:, place] = other_tokens(model, tokens)[:, place]
    same = (model(tokens) == model(changed)).all(-1)
    assert bool(same[:, :place].all())
    assert not bool(same[:, place].any())


@torch.no_grad()
@pytest.mark.parametrize("name", NOT_CAUSAL)
@pytest.mark.parametrize("place", [1, CHUNK - 1, CHUNK, 2 * CHUNK + 2, LONGEST - 1])
def test_without_causality_a_token_sees_its_whole_chunk_and_no_later_one(name: str, place: int) -> None:
    model = make(name)
    tokens = random_tokens(model, 2, LONGEST)
    changed = tokens.clone()
    changed[:, place] = other_tokens(model, tokens)[:, place]
    same = (model(tokens) == model(changed)).all(-1)
    start = place - place % CHUNK
    assert bool(same[:, :start].all())
    assert not bool(same[:, start : place + 1].any())


@torch.no_grad()
def test_what_left_the_windows_is_remembered_by_the_bank(any_model: StreamModel) -> None:
    """The first token reaches the last output only through the bank: the convolution and windows are too short."""
    model, length = any_model, 24
    lone = torch.zeros(1, dtype=torch.int64)
    tokens = random_tokens(model, 1, length)
    changed = tokens.clone()
    changed[:, 0] = other_tokens(model, tokens)[:, 0]
    state, other = model.initial_state(1), model.initial_state(1)
    _, state = run(model, tokens[:, :CHUNK], state)
    _, other = run(model, changed[:, :CHUNK], other)
    # Take away all but the banks and what is settled with them.
    for now in (state, other):
        now["lane.filled"] = lone
        for name in now:
            if name.endswith((".tail", ".key", ".value")):
                now[name] = torch.zeros_like(now[name])
    same = (run(model, tokens[:, CHUNK:], state)[0] == run(model, tokens[:, CHUNK:], other)[0]).all(-1)
    assert not bool(same[:, : 2 * CHUNK].any())


# -- streams that are under way ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("length", [0, 2, LONGEST])
def test_pruning_and_allocation_leave_running_streams_alone(length: int) -> None:
    """State is an argument and a result: a manager changes where streams start, not those under way."""
    model = make("communication, some masked")
    state = model.initial_state(1)
    if length:
        _, state = run(model, random_tokens(model, 1, length), state)
    before = {name: value.clone() for name, value in state.items()}
    manager = layers_of(model)[0].manager
    manager.importance.zero_()
    manager.importance[0] = -9.0
    assert manager.prune_low_importance_states() == 1
    same_bits(state, before)
    assert manager.allocate_states(2) == 2
    same_bits(state, before)
    assert model.initial_state(1)["0.mask"].tolist() == [[True, True, True, True, False, False]]


@torch.no_grad()
def test_a_smaller_bank_is_the_same_bank_with_masked_slots() -> None:
    """The masked ones are not there at all: what `compact` relies on."""
    large = make("communication, some masked")
    small = make("communication, some masked", num_states=3)
    weights = {name: value[:3] if ".manager." in name else value for name, value in large.state_dict().items()}
    for name, value in weights.items():
        if name.endswith("router.score.weight"):
            weights[name] = value.unflatten(0, (-1, SLOTS))[:, :3].flatten(0, 1)
    small.load_state_dict(weights)
    tokens = random_tokens(large, 2, LONGEST)
    outputs, state = run(large, tokens)
    expected, expected_state = run(small, tokens)
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
    for layer in range(2):
        state[f"{layer}.bank"] = state[f"{layer}.bank"][..., :3, :]
        state[f"{layer}.mask"] = state[f"{layer}.mask"][:, :3]
        state[f"{layer}.open_weight"] = state[f"{layer}.open_weight"][..., :3]
    same_numbers(state, expected_state)
    assert state[OFFSET].tolist() == [3, 3]
