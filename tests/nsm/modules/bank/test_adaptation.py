"""Adaptation: traces by hand, decisions slot by slot, and no slot that flickers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from nsm.modules.bank.adaptation import FRESH, REST_RATE, TRACE_RATE, Adaptation
from nsm.modules.bank.router import MAX_WRITE
from nsm.modules.reference import adapt

CHUNK = 4


def written(shares: list[float], strength: float = 0.5, heads: int = 1) -> Tensor:
    """What a chunk writes where every token routes to the slots with these shares: [1, R, C, S]."""
    return (strength * torch.tensor(shares)).expand(1, heads, CHUNK, len(shares))


def decide(
    adaptation: Adaptation, mask: list[bool], importance: list[float], weights: Tensor
) -> tuple[list[bool], list[float], list[bool]]:
    new_mask, trace, allocated = adaptation.decide(torch.tensor([mask]), torch.tensor([importance]), weights)
    return new_mask[0].tolist(), trace[0].tolist(), allocated[0].tolist()


# -- the trace ---------------------------------------------------------------------------------------------------


def test_an_even_share_is_an_importance_of_a_half() -> None:
    _, trace, _ = decide(Adaptation(), [True] * 4, [0.5, 0.2, 0.5, 0.8], written([0.25] * 4))
    # half strength: a rate of 0.1 * 0.5
    assert trace == pytest.approx([0.5, 0.2 + 0.05 * 0.3, 0.5, 0.8 - 0.05 * 0.3], abs=1e-6)


@pytest.mark.parametrize(("part", "share"), [(1.0, 0.5), (0.43, 0.3), (1 / 9, 0.1), (4.0, 0.8), (0.0, 0.0)])
def test_the_documented_meaning_of_importance(part: float, share: float) -> None:
    """Towards x / (1 + x), x the slot's part of what was written over an even share."""
    shares = [part / 4, *[(1 - part / 4) / 3] * 3]
    importance = [0.5] * 4
    for _ in range(400):
        _, importance, _ = decide(Adaptation(prune_threshold=0.0), [True] * 4, importance, written(shares, 1.0))
    assert importance[0] == pytest.approx(share, abs=2e-3)


def test_a_trace_moves_as_fast_as_is_written_and_heads_count_alike() -> None:
    for strength in (0.25, 0.5, 1.0):
        _, trace, _ = decide(Adaptation(), [True, True], [0.5, 0.5], written([1.0, 0.0], strength))
        assert trace == pytest.approx([0.5 + TRACE_RATE * strength * (2 / 3 - 0.5), 0.5 - TRACE_RATE * strength * 0.5])
    one, two = (decide(Adaptation(), [True, True], [0.4, 0.5], written([0.7, 0.3], heads=heads)) for heads in (1, 2))
    assert one[1] == pytest.approx(two[1])


def test_free_slots_rest_and_silence_moves_no_active_slot() -> None:
    _, trace, _ = decide(Adaptation(), [True, False, False], [0.9, 0.1, 0.5], written([0.0, 0.0, 0.0]))
    assert trace[:2] == pytest.approx([0.9, 0.1 + REST_RATE * 0.4])


# -- decisions ---------------------------------------------------------------------------------------------------


def test_slots_that_are_not_used_are_pruned() -> None:
    adaptation = Adaptation(prune_threshold=0.3, allocate_threshold=0.99)
    mask, importance = [True] * 4, [0.5] * 4
    for _ in range(60):
        mask, importance, allocated = decide(adaptation, mask, importance, written([0.5, 0.0, 0.5, 0.0]))
        assert not any(allocated)
    assert mask == [True, False, True, False]


@pytest.mark.parametrize("importance", [[0.01, 0.02, 0.015], [0.02, 0.02, 0.02]])
def test_the_last_slot_stays(importance: list[float]) -> None:
    adaptation = Adaptation(prune_threshold=0.3)
    mask, _, _ = decide(adaptation, [True] * 3, importance, written([1 / 3] * 3, 0.0))
    assert sum(mask) == 1
    assert mask[importance.index(max(importance))]


def test_the_first_free_slot_is_allocated_when_all_are_busy() -> None:
    adaptation = Adaptation(allocate_threshold=0.35)
    mask, trace, allocated = decide(
        adaptation, [True, False, True, False], [0.5, 0.5, 0.5, 0.5], written([0.5, 0, 0.5, 0])
    )
    assert allocated == [False, True, False, False]
    assert mask == [True, True, True, False]
    assert trace[1] == FRESH
    mask, _, allocated = decide(adaptation, [True, False, True, False], [0.5, 0.5, 0.2, 0.5], written([0.5, 0, 0.5, 0]))
    assert not any(allocated)
    assert mask == [True, False, True, False]


def test_a_full_bank_allocates_nothing() -> None:
    mask, _, allocated = decide(Adaptation(), [True] * 3, [0.5] * 3, written([1 / 3] * 3))
    assert mask == [True] * 3
    assert not any(allocated)


