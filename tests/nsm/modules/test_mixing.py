"""Local mixing: a causal convolution against a loop over a list of inputs, and its tail as state."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from nsm.modules.mixing import LocalMixing


def make_mixing(width: int = 4, dim: int = 5) -> LocalMixing:
    torch.manual_seed(0)
    mixing = LocalMixing(dim, width)
    with torch.no_grad():
        mixing.kernel.normal_()
        mixing.bias.normal_()
    return mixing.double()


def mix_token_by_token(mixing: LocalMixing, tokens: Tensor, tail: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    """One lane: tokens [T, d], tail [width - 1, d]. The past is a plain list of inputs."""
    past = list(tail)
    outputs, kept = [], torch.stack(past)
    for number, token in enumerate(tokens, 1):
        past.append(token)
        summed = mixing.bias.clone()
        for back in range(mixing.width):
            summed = summed + mixing.kernel[:, 0, mixing.width - 1 - back] * past[-1 - back]
        outputs.append(summed * torch.sigmoid(summed))
        if number == valid:
            kept = torch.stack(past[-(mixing.width - 1) :])
    return torch.stack(outputs), kept


@pytest.mark.parametrize("width", [2, 3, 4, 7])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_mixing_is_the_loop_over_past_inputs(width: int, length: int) -> None:
    mixing = make_mixing(width)
    tokens, tail = torch.randn(3, length, 5).double(), torch.randn(3, width - 1, 5).double()
    valid = torch.tensor([0, length, length // 2])
    mixed, kept = mixing(tokens, tail, valid)
    for lane in range(3):
        expected, expected_tail = mix_token_by_token(mixing, tokens[lane], tail[lane], int(valid[lane]))
        assert_close(mixed[lane], expected, rtol=1e-10, atol=1e-12)
        assert torch.equal(kept[lane], expected_tail)


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 12), cuts=st.lists(st.integers(1, 11), max_size=5))
def test_any_split_gives_the_same_outputs_and_tail(length: int, cuts: list[int]) -> None:
    mixing = make_mixing()
    tokens, start_tail = torch.randn(2, length, 5).double(), torch.zeros(2, 3, 5).double()
    whole, whole_tail = mixing(tokens, start_tail, torch.full((2,), length))
    tail, outputs = start_tail, []
    for start, end in pairwise(sorted({0, length, *(cut for cut in cuts if cut < length)})):
        mixed, tail = mixing(tokens[:, start:end], tail, torch.full((2,), end - start))
        outputs.append(mixed)
    assert_close(torch.cat(outputs, 1), whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(tail, whole_tail)


def test_a_fresh_mixing_is_the_token_and_half_of_the_one_before() -> None:
    mixing = LocalMixing(2)
    tokens = torch.randn(1, 6, 2)
    mixed, _ = mixing(tokens, torch.zeros(1, 3, 2), torch.tensor([6]))
    before = torch.cat([torch.zeros(1, 1, 2), tokens[:, :-1]], 1)
    assert_close(mixed, torch.nn.functional.silu(tokens + 0.5 * before), rtol=1e-6, atol=1e-6)


def test_no_token_sees_a_later_one() -> None:
    mixing = make_mixing()
    tokens = torch.randn(1, 8, 5).double()
    changed = tokens.clone()
    changed[:, 5] += 1
    zeros, valid = torch.zeros(1, 3, 5).double(), torch.tensor([8])
    mixed, other = mixing(tokens, zeros, valid)[0], mixing(changed, zeros, valid)[0]
    assert torch.equal(mixed[:, :5], other[:, :5])
    assert not bool((mixed[:, 5] == other[:, 5]).any())


@pytest.mark.parametrize("valid", range(6))
def test_the_tail_ends_with_the_last_valid_input(valid: int) -> None:
    carried, new = torch.tensor([[-3.0], [-2.0], [-1.0]]), torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]])
    _, tail = LocalMixing(1)(new.unsqueeze(0), carried.unsqueeze(0), torch.tensor([valid]))
    expected = [-3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.0, 5.0][: 3 + valid][-3:]
    assert tail.flatten().tolist() == expected


@pytest.mark.parametrize("length", [1, 2, 9])
def test_without_valid_every_token_counts(length: int) -> None:
    mixing = make_mixing()
    tokens, tail = torch.randn(2, length, 5).double(), torch.randn(2, 3, 5).double()
    for default, explicit in zip(mixing(tokens, tail), mixing(tokens, tail, torch.full((2,), length)), strict=True):
        assert torch.equal(default, explicit)
