"""Attention: the window against a loop over explicit lists of past keys, the read against a loop over slots."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from nsm.errors import ConfigError
from nsm.modules.attention import HybridAttention, LocalAttention
from nsm.modules.ops.layout import count_tokens, join_heads, split_heads, to_bank

DIM, STATE, SLOTS, CHUNK = 12, 12, 5, 3
# token_dim 12 over 1, 2, 3, 12 heads: even, odd and single-number heads
HEADS = [1, 2, 3, 12]
WINDOWS = [3, 4, 7, 8]

LocalState = dict[str, Tensor]


def make_attention(num_heads: int = 2, window: int = 4, state_dim: int = STATE, **changes: Any) -> HybridAttention:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"token_dim": DIM, "chunk_size": CHUNK, **changes}
    attention = HybridAttention(state_dim=state_dim, num_heads=num_heads, window=window, **arguments)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(std=0.5)
    return attention.double()


def random_tokens(lanes: int, length: int, seed: int = 1) -> Tensor:
    return torch.randn(lanes, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attend_token_by_token(local: LocalAttention, tokens: Tensor) -> Tensor:
    """One lane from the start of a stream, tokens [T, d]."""
    causal = local.bias.shape[1] == local.window
    made = [(local.qkv.weight @ token).split(DIM) for token in tokens]
    width = DIM // local.num_heads
    outputs = []
    for now, (query, _, _) in enumerate(made):
        seen = [
            place
            for place in range(len(made))
            if now - local.window < place <= now
            or (not causal and now < place and place // local.chunk_size == now // local.chunk_size)
        ]
        answer = []
        for head in range(local.num_heads):
            part = slice(head * width, (head + 1) * width)
            # The bias starts with the token that is furthest ahead.
            first = 0 if causal else local.chunk_size - 1
            scores = [
                query[part] @ made[place][1][part] / width**0.5 + local.bias[head, first + now - place]
                for place in seen
            ]
            shares = torch.stack(scores).softmax(0)
            answer.append(torch.stack([s * made[place][2][part] for s, place in zip(shares, seen, strict=True)]).sum(0))
        outputs.append(torch.cat(answer))
    return torch.stack(outputs)


def read_slot_by_slot(
    attention: HybridAttention, tokens: Tensor, bank: Tensor, mask: Tensor, importance: Tensor
) -> Tensor:
    """One lane: tokens [T, d], bank [S, D]. A slot's first D / 2 numbers are its address, the others its content."""
    middle = bank.shape[1] // 2
    active = [slot for slot in range(bank.shape[0]) if bool(mask[slot])]
    width = middle // attention.bank_heads
    outputs = []
    for token in tokens:
        query = attention.read_query.weight @ token
        answer = []
        for head in range(attention.bank_heads):
            address = slice(head * width, (head + 1) * width)
            content = slice(middle + head * width, middle + (head + 1) * width)
            scores = [
                query[address] @ bank[slot, address] / width**0.5 + torch.sigmoid(importance[slot]).log()
                for slot in active
            ]
            shares = torch.stack(scores).softmax(0)
            answer.append(torch.stack([s * bank[slot, content] for s, slot in zip(shares, active, strict=True)]).sum(0))
        outputs.append(torch.cat(answer))
    return torch.stack(outputs)


def read(attention: HybridAttention, tokens: Tensor, bank: Tensor, mask: Tensor, importance: Tensor) -> Tensor:
    query = split_heads(attention.read_query(tokens), attention.bank_heads)
    return join_heads(attention.read(query, to_bank(bank, attention.bank_heads), mask, importance))


def fresh_state(local: LocalAttention, lanes: int) -> LocalState:
    return {spec.name[2:]: torch.zeros(spec.shape).double() for spec in local.state_specs("0", lanes)}