@pytest.mark.parametrize(("novelty", "expected"), [(0.9, False), (0.6, False), (0.4, True), (0.0, True)])
def test_tokens_that_fit_no_slot_get_a_new_one(novelty: float, expected: bool) -> None:
    """The tokens here fit by a half; one slot is not busy, so that nothing else allocates."""
    adaptation = Adaptation(allocate_threshold=0.9, novelty_threshold=novelty)
    _, _, allocated = decide(adaptation, [True, True, False], [0.5, 0.5, 0.5], written([0.5, 0.5, 0.0]))
    assert allocated == [False, False, expected]


@pytest.mark.parametrize("strength", [0.0, 1e-9, 1e-6])
def test_a_chunk_that_writes_nothing_is_not_novel(strength: float) -> None:
    """One token routed to one slot: it fits, however weakly it is written; and nothing fits where nothing is."""
    adaptation = Adaptation(allocate_threshold=0.9)
    _, _, allocated = decide(adaptation, [True, True, False], [0.5, 0.5, 0.5], written([1.0, 0.0, 0.0], strength))
    assert not any(allocated)


@settings(max_examples=100, deadline=None)
@given(
    slots=st.integers(1, 6),
    heads=st.integers(1, 3),
    seed=st.integers(0, 10_000),
    thresholds=st.sampled_from([(0.1, 0.35, 0.9), (0.3, 0.35, 0.5), (0.0, 0.5, 0.2), (0.35, 0.36, 1.0)]),
)
def test_decisions_are_those_of_the_reference(
    slots: int, heads: int, seed: int, thresholds: tuple[float, float, float]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(slots, generator=generator) < 0.6
    mask[int(torch.randint(slots, (1,), generator=generator))] = True
    importance = torch.rand(slots, generator=generator)
    routing = torch.randn(heads, CHUNK, slots, generator=generator).masked_fill(~mask, -1e9).mul(2).softmax(-1)
    weights = routing * torch.rand(heads, CHUNK, 1, generator=generator) * MAX_WRITE
    adaptation = Adaptation(*thresholds)
    got = decide(adaptation, mask.tolist(), importance.tolist(), weights.unsqueeze(0))
    active, trace, allocated = adapt(adaptation, mask, importance, weights)
    assert got[0] == active.tolist()
    assert got[1] == pytest.approx(trace.tolist(), abs=1e-6)
    assert got[2] == allocated.tolist()
    assert any(got[0])


def test_lanes_decide_for_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True, False, True], [True, True, True], [False, True, False]])
    importance = torch.rand(3, 3, generator=generator)
    weights = torch.rand(3, 2, CHUNK, 3, generator=generator)
    together = Adaptation(0.3).decide(mask, importance, weights)
    for lane in range(3):
        one = slice(lane, lane + 1)
        alone = Adaptation(0.3).decide(mask[one], importance[one], weights[one])
        for whole, part in zip(together, alone, strict=True):
            assert_close(whole[one], part)


# -- over a long time ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prune", "allocate", "novelty", "rest"),
    # How many commits a slot rests at least: from the prune threshold to 0.4, 2 % of the way to 0.5 a commit.
    [(0.1, 0.45, 0.9, 60), (0.1, 0.35, 0.9, 60), (0.3, 0.35, 0.9, 30), (0.3, 0.35, 0.2, 30), (0.35, 0.36, 0.0, 15)],
)
def test_no_slot_flickers(prune: float, allocate: float, novelty: float, rest: int) -> None:
    """1000 commits of tokens that like now these slots, now those, on 8 lanes."""
    adaptation = Adaptation(prune, allocate, novelty)
    generator = torch.Generator().manual_seed(0)
    lanes, slots = 8, 6
    mask = (torch.arange(slots) < 3).expand(lanes, slots)
    importance = torch.full((lanes, slots), 0.5)
    pruned_at = torch.full((lanes, slots), -(10**6))
    liking = torch.zeros(lanes, 1, 1, slots)
    pruned_in_all = allocated_in_all = 0
    for commit in range(1000):
        if commit % 25 == 0:
            liking = 4.0 * torch.randn(lanes, 1, 1, slots, generator=generator)
        scores = liking + torch.randn(lanes, 2, CHUNK, slots, generator=generator)
        routing = torch.where(mask[:, None, None], scores, -1e9).softmax(-1)
        weights = routing * MAX_WRITE * torch.rand(lanes, 2, CHUNK, 1, generator=generator)
        after, importance, allocated = adaptation.decide(mask, importance, weights)
        assert bool(((importance > 0) & (importance < 1)).all())
        assert bool(after.any(-1).all())
        assert bool((allocated.sum(-1) <= 1).all())
        assert not bool((allocated & mask).any())
        assert bool((commit - pruned_at[allocated] > rest).all())
        assert torch.equal(after & ~mask, allocated)
        pruned_at = torch.where(mask & ~after, commit, pruned_at)
        pruned_in_all += int((mask & ~after).sum())
        allocated_in_all += int(allocated.sum())
        mask = after
    assert pruned_in_all > 20
    assert allocated_in_all > 20
