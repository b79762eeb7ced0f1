"""A stream in any pieces is the stream in one call: outputs and every state."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from nsm.models.stream import StreamModel
from nsm.spec import OFFSET
from tests.nsm.variants import (
    CHUNK,
    LONGEST,
    NOT_CAUSAL,
    VARIANTS,
    lane_of,
    make,
    other_tokens,
    random_tokens,
    run,
    run_token_by_token,
    same_bits,
    same_numbers,
    zero_beyond_the_offset,
)

some_examples = settings(max_examples=5, deadline=None)
lengths = st.integers(1, LONGEST)
some_cuts = st.lists(st.integers(1, LONGEST - 1), max_size=5)
seeds = st.integers(0, 100)


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest) -> StreamModel:
    return make(request.param)


@pytest.fixture(scope="module", params=[*VARIANTS, *NOT_CAUSAL])
def any_model(request: pytest.FixtureRequest) -> StreamModel:
    """Those that are not causal too."""
    return make(request.param)


# -- one stream, many ways --------------------------------------------------------------------------------------


@some_examples
@given(length=lengths, cuts=some_cuts, seed=seeds)
def test_any_split_is_the_sequence_in_one_call(model: StreamModel, length: int, cuts: list[int], seed: int) -> None:
    with torch.no_grad():
        tokens = random_tokens(model, 2, length, seed)
        whole, whole_state = run(model, tokens)
        state, outputs = model.initial_state(2), []
        for start, end in pairwise(sorted({0, length, *(cut for cut in cuts if cut < length)})):
            output, state = run(model, tokens[:, start:end], state)
            outputs.append(output)
    assert_close(torch.cat(outputs, 1), whole, rtol=1e-5, atol=1e-5)
    same_numbers(state, whole_state)


@torch.no_grad()
@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, LONGEST])
def test_decode_and_commit_token_by_token_are_the_sequence_in_one_call(model: StreamModel, length: int) -> None:
    tokens = random_tokens(model, 2, length)
    whole, whole_state = run(model, tokens)
    outputs, state = run_token_by_token(model, tokens, model.initial_state(2))
    assert_close(outputs, whole, rtol=1e-5, atol=1e-5)
    same_numbers(state, whole_state)
    assert zero_beyond_the_offset(state)
    assert zero_beyond_the_offset(whole_state)


@torch.no_grad()
def test_several_chunks_a_call_are_single_chunks_one_after_the_other(any_model: StreamModel) -> None:
    model, tokens = any_model, random_tokens(any_model, 2, 7 * CHUNK)
    whole, whole_state = model.step(tokens, model.initial_state(2))
    for chunks in (1, 2, 3):
        state, outputs = model.initial_state(2), []
        for piece in tokens.split(chunks * CHUNK, 1):
            output, state = model.step(piece, state)
            outputs.append(output)
        assert_close(torch.cat(outputs, 1), whole, rtol=1e-5, atol=1e-5)
        same_numbers(state, whole_state)


@some_examples
@given(valid=st.tuples(*3 * [st.integers(0, 3 * CHUNK)]), chunks=st.integers(1, 3), seed=seeds)
def test_a_step_with_a_partial_chunk_is_forward_of_just_those_tokens(
    any_model: StreamModel, valid: tuple[int, ...], chunks: int, seed: int
) -> None:
    """Each lane by itself, from a state that is not the initial one."""
    model, counts = any_model, [min(count, chunks * CHUNK) for count in valid]
    with torch.no_grad():
        _, state = run(model, random_tokens(model, 3, 2 * CHUNK, seed + 1))
        tokens = random_tokens(model, 3, chunks * CHUNK, seed)
        outputs, after = model.step(tokens, state, torch.tensor(counts))
        assert outputs.shape == (3, chunks * CHUNK, model.output_dim)
        assert zero_beyond_the_offset(after)
        for lane, count in enumerate(counts):
            expected_state = lane_of(model, state, lane)
            if not count:
                same_bits(lane_of(model, after, lane), expected_state)
                continue
            expected, expected_state = run(model, tokens[lane : lane + 1, :count], expected_state)
            assert_close(outputs[lane : lane + 1, :count], expected, rtol=1e-5, atol=1e-5)
            same_numbers(lane_of(model, after, lane), expected_state)


@torch.no_grad()
def test_a_step_without_valid_takes_all_tokens(any_model: StreamModel) -> None:
    model, tokens = any_model, random_tokens(any_model, 2, 2 * CHUNK)
    outputs, state = model.step(tokens, model.initial_state(2))
    explicit, explicit_state = model.step(tokens, model.initial_state(2), torch.tensor([2 * CHUNK, 2 * CHUNK]))
    expected, expected_state = run(model, tokens)
    assert torch.equal(outputs, explicit)
    same_bits(state, explicit_state)
    assert torch.equal(outputs, expected)
    same_bits(state, expected_state)


@settings(max_examples=3, deadline=None)
@given(turns=st.lists(st.tuples(*3 * [st.booleans()]), min_size=1, max_size=LONGEST), seed=seeds)
def test_lanes_that_get_a_token_now_and_then_are_streams_of_their_own(
    model: StreamModel, turns: list[tuple[bool, ...]], seed: int
) -> None:
    """Tokens one at a time; the lanes drift apart in their chunks."""
    tokens = random_tokens(model, 3, len(turns), seed)
    seen: list[list[int]] = [[], [], []]
    got: list[list[Tensor]] = [[], [], []]
    with torch.no_grad():
        state = model.initial_state(3)
        for now, turn in enumerate(turns):
            before = state
            output, state = model.decode(tokens[:, now : now + 1], state, torch.tensor(turn).long())
            state = model.commit(state)
            for lane, has_token in enumerate(turn):
                if has_token:
                    seen[lane].append(now)
                    got[lane].append(output[lane])
                else:
                    same_bits(lane_of(model, state, lane), lane_of(model, before, lane))
        for lane in range(3):
            if not seen[lane]:
                same_bits(lane_of(model, state, lane), model.initial_state(1))
                continue
            expected, expected_state = run(model, tokens[lane : lane + 1, seen[lane]])
            assert_close(torch.cat(got[lane]).unsqueeze(0), expected, rtol=1e-5, atol=1e-5)
            same_numbers(lane_of(model, state, lane), expected_state)


@torch.no_grad()
def test_forward_goes_on_where_a_chunk_is_full_and_not_committed(model: StreamModel) -> None:
    tokens = random_tokens(model, 1, CHUNK + 3)
    state = model.initial_state(1)
    for place in range(CHUNK):
        _, state = model.decode(tokens[:, place : place + 1], state)
    assert state[OFFSET].tolist() == [CHUNK]
    outputs, state = run(model, tokens[:, CHUNK:], state)
    whole, whole_state = run(model, tokens)
    assert_close(outputs, whole[:, CHUNK:], rtol=1e-5, atol=1e-5)
    same_numbers(state, whole_state)


@torch.no_grad()
def test_a_lane_of_many_is_the_stream_alone(any_model: StreamModel) -> None:
    model, tokens = any_model, random_tokens(any_model, 3, LONGEST)
    outputs, state = run(model, tokens)
    for lane in range(3):
        alone, state_alone = run(model, tokens[lane : lane + 1])
        assert_close(outputs[lane : lane + 1], alone, rtol=1e-5, atol=1e-5)
        same_numbers(lane_of(model, state, lane), state_alone)


# -- what does not matter ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_one_lane_is_given_changes_no_bit_of_another(any_model: StreamModel) -> None:
    model, tokens = any_model, random_tokens(any_model, 3, LONGEST)
    changed = tokens.clone()
    changed[1] = other_tokens(model, tokens)[1]
    outputs, state = run(model, tokens)
    changed_outputs, changed_state = run(model, changed)
    for other in (0, 2):
        assert torch.equal(outputs[other], changed_outputs[other])
        same_bits(lane_of(model, state, other), lane_of(model, changed_state, other))
    assert not bool((outputs[1] == changed_outputs[1]).all(-1).any())


@torch.no_grad()
@pytest.mark.parametrize("before", [0, CHUNK, 3 * CHUNK])
def test_a_lane_with_no_valid_token_keeps_its_state_bit_for_bit(any_model: StreamModel, before: int) -> None:
    model, state = any_model, any_model.initial_state(2)
    if before:
        _, state = run(model, random_tokens(model, 2, before), state)
    _, after = model.step(random_tokens(model, 2, 2 * CHUNK, seed=1), state, torch.tensor([2 * CHUNK, 0]))
    same_bits(lane_of(model, after, 1), lane_of(model, state, 1))
    last = len(model.layers) - 1
    assert not torch.equal(after[f"{last}.bank"][0], state[f"{last}.bank"][0])


@torch.no_grad()
@pytest.mark.parametrize("offset", [0, 2, CHUNK])
def test_a_lane_with_no_token_to_decode_keeps_its_state_bit_for_bit(model: StreamModel, offset: int) -> None:
    """Even where its chunk is full and waits for the commit."""
    _, state = run(model, random_tokens(model, 2, CHUNK))
    for place in range(offset):
        token = random_tokens(model, 2, 1, seed=place)
        _, state = model.decode(token, state, torch.tensor([int(place < 1), 1]))
    _, after = model.decode(random_tokens(model, 2, 1, seed=9), state, torch.tensor([1, 0]))
    same_bits(lane_of(model, after, 1), lane_of(model, state, 1))
    assert after[OFFSET].tolist() == [min(offset, 1) + 1, offset]
    committed = model.commit(after)
    same_bits(lane_of(model, committed, 0), lane_of(model, after, 0))
    assert committed[OFFSET].tolist() == [min(offset, 1) + 1, offset % CHUNK]


@torch.no_grad()
@pytest.mark.parametrize("valid", [0, 1, CHUNK - 1, CHUNK, CHUNK + 2])
def test_what_stands_after_the_valid_tokens_changes_no_bit(any_model: StreamModel, valid: int) -> None:
    model, tokens = any_model, random_tokens(any_model, 1, 2 * CHUNK)
    outputs, state = model.step(tokens, model.initial_state(1), torch.tensor([valid]))
    paddings = [other_tokens(model, tokens)]
    if model.token_spec.shape:
        paddings += [torch.full_like(tokens, value) for value in (float("nan"), float("inf"), 1e38)]
    for padding in paddings:
        padded = torch.cat([tokens[:, :valid], padding[:, valid:]], 1)
        other_outputs, other_state = model.step(padded, model.initial_state(1), torch.tensor([valid]))
        assert torch.equal(outputs[:, :valid], other_outputs[:, :valid])
        same_bits(state, other_state)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in VARIANTS if "vectors" in name])
def test_a_vector_that_is_none_changes_no_bit_in_decode(name: str) -> None:
    model = make(name)
    _, state = run(model, random_tokens(model, 2, CHUNK + 1))
    token = random_tokens(model, 2, 1, seed=1)
    spoiled = token.clone()
    spoiled[1] = float("nan")
    output, after = model.decode(token, state, torch.tensor([1, 0]))
    other, other_after = model.decode(spoiled, state, torch.tensor([1, 0]))
    assert torch.equal(output[0], other[0])
    same_bits(after, other_after)


# -- the state ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_reset_is_a_fresh_stream(any_model: StreamModel) -> None:
    """Whatever ran before: the initial state is the same, and so is all that follows from it."""
    model, tokens = any_model, random_tokens(any_model, 2, LONGEST)
    fresh = {name: value.clone() for name, value in model.initial_state(2).items()}
    outputs, state = run(model, tokens)
    same_bits(model.initial_state(2), fresh)
    again, state_again = run(model, tokens, model.initial_state(2))
    assert torch.equal(again, outputs)
    same_bits(state_again, state)


@torch.no_grad()
def test_one_lane_can_be_reset_while_the_others_go_on(any_model: StreamModel) -> None:
    model = any_model
    _, state = run(model, random_tokens(model, 2, 3 * CHUNK))
    fresh = model.initial_state(2)
    mixed = {name: torch.stack([value[0], fresh[name][1]]) for name, value in state.items()}
    tokens = random_tokens(model, 2, 2 * CHUNK, seed=1)
    outputs, after = model.step(tokens, mixed)
    expected, expected_state = model.step(tokens, fresh)
    kept, kept_state = model.step(tokens, state)
    assert torch.equal(outputs[1], expected[1])
    same_bits(lane_of(model, after, 1), lane_of(model, expected_state, 1))
    assert torch.equal(outputs[0], kept[0])
    same_bits(lane_of(model, after, 0), lane_of(model, kept_state, 0))


@torch.no_grad()
def test_running_changes_neither_the_model_nor_the_state_it_was_given(any_model: StreamModel) -> None:
    model = any_model
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    _, state = run(model, random_tokens(model, 2, CHUNK))
    given_state = {name: value.clone() for name, value in state.items()}
    run(model, random_tokens(model, 2, LONGEST), state)
    model.step(random_tokens(model, 2, 2 * CHUNK), state, torch.tensor([2 * CHUNK, 3]))
    if model.causal:
        model.decode(random_tokens(model, 2, 1), state)
    same_bits(state, given_state)
    same_bits(dict(model.state_dict()), weights)
