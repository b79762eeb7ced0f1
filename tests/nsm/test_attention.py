"""Attention: the window against a loop over explicit lists of past keys, the read against a loop over slots."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from nsm.attention import HybridAttention
from nsm.errors import ConfigError

DIM, STATE, SLOTS = 12, 10, 5
# token_dim 12 over 1, 2, 3, 4, 12 heads: even, odd and single-number heads
HEADS = [1, 2, 3, 4, 12]


def make_attention(
    num_heads: int = 2, window: int = 4, chunk_size: int = 3, state_dim: int = STATE, token_dim: int = DIM
) -> HybridAttention:
    torch.manual_seed(0)
    attention = HybridAttention(token_dim, state_dim, num_heads, window, chunk_size)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(std=0.5)
    return attention.double()


def turned_back(key: Tensor, distance: int) -> Tensor:
    """A key as a query `distance` places after it sees it: pairs (i, i + half) turned by -distance * 1000^(-i / half).

    Rotary embedding turns the query and the key each by their own place; only the difference is left in a score.
    """
    half = key.shape[0] // 2
    result = key.clone()
    for i in range(half):
        angle = torch.tensor(-distance * 1000.0 ** (-i / half), dtype=key.dtype)
        a, b = key[i], key[half + i]
        result[i] = a * angle.cos() - b * angle.sin()
        result[half + i] = a * angle.sin() + b * angle.cos()
    return result


def attend_token_by_token(
    attention: HybridAttention, tokens: Tensor, past: list[tuple[Tensor, Tensor]], valid: int
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """One lane, tokens [T, d]; `past` is a list of (key, value), newest last, and only what is there."""
    past, outputs = list(past), []
    kept = past[-(attention.window - 1) :]
    width = tokens.shape[1] // attention.num_heads
    for number, token in enumerate(tokens, 1):
        query, key, value = (attention.qkv.weight @ token).split(tokens.shape[1])
        past.append((key, value))
        seen = past[-attention.window :]
        answer = []
        for head in range(attention.num_heads):
            part = slice(head * width, (head + 1) * width)
            keys = [turned_back(k[part], len(seen) - 1 - place) for place, (k, _) in enumerate(seen)]
            shares = torch.stack([query[part] @ k for k in keys]).div(width**0.5).softmax(0)
            answer.append(torch.stack([share * v[part] for share, (_, v) in zip(shares, seen, strict=True)]).sum(0))
        outputs.append(torch.cat(answer))
        if number == valid:
            kept = past[-(attention.window - 1) :]
    return torch.stack(outputs), kept


def read_slot_by_slot(
    attention: HybridAttention, tokens: Tensor, bank: Tensor, mask: Tensor, importance: Tensor
) -> Tensor:
    """One lane: tokens [T, d], bank [S, D]. A slot's first D // 2 numbers are its address, the others its content."""
    middle = bank.shape[1] // 2
    active = [slot for slot in range(bank.shape[0]) if bool(mask[slot])]
    narrow, wide = middle // attention.read_heads, (bank.shape[1] - middle) // attention.read_heads
    outputs = []
    for token in tokens:
        query = attention.read_query.weight @ token
        answer = []
        for head in range(attention.read_heads):
            asked = query[head * narrow : (head + 1) * narrow]
            address = slice(head * narrow, (head + 1) * narrow)
            content = slice(middle + head * wide, middle + (head + 1) * wide)
            scores = [
                asked @ bank[slot, address] / narrow**0.5 + torch.sigmoid(importance[slot]).log() for slot in active
            ]
            shares = torch.stack(scores).softmax(0)
            answer.append(torch.stack([s * bank[slot, content] for s, slot in zip(shares, active, strict=True)]).sum(0))
        outputs.append(torch.cat(answer))
    return torch.stack(outputs)


def carried(past: list[tuple[Tensor, Tensor]], rows: int) -> tuple[Tensor, Tensor]:
    """A list of (key, value) as the state's two tensors [rows, d], zeros where nothing is there."""
    key, value = torch.zeros(rows, DIM).double(), torch.zeros(rows, DIM).double()
    for place, (k, v) in enumerate(reversed(past[-rows:]), 1):
        key[-place], value[-place] = k, v
    return key, value


def random_past(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(DIM).double(), torch.randn(DIM).double()) for _ in range(count)]