def scan(
    local: LocalAttention, tokens: Tensor, state: LocalState, filled: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, LocalState]:
    """Whole chunks of tokens [B, n * C, d]."""
    count = tokens.shape[1] // local.chunk_size
    heads = local.heads(local.qkv(tokens).reshape(-1, local.chunk_size, 3 * DIM))
    counted = None if valid is None else count_tokens(valid, count, local.chunk_size)
    mixed, left = local.scan(heads, state, filled, counted)
    return join_heads(mixed).reshape(tokens.shape), {**state, **left}


def run(
    local: LocalAttention, tokens: Tensor, state: LocalState, filled: int, offset: int
) -> tuple[Tensor, LocalState, int, int]:
    """Any piece: token by token inside a chunk, and whole chunks where it can be."""
    outputs, lanes = [], tokens.shape[0]
    while tokens.shape[1]:
        now = torch.full((lanes,), filled)
        taken = tokens.shape[1] // local.chunk_size * local.chunk_size if not offset else 0
        if taken:
            mixed, state = scan(local, tokens[:, :taken], state, now)
            filled = min(local.rows, filled + taken)
        else:
            taken, heads = 1, local.heads(local.qkv(tokens[:, :1]))
            attended, opened = local.decode(heads, state, now, torch.full((lanes,), offset), None)
            mixed = join_heads(attended)
            state, offset = {**state, **opened}, offset + 1
            full = torch.full((lanes,), offset == local.chunk_size)
            state = local.commit(state, full)
            if offset == local.chunk_size:
                filled, offset = min(local.rows, filled + offset), 0
        outputs.append(mixed)
        tokens = tokens[:, taken:]
    return torch.cat(outputs, 1), state, filled, offset


