"""How banks, heads and chunks are laid out: number by number against plain indexing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsm.modules.ops.layout import (
    chunks,
    count_tokens,
    join_heads,
    keep_open,
    merge_chunks,
    select_lanes,
    split_heads,
    to_bank,
    to_states,
)


@pytest.mark.parametrize(("dim", "heads"), [(2, 1), (8, 1), (8, 2), (8, 4), (12, 3)])
def test_a_bank_is_an_address_and_a_content_half_shared_out_among_heads(dim: int, heads: int) -> None:
    states = torch.randn(3, 5, dim)
    bank = to_bank(states, heads)
    width = dim // (2 * heads)
    assert bank.shape == (3, 2 * heads, 5, width)
    for half in range(2):
        for head in range(heads):
            for number in range(width):
                place = half * (dim // 2) + head * width + number
                assert torch.equal(bank[:, half * heads + head, :, number], states[:, :, place])
    assert torch.equal(to_states(bank), states)


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_heads_are_consecutive_parts_of_a_token(heads: int) -> None:
    tokens = torch.randn(2, 5, 6)
    split = split_heads(tokens, heads)
    for head, part in enumerate(tokens.chunk(heads, -1)):
        assert torch.equal(split[:, head], part)
    assert torch.equal(join_heads(split), tokens)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_chunks_are_taken_apart_and_put_together(count: int) -> None:
    merged = torch.arange(2 * count * 4).reshape(2 * count, 4)
    parts = chunks(merged, count)
    assert len(parts) == count
    for index, part in enumerate(parts):
        # A lane's chunks lie one after the other.
        assert torch.equal(part, merged[[index, count + index]])
    assert torch.equal(merge_chunks(parts), merged)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 4, 1)])
def test_lanes_are_chosen_among(shape: tuple[int, ...]) -> None:
    new, old = torch.randn(shape), torch.randn(shape)
    chosen = select_lanes(torch.tensor([True, False, True]), new, old)
    assert torch.equal(chosen, torch.stack([new[0], old[1], new[2]]))


@settings(max_examples=50, deadline=None)
@given(valid=st.lists(st.integers(0, 12), min_size=1, max_size=4))
def test_tokens_count_up_to_valid_and_chunks_are_full_or_open(valid: list[int]) -> None:
    counted = count_tokens(torch.tensor(valid), 3, 4)
    for lane, count in enumerate(valid):
        expected = [place < count for place in range(12)]
        assert counted.tokens[lane].flatten().tolist() == expected
        assert counted.full[lane].tolist() == [count >= 4 * (chunk + 1) for chunk in range(3)]
        inside = [place < count and place // 4 == count // 4 for place in range(12)]
        assert counted.opened[lane].flatten().tolist() == inside


@settings(max_examples=50, deadline=None)
@given(valid=st.lists(st.integers(0, 12), min_size=2, max_size=2), heads=st.sampled_from([None, 1, 2]))
def test_what_stays_open_is_the_partial_chunk_and_nothing_else(valid: list[int], heads: int | None) -> None:
    inner = () if heads is None else (heads,)
    part, old = torch.randn(6, *inner, 4, 2), torch.randn(2, *inner, 4, 2)
    opened = count_tokens(torch.tensor(valid), 3, 4).opened
    kept = keep_open(opened, part, old)
    for lane, count in enumerate(valid):
        expected = old[lane].clone()
        for place in range(count % 4):
            expected[..., place, :] = part[3 * lane + count // 4][..., place, :]
        assert torch.equal(kept[lane], expected)