@pytest.mark.parametrize("num_heads", HEADS)
@pytest.mark.parametrize("window", [2, 4, 7])
@pytest.mark.parametrize("length", [1, 3, 9])
def test_the_window_is_the_loop_over_past_keys(num_heads: int, window: int, length: int) -> None:
    """Lanes whose windows hold nothing, a part, and all they can; and of which none, some and all tokens count."""
    attention = make_attention(num_heads, window)
    rows = window - 1
    tokens = torch.randn(3, length, DIM).double()
    pasts = [random_past(count) for count in (0, rows // 2, rows)]
    key, value = (torch.stack(part) for part in zip(*(carried(past, rows) for past in pasts), strict=True))
    filled, valid = torch.tensor([len(past) for past in pasts]), torch.tensor([length, length // 2, 0])
    mixed, new_key, new_value = attention.local(tokens, key, value, filled, valid)
    for lane in range(3):
        expected, past = attend_token_by_token(attention, tokens[lane], pasts[lane], int(valid[lane]))
        expected_key, expected_value = carried(past, rows)
        # 1e-6: the tables of cosines and sines are made in float32.
        assert_close(mixed[lane], expected, rtol=1e-6, atol=1e-6)
        assert_close(new_key[lane], expected_key, rtol=1e-10, atol=1e-12)
        assert_close(new_value[lane], expected_value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_heads", HEADS)
@pytest.mark.parametrize("state_dim", [2, 3, 10, 12, 17, 24])
def test_the_read_is_the_loop_over_active_slots(num_heads: int, state_dim: int) -> None:
    attention = make_attention(num_heads, state_dim=state_dim)
    tokens, bank = torch.randn(2, 4, DIM).double(), torch.randn(2, SLOTS, state_dim).double()
    mask = torch.tensor([[True, False, True, True, False], [False, False, True, False, False]])
    importance = torch.randn(SLOTS).double()
    read = attention.read(tokens, bank, mask, importance)
    assert read.shape == (2, 4, state_dim - state_dim // 2)
    for lane in range(2):
        expected = read_slot_by_slot(attention, tokens[lane], bank[lane], mask[lane], importance)
        assert_close(read[lane], expected, rtol=1e-10, atol=1e-12)


def test_forward_is_both_from_the_start_of_a_stream_and_their_fusion() -> None:
    attention = make_attention()
    tokens, bank = torch.randn(2, 9, DIM).double(), torch.randn(2, SLOTS, STATE).double()
    mask = torch.tensor([[True, False, True, True, False], [False, False, True, False, True]])
    fused = attention(tokens, bank, mask)
    for lane in range(2):
        local, _ = attend_token_by_token(attention, tokens[lane], [], 9)
        read = read_slot_by_slot(attention, tokens[lane], bank[lane], mask[lane], torch.zeros(SLOTS).double())
        expected = torch.cat([local, read], -1) @ attention.fuse.weight.T
        assert_close(fused[lane], expected, rtol=1e-6, atol=1e-6)


def test_without_a_mask_every_slot_is_read() -> None:
    attention = make_attention()
    tokens, bank = torch.randn(2, 9, DIM).double(), torch.randn(2, SLOTS, STATE).double()
    everything = torch.ones(2, SLOTS, dtype=torch.bool)
    assert torch.equal(attention(tokens, bank), attention(tokens, bank, everything))
    everything[0, 1] = False
    assert not torch.equal(attention(tokens, bank), attention(tokens, bank, everything))


def test_what_a_masked_slot_holds_changes_no_output() -> None:
    attention = make_attention().float()
    tokens, bank = torch.randn(2, 9, DIM), torch.randn(2, SLOTS, STATE)
    mask = torch.tensor([[True, False, True, True, False], [False, False, True, False, True]])
    poisoned = torch.where(mask.unsqueeze(-1), bank, 1e30)
    assert torch.equal(attention(tokens, poisoned, mask), attention(tokens, bank, mask))


def test_an_empty_window_is_nothing_and_not_zeros() -> None:
    attention = make_attention().float()
    tokens, rows = torch.randn(1, 3, DIM), torch.zeros(1, 3, DIM)
    valid, nothing = torch.tensor([3]), torch.tensor([0])
    empty, _, _ = attention.local(tokens, rows, rows, nothing, valid)
    poisoned, _, _ = attention.local(tokens, rows + 1e18, rows + 1e18, nothing, valid)
    zeros, _, _ = attention.local(tokens, rows, rows, torch.tensor([3]), valid)
    assert torch.equal(poisoned, empty)
    assert not bool(torch.isclose(zeros, empty).any())


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 14), cuts=st.lists(st.integers(1, 13), max_size=5))
def test_any_split_gives_the_same_outputs_and_window(length: int, cuts: list[int]) -> None:
    attention = make_attention(window=5)
    tokens = torch.randn(2, length, DIM).double()
    start = torch.zeros(2, 4, DIM).double()
    filled = torch.zeros(2, dtype=torch.int64)
    whole, whole_key, whole_value = attention.local(tokens, start, start, filled, filled + length)
    key, value, outputs = start, start, []
    for first, last in pairwise(sorted({0, length, *(cut for cut in cuts if cut < length)})):
        count = torch.full((2,), last - first)
        mixed, key, value = attention.local(tokens[:, first:last], key, value, filled, count)
        filled = (filled + count).clamp(max=4)
        outputs.append(mixed)
    # 1e-6: the tables of cosines and sines are made in float32, and places differ from split to split.
    assert_close(torch.cat(outputs, 1), whole, rtol=1e-6, atol=1e-6)
    assert_close(key, whole_key, rtol=1e-12, atol=1e-12)
    assert_close(value, whole_value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("place", range(9))
def test_no_token_sees_a_later_one_nor_one_before_the_window(place: int) -> None:
    attention = make_attention(window=4)
    tokens, bank = torch.randn(1, 9, DIM).double(), torch.randn(1, SLOTS, STATE).double()
    changed = tokens.clone()
    changed[:, place] += 1
    differs = (attention(tokens, bank) != attention(changed, bank)).any(-1)[0]
    assert differs.tolist() == [place <= token < place + 4 for token in range(9)]


def test_an_unimportant_slot_is_read_less() -> None:
    attention = make_attention()
    tokens, bank = torch.randn(1, 1, DIM).double(), torch.randn(1, SLOTS, STATE).double()
    everything = torch.ones(1, SLOTS, dtype=torch.bool)
    without = everything.clone()
    without[0, 2] = False
    importance = torch.zeros(SLOTS).double()
    target = attention.read(tokens, bank, without, importance)
    distances = []
    for logit in (0.0, -2.0, -8.0, -40.0):
        importance[2] = logit
        distances.append(float((attention.read(tokens, bank, everything, importance) - target).norm().detach()))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-12 < distances[0]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_heads": 5}, "num_heads must divide token_dim=12; given 5"),
        ({"num_heads": 0}, "num_heads must divide token_dim=12; given 0"),
        ({"window": 1}, "window counts the current token and at least one before it; given 1"),
        ({"state_dim": 1}, "state_dim"),
        ({"token_dim": 0}, "token_dim"),
    ],
)
def test_sizes_that_make_no_attention_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_attention(**sizes)
