"""A stream in any pieces is the stream in one call, whatever the baseline: outputs and every state."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from nsm.baselines import RWKVLM, MambaLM, RecurrentLM, TransformerLM
from nsm.baselines.base import CausalLM
from nsm.errors import ConfigError, InputError
from nsm.models.base import State

LONGEST = 40
few = settings(max_examples=10, deadline=None)
seeds = st.integers(0, 100)


def random_tokens(lanes: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 20, (lanes, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model: CausalLM, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    outputs, after = model(tokens, state, return_state=True)
    return outputs, after


def lane_of(state: State, lane: int) -> State:
    return {name: value[lane : lane + 1] for name, value in state.items()}


def same_bits(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def same_numbers(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert_close(value, other[name], rtol=1e-9, atol=1e-9, msg=f"{name}: {value} is not {other[name]}")


@few
@given(
    length=st.integers(1, LONGEST),
    cuts=st.lists(st.integers(1, LONGEST), max_size=6),
    stepped=st.booleans(),
    seed=seeds,
)
def test_any_split_is_the_sequence_in_one_call(
    model: CausalLM, length: int, cuts: list[int], stepped: bool, seed: int
) -> None:
    tokens = random_tokens(2, length, seed)
    whole, whole_state = run(model, tokens)
    state, outputs = model.initial_state(2), []
    for start, end in pairwise(sorted({0, length, *(cut for cut in cuts if cut < length)})):
        with torch.no_grad():
            piece = tokens[:, start:end]
            output, state = model.step(piece, state) if stepped else run(model, piece, state)
        outputs.append(output)
    assert_close(torch.cat(outputs, 1), whole, rtol=1e-9, atol=1e-9)
    same_numbers(state, whole_state)


@few
@given(
    length=st.integers(1, 2 * 16 + 3), valid=st.tuples(*3 * [st.integers(0, 35)]), before=st.integers(0, 9), seed=seeds
)
def test_a_step_of_which_some_tokens_count_is_forward_of_just_those(
    model: CausalLM, length: int, valid: tuple[int, ...], before: int, seed: int
) -> None:
    counts = [min(count, length) for count in valid]
    state = model.initial_state(3)
    if before:
        _, state = run(model, random_tokens(3, before, seed + 1))
    tokens = random_tokens(3, length, seed)
    with torch.no_grad():
        outputs, after = model.step(tokens, state, torch.tensor(counts))
    assert outputs.shape == (3, length, 20)
    for lane, count in enumerate(counts):
        if not count:
            same_bits(lane_of(after, lane), lane_of(state, lane))
            continue
        expected, expected_state = run(model, tokens[lane : lane + 1, :count], lane_of(state, lane))
        assert_close(outputs[lane : lane + 1, :count], expected, rtol=1e-9, atol=1e-9)
        same_numbers(lane_of(after, lane), expected_state)


@torch.no_grad()
@pytest.mark.parametrize("valid", [0, 1, 3, 17, 19])
def test_what_stands_after_the_valid_tokens_changes_no_bit(model: CausalLM, valid: int) -> None:
    _, state = run(model, random_tokens(2, 9))
    tokens = random_tokens(2, 20, 1)
    padded = tokens.clone()
    padded[0, valid:] = (tokens[0, valid:] + 7) % 20
    outputs, after = model.step(tokens, state, torch.tensor([valid, 20]))
    other_outputs, other_after = model.step(padded, state, torch.tensor([valid, 20]))
    assert torch.equal(outputs[0, :valid], other_outputs[0, :valid])
    assert torch.equal(outputs[1], other_outputs[1])
    same_bits(after, other_after)


@pytest.mark.parametrize("place", [0, 5, 16, LONGEST - 1])
def test_no_output_sees_a_later_token(model: CausalLM, place: int) -> None:
    tokens = random_tokens(2, LONGEST)
    changed = tokens.clone()
    changed[:, place] = (tokens[:, place] + 7) % 20
    same = (run(model, tokens)[0] == run(model, changed)[0]).all(-1)
    assert bool(same[:, :place].all())
    assert not bool(same[:, place].any())


@torch.no_grad()
def test_a_reset_is_a_fresh_stream_and_running_changes_no_state_it_was_given(model: CausalLM) -> None:
    tokens = random_tokens(2, LONGEST)
    outputs, state = run(model, tokens)
    kept = {name: value.clone() for name, value in state.items()}
    model.step(tokens, state, torch.tensor([3, 0]))
    same_bits(state, kept)
    same_bits(model.initial_state(2), {name: torch.zeros_like(value) for name, value in state.items()})
    again, state_again = run(model, tokens, model.initial_state(2))
    assert_close(again, outputs, rtol=1e-9, atol=1e-9)
    same_numbers(state_again, state)


@torch.no_grad()
def test_decode_is_a_step_of_one_token(model: CausalLM) -> None:
    _, state = run(model, random_tokens(2, 9))
    tokens = random_tokens(2, 1, 1)
    outputs, after = model.call("decode", {"tokens": tokens, "valid": torch.tensor([1, 0])}, state)
    expected, expected_state = model.step(tokens, state, torch.tensor([1, 0]))
    assert torch.equal(outputs["outputs"], expected)
    same_bits(after, expected_state)


@torch.no_grad()
def test_a_model_is_made_again_from_its_config(model: CausalLM) -> None:
    again = type(model)(**model.config).double()
    again.load_state_dict(model.state_dict())
    tokens = random_tokens(2, 20)
    assert torch.equal(again(tokens), model(tokens))
    assert again.config == model.config
    assert again.spec(2, 8) == model.spec(2, 8)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_spec_declares_what_there_is(model: CausalLM, batch: int) -> None:
    spec, state = model.spec(batch, 8), model.initial_state(batch)
    assert list(spec.state_names) == list(state)
    assert [state.shape for state in spec.states] == [value.shape for value in state.values()]
    assert {declared.shape[declared.batch_axis] for declared in spec.states} == {batch}
    assert [entry.name for entry in spec.entries] == ["step", "decode"]
    for entry, length in zip(spec.entries, (8, 1), strict=True):
        assert entry.reads == entry.writes == spec.state_names
        assert entry.inputs[0].shape == (batch, length)
        assert [item.name for item in entry.inputs[1:]] == (["valid"] if batch > 1 else [])


def test_what_a_model_does_not_take_is_refused(model: CausalLM) -> None:
    with pytest.raises(InputError, match="There is no entry 'commit'"):
        model.call("commit", {}, model.initial_state())
    with pytest.raises(InputError, match="There is no entry 'commit'"):
        model.graph("commit", {}, model.initial_state())
    with pytest.raises(InputError, match=r"ids must lie in 0 \.\. 19"):
        model(torch.tensor([[20]]))
    with pytest.raises(InputError, match="a multiple of the model's chunk of 4"):
        model.spec(1, 5)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"must divide d_model=6.* num_heads=2"):
        TransformerLM(20, 6, 1, 2, 8)
    with pytest.raises(ConfigError, match="context be at most 65536"):
        TransformerLM(20, 8, 1, 2, 2**16 + 1)
    with pytest.raises(ConfigError, match="num_heads must divide d_model=8"):
        RWKVLM(20, 8, 1, 3)
    with pytest.raises(ConfigError, match="kind must be one of lstm, gru; given 'rnn'"):
        RecurrentLM(20, 8, 1, "rnn")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs num_layers >= 1; given 0"):
        MambaLM(20, 8, 0)
