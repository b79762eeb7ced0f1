"""The manager: pruning and allocation change the mask and nothing else, and at least one slot stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsm.errors import ConfigError
from nsm.modules.bank.manager import StateManager


def make_manager(scores: list[float], active: list[bool] | None = None, threshold: float = 0.3) -> StateManager:
    """A manager whose slots have these importances in (0, 1)."""
    torch.manual_seed(0)
    manager = StateManager(state_dim=6, max_states=len(scores), prune_threshold=threshold)
    with torch.no_grad():
        manager.importance.copy_(torch.logit(torch.tensor(scores)))
        if active is not None:
            manager.mask.copy_(torch.tensor(active))
    return manager


def test_a_fresh_manager_has_its_first_slots_active_and_all_equally_important() -> None:
    manager = StateManager(state_dim=6, max_states=5, initial_states=2)
    assert manager.mask.tolist() == [True, True, False, False, False]
    assert manager.num_active_states == manager.get_active_count() == 2
    assert manager.get_importance_scores().tolist() == [0.5] * 5
    assert StateManager(state_dim=6, max_states=5).num_active_states == 5


def test_forward_gives_the_active_slots_and_changes_nothing() -> None:
    manager = make_manager([0.5] * 4, [False, True, False, True])
    before = {name: value.clone() for name, value in manager.state_dict().items()}
    assert torch.equal(manager(), manager.bank[[1, 3]])
    for name, value in manager.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_active_slots_differ_from_each_other() -> None:
    """Equal slots would stay equal: the same reads, the same writes, the same gradients."""
    bank = StateManager(state_dim=6, max_states=16)().detach()
    assert bool((torch.cdist(bank, bank) + torch.eye(16) > 1e-3).all())


@pytest.mark.parametrize(
    ("scores", "active", "kept"),
    [
        ([0.9, 0.1, 0.5, 0.2], None, [True, False, True, False]),
        ([0.9, 0.4, 0.5, 0.8], None, [True, True, True, True]),
        ([0.1, 0.25, 0.2, 0.05], None, [False, True, False, False]),  # all are low: the best of them stays
        ([0.9, 0.2, 0.1, 0.9], [False, True, True, False], [False, True, False, False]),  # best of the active ones
        ([0.9, 0.2, 0.1, 0.9], [False, False, True, False], [False, False, True, False]),  # never the last
    ],
)
def test_pruning_masks_active_slots_below_the_threshold(
    scores: list[float], active: list[bool] | None, kept: list[bool]
) -> None:
    manager = make_manager(scores, active)
    bank, before = manager.bank.detach().clone(), manager.num_active_states
    assert manager.prune_low_importance_states() == before - sum(kept)
    assert manager.mask.tolist() == kept
    assert torch.equal(manager.bank, bank)
    assert manager.prune_low_importance_states() == 0


@pytest.mark.parametrize(("threshold", "pruned"), [(0.0, 0), (0.2, 1), (0.45, 2), (0.55, 3), (0.9, 4)])
def test_the_threshold_is_an_importance(threshold: float, pruned: int) -> None:
    manager = make_manager([0.1, 0.4, 0.5, 0.6, 0.95], threshold=threshold)
    assert manager.prune_low_importance_states() == pruned


def test_allocation_activates_the_first_free_slots_afresh() -> None:
    manager = make_manager([0.9, 0.1, 0.9, 0.1, 0.1], [False, True, True, False, False])
    bank = manager.bank.detach().clone()
    assert manager.allocate_states(2) == 2
    assert manager.mask.tolist() == [True, True, True, True, False]
    torch.testing.assert_close(manager.get_importance_scores(), torch.tensor([0.5, 0.1, 0.9, 0.5, 0.1]))
    assert torch.equal(manager(), bank[:4])
    assert manager.allocate_states(0) == 0
    assert manager.allocate_states() == 1
    assert manager.allocate_states(3) == 0
    assert manager.num_active_states == 5


def test_allocation_gives_what_is_free_and_not_more() -> None:
    manager = make_manager([0.5] * 4, [True, False, True, False])
    assert manager.allocate_states(100) == 2


@settings(max_examples=50, deadline=None)
@given(
    scores=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=8),
    calls=st.lists(st.sampled_from(["prune", "allocate 1", "allocate 3", "learn"]), max_size=8),
    threshold=st.floats(0.0, 0.99),
)
def test_counts_always_add_up_and_a_slot_is_always_active(
    scores: list[float], calls: list[str], threshold: float
) -> None:
    manager = make_manager(scores, threshold=threshold)
    for call in calls:
        before = manager.num_active_states
        if call == "prune":
            expected = before - manager.prune_low_importance_states()
        elif call == "learn":
            expected = before
            with torch.no_grad():
                manager.importance.add_(torch.randn_like(manager.importance))
        else:
            expected = before + manager.allocate_states(int(call[-1]))
        assert manager.num_active_states == expected >= 1
        assert manager().shape == (expected, 6)


def test_state_info_sums_up_the_active_slots() -> None:
    manager = make_manager([0.9, 0.1, 0.5, 0.01], [True, True, True, False])
    info = manager.get_state_info()
    assert info == {
        "num_active_states": 3,
        "max_states": 4,
        "state_dim": 6,
        "memory_usage_mb": 3 * 6 * 4 / 1e6,
        "prune_threshold": 0.3,
        "importance_min": pytest.approx(0.1),
        "importance_mean": pytest.approx(0.5),
        "importance_max": pytest.approx(0.9),
    }


def test_memory_usage_is_the_active_part_in_megabytes() -> None:
    manager = StateManager(state_dim=500, max_states=64, initial_states=32)
    assert manager.memory_usage == pytest.approx(32 * 500 * 4 / 1e6)
    manager.allocate_states(32)
    assert manager.memory_usage == pytest.approx(64 * 500 * 4 / 1e6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_importance_scores_stay_inside_however_far_the_weights_went(dtype: torch.dtype) -> None:
    """In float32 sigmoid(20) is 1 and sigmoid(-120) is 0."""
    manager = make_manager([0.5] * 6).to(dtype)
    with torch.no_grad():
        manager.importance.copy_(torch.tensor([-1e4, -120.0, -20.0, 20.0, 120.0, 1e4]))
    scores = manager.get_importance_scores()
    assert scores.dtype is dtype
    assert bool(((scores > 0) & (scores < 1)).all())
    assert bool((scores.diff() >= 0).all())
    assert manager.initial_importance().requires_grad
    assert manager.prune_low_importance_states() == 3


def test_importance_scores_carry_no_gradient() -> None:
    assert not make_manager([0.5, 0.6]).get_importance_scores().requires_grad


def test_the_mask_travels_with_the_weights() -> None:
    manager = make_manager([0.9, 0.1, 0.5])
    manager.prune_low_importance_states()
    other = make_manager([0.5] * 3)
    other.load_state_dict(manager.state_dict())
    assert other.mask.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"state_dim": 1}, "A bank needs state_dim >= 2 .*given state_dim=1, max_states=64"),
        ({"max_states": 0}, "A bank needs .* max_states >= 1; given state_dim=128, max_states=0"),
        ({"max_states": 4, "initial_states": 0}, "initial_states must be between 1 and max_states=4; given 0"),
        ({"max_states": 4, "initial_states": 5}, "initial_states must be between 1 and max_states=4; given 5"),
        ({"prune_threshold": 1.0}, "prune_threshold is an importance in .*given 1.0"),
        ({"prune_threshold": -0.1}, "prune_threshold is an importance in .*given -0.1"),
        ({"prune_threshold": float("nan")}, "prune_threshold is an importance in .*given nan"),
    ],
)
def test_what_makes_no_bank_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StateManager(**arguments)


def test_allocating_a_negative_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="count must be >= 0; given -1"):
        make_manager([0.5]).allocate_states(-1)