# -- the window --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_heads", HEADS)
@pytest.mark.parametrize("window", WINDOWS)
def test_the_window_is_the_loop_over_past_keys(num_heads: int, window: int, causal: bool) -> None:
    """In one call, in whole chunks, and what `forward` says."""
    local = make_attention(num_heads, window, causal=causal).local
    tokens = random_tokens(2, 5 * CHUNK)
    expected = torch.stack([attend_token_by_token(local, lane) for lane in tokens])
    assert_close(local(tokens), expected, rtol=1e-9, atol=1e-12)
    nothing = torch.zeros(2, dtype=torch.int64)
    assert_close(scan(local, tokens, fresh_state(local, 2), nothing)[0], expected, rtol=1e-9, atol=1e-12)
    assert_close(local(tokens[:, :7])[:, :6], expected[:, :6], rtol=1e-9, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 17),
    cuts=st.lists(st.integers(1, 16), max_size=5),
    window=st.sampled_from(WINDOWS),
    num_heads=st.sampled_from(HEADS),
)
def test_any_split_gives_the_same_outputs_and_window(length: int, cuts: list[int], window: int, num_heads: int) -> None:
    local = make_attention(num_heads, window).local
    tokens = random_tokens(2, length)
    with torch.no_grad():
        whole, whole_state, *_ = run(local, tokens, fresh_state(local, 2), 0, 0)
        assert_close(whole, local(tokens), rtol=1e-9, atol=1e-12)
        state, filled, offset, outputs = fresh_state(local, 2), 0, 0, []
        for first, last in pairwise(sorted({0, length, *(cut for cut in cuts if cut < length)})):
            mixed, state, filled, offset = run(local, tokens[:, first:last], state, filled, offset)
            outputs.append(mixed)
    assert_close(torch.cat(outputs, 1), whole, rtol=1e-9, atol=1e-12)
    for role, value in state.items():
        assert_close(value, whole_state[role], rtol=1e-9, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("window", WINDOWS)
def test_the_state_is_the_keys_and_values_of_the_last_tokens(window: int) -> None:
    """Chunk by chunk, and those of the open chunk apart; lanes of which none, some and all tokens count."""
    local = make_attention(window=window).local
    tokens, valid = random_tokens(3, 4 * CHUNK), torch.tensor([0, 3 * CHUNK + 2, 4 * CHUNK])
    mixed, state = scan(local, tokens, fresh_state(local, 3), torch.zeros(3, dtype=torch.int64), valid)
    for lane, count in enumerate(valid.tolist()):
        expected = attend_token_by_token(local, tokens[lane, :count]) if count else tokens[lane, :0]
        assert_close(mixed[lane, :count], expected, rtol=1e-9, atol=1e-12)
        made = local.qkv(tokens[lane]).unflatten(-1, (3, 2, -1))  # [T, 3, H, e]
        whole = count // CHUNK * CHUNK
        for role, part in (("key", 1), ("value", 2)):
            rows = state[role][lane].transpose(0, 1)  # [P, H, e]
            there = min(whole, local.rows)
            assert torch.equal(rows[local.rows - there :], made[whole - there : whole, part])
            assert not bool(rows[: local.rows - there].any())
            opened = state[f"open_{role}"][lane].transpose(0, 1)
            assert torch.equal(opened[: count - whole], made[whole:count, part])
            assert not bool(opened[count - whole :].any())


@torch.no_grad()
@pytest.mark.parametrize("place", range(9))
def test_no_token_sees_a_later_one_nor_one_before_the_window(place: int) -> None:
    attention = make_attention(window=4)
    tokens, bank = random_tokens(1, 9), torch.randn(1, SLOTS, STATE).double()
    changed = tokens.clone()
    changed[:, place] += 1
    differs = (attention(tokens, bank) != attention(changed, bank)).any(-1)[0]
    assert differs.tolist() == [place <= token < place + 4 for token in range(9)]


@torch.no_grad()
@pytest.mark.parametrize("place", range(9))
def test_without_causality_tokens_see_the_later_ones_of_their_chunk(place: int) -> None:
    local = make_attention(window=4, causal=False).local
    tokens = random_tokens(1, 9)
    changed = tokens.clone()
    changed[:, place] += 1
    differs = (local(tokens) != local(changed)).any(-1)[0]
    assert differs.tolist() == [place // 3 * 3 <= token < place + 4 for token in range(9)]


@torch.no_grad()
@pytest.mark.parametrize("poison", [1e30, -1e38])
def test_an_empty_window_is_nothing_and_not_zeros(poison: float) -> None:
    local = make_attention(window=7).float().local
    tokens, nothing = random_tokens(1, CHUNK).float(), torch.tensor([0])
    clean = {role: value.float() for role, value in fresh_state(local, 1).items()}
    spoiled = {role: value if role.startswith("open") else value + poison for role, value in clean.items()}
    empty, _ = scan(local, tokens, clean, nothing)
    assert torch.equal(scan(local, tokens, spoiled, nothing)[0], empty)
    heads = local.heads(local.qkv(tokens[:, :1]))
    one, _ = local.decode(heads, clean, nothing, nothing, None)
    other, _ = local.decode(heads, spoiled, nothing, nothing, None)
    assert torch.equal(one, other)
    assert not bool(torch.isclose(scan(local, tokens, clean, torch.tensor([local.rows]))[0], empty).any())


@torch.no_grad()
@pytest.mark.parametrize("poison", [1e4, 1e30])
def test_carried_rows_that_are_out_of_reach_are_nothing(poison: float) -> None:
    """Whole chunks are carried: of 6 rows a window of 5 tokens can reach 4."""
    local = make_attention(window=5).float().local
    assert local.rows == 6
    tokens, filled = random_tokens(1, CHUNK).float(), torch.tensor([6])
    state = {role: torch.randn_like(value.float()) for role, value in fresh_state(local, 1).items()}
    spoiled = {role: value.clone() for role, value in state.items()}
    for role in ("key", "value"):
        spoiled[role][:, :, :2] = poison
    assert torch.equal(scan(local, tokens, state, filled)[0], scan(local, tokens, spoiled, filled)[0])


def test_heads_begin_with_different_sights_of_what_is_far() -> None:
    """Fading with the distance, in either direction, the first head fastest."""
    bias = LocalAttention(DIM, 4, window=5, chunk_size=3, causal=False).bias.detach()
    assert bias.shape == (4, 5 + 2)
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
    assert_close(bias, -slopes[:, None] * torch.tensor([2.0, 1.0, 0.0, 1.0, 2.0, 3.0, 4.0]))


# -- the read ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("num_heads", HEADS)
@pytest.mark.parametrize("state_dim", [2, 10, 12, 24])
def test_the_read_is_the_loop_over_active_slots(num_heads: int, state_dim: int) -> None:
    attention = make_attention(num_heads, state_dim=state_dim)
    tokens, bank = random_tokens(2, 4), torch.randn(2, SLOTS, state_dim).double()
    mask = torch.tensor([[True, False, True, True, False], [False, False, True, False, False]])
    importance = torch.randn(SLOTS).double()
    found = read(attention, tokens, bank, mask, importance)
    assert found.shape == (2, 4, state_dim // 2)
    for lane in range(2):
        expected = read_slot_by_slot(attention, tokens[lane], bank[lane], mask[lane], importance)
        assert_close(found[lane], expected, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_forward_is_both_from_the_start_of_a_stream_and_their_fusion() -> None:
    attention = make_attention()
    tokens, bank = random_tokens(2, 9), torch.randn(2, SLOTS, STATE).double()
    mask = torch.tensor([[True, False, True, True, False], [False, False, True, False, True]])
    fused = attention(tokens, bank, mask)
    for lane in range(2):
        local = attend_token_by_token(attention.local, tokens[lane])
        found = read_slot_by_slot(attention, tokens[lane], bank[lane], mask[lane], torch.zeros(SLOTS).double())
        assert_close(fused[lane], torch.cat([local, found], -1) @ attention.fuse.weight.T, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_without_a_mask_every_slot_is_read() -> None:
    attention = make_attention()
    tokens, bank = random_tokens(2, 9), torch.randn(2, SLOTS, STATE).double()
    everything = torch.ones(2, SLOTS, dtype=torch.bool)
    assert torch.equal(attention(tokens, bank), attention(tokens, bank, everything))
    everything[0, 1] = False
    assert not torch.equal(attention(tokens, bank), attention(tokens, bank, everything))


@torch.no_grad()
@pytest.mark.parametrize("poison", [1e30, -1e30, 1e38])
def test_what_a_masked_slot_holds_changes_no_output(poison: float) -> None:
    attention = make_attention().float()
    tokens, bank = random_tokens(2, 9).float(), torch.randn(2, SLOTS, STATE)
    mask = torch.tensor([[True, False, True, True, False], [False, False, True, False, True]])
    poisoned = torch.where(mask.unsqueeze(-1), bank, poison)
    assert torch.equal(attention(tokens, poisoned, mask), attention(tokens, bank, mask))


@torch.no_grad()
def test_an_unimportant_slot_is_read_less() -> None:
    attention = make_attention()
    tokens, bank = random_tokens(1, 1), torch.randn(1, SLOTS, STATE).double()
    everything = torch.ones(1, SLOTS, dtype=torch.bool)
    without = everything.clone()
    without[0, 2] = False
    importance = torch.zeros(SLOTS).double()
    target = read(attention, tokens, bank, without, importance)
    distances = []
    for logit in (0.0, -2.0, -8.0, -40.0):
        importance[2] = logit
        distances.append(float((read(attention, tokens, bank, everything, importance) - target).norm()))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-12 < distances[0]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_heads": 5}, "num_heads must divide token_dim=12; given 5"),
        ({"num_heads": 0}, "num_heads must divide token_dim=12; given 0"),
        ({"window": 1, "chunk_size": 1}, "window counts the current token and at least one before it.*given window=1"),
        ({"window": 2}, "reaches back at least chunk_size tokens.*given window=2, chunk_size=3"),
        ({"chunk_size": 0}, "given window=4, chunk_size=0"),
        ({"state_dim": 1}, "even state_dim >= 2.*state_dim=1"),
        ({"state_dim": 7}, "even state_dim >= 2.*state_dim=7"),
        ({"token_dim": 0}, "token_dim"),
    ],
)
def test_sizes_that_make_no_attention_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_attention(**sizes)
