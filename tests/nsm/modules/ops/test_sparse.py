"""Sparse maps: against a bisection for the threshold, on the simplex, exactly zero, and continuous."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from nsm.modules.bank.router import MASKED_SCORE
from nsm.modules.ops.sparse import entmax15, sparsemax, top_k

MAPS: dict[str, Callable[[Tensor], Tensor]] = {"sparsemax": sparsemax, "entmax": entmax15}

numbers = st.floats(-6.0, 6.0, width=32)
rows = st.lists(numbers, min_size=1, max_size=9)
some_examples = settings(max_examples=60, deadline=None)


def by_bisection(scores: list[float], alpha: float) -> list[float]:
    """p = [(alpha - 1) z - tau]_+ ^ (1 / (alpha - 1)) with the tau at which they sum to 1, slowly."""
    scaled = [(alpha - 1) * score for score in scores]
    low, high = max(scaled) - 1.0, max(scaled)

    def at(tau: float) -> list[float]:
        return [max(0.0, score - tau) ** (1 / (alpha - 1)) for score in scaled]

    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) > 1.0 else (low, middle)
    return at(low)


@pytest.fixture(scope="module", params=MAPS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@some_examples
@given(scores=rows)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_what_bisection_finds(name: str, scores: list[float], dtype: torch.dtype) -> None:
    weights = MAPS[name](torch.tensor(scores, dtype=dtype))
    expected = torch.tensor(by_bisection(scores, {"sparsemax": 2.0, "entmax": 1.5}[name]), dtype=dtype)
    # 1e-5 in float32: the threshold of entmax is a difference of sums of squares.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-7
    assert_close(weights, expected, rtol=tolerance, atol=tolerance)


@some_examples
@given(scores=rows, shift=st.sampled_from([0.0, 100.0, -1000.0]))
def test_weights_are_on_the_simplex_in_the_order_of_the_scores(name: str, scores: list[float], shift: float) -> None:
    given_scores = torch.tensor(scores) + shift
    weights = MAPS[name](given_scores)
    assert bool((weights >= 0).all())
    assert_close(weights.sum(), torch.tensor(1.0), rtol=1e-5, atol=1e-5)
    assert bool((weights[given_scores.argsort()].diff() >= 0).all())


def test_slots_far_below_the_best_get_exactly_nothing(name: str) -> None:
    weights = MAPS[name](torch.tensor([[3.0, 0.5, -4.0], [0.1, 0.0, 0.2]]))
    assert torch.equal(weights[0], torch.tensor([1.0, 0.0, 0.0]))
    assert bool((weights[1] > 0).all())


def test_entmax_is_between_softmax_and_sparsemax() -> None:
    scores = torch.tensor([1.0, 0.6, 0.1, -0.5, -2.0])
    for one, other in ((sparsemax, entmax15), (entmax15, lambda x: x.softmax(-1))):
        assert int((one(scores) > 0).sum()) < int((other(scores) > 0).sum())
        assert float(one(scores)[0]) > float(other(scores)[0])


@some_examples
@given(
    scores=rows, active=st.lists(st.booleans(), min_size=9, max_size=9), masked=st.sampled_from([MASKED_SCORE, -1e4])
)
def test_masked_slots_get_exactly_nothing_and_are_not_there(
    name: str, scores: list[float], active: list[bool], masked: float
) -> None:
    """The others share as if the masked ones did not exist."""
    mask = torch.tensor([True, *active[1 : len(scores)]])
    present = torch.tensor(scores)
    weights = MAPS[name](torch.where(mask, present, masked))
    assert bool((weights[~mask] == 0.0).all())
    assert_close(weights[mask], MAPS[name](present[mask]), rtol=1e-5, atol=1e-5)


@some_examples
@given(scores=rows, seed=st.integers(0, 1000))
def test_a_small_change_in_gives_a_small_change_out(name: str, scores: list[float], seed: int) -> None:
    """Sparsemax is a projection and entmax smoother still: no weight moves further than the scores together."""
    before = torch.tensor(scores, dtype=torch.float64)
    change = 1e-3 * torch.randn(before.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moved = MAPS[name](before + change) - MAPS[name](before)
    assert float(moved.norm()) <= float(change.norm()) * (1 + 1e-6) + 1e-9


def test_top_k_jumps_where_the_sparse_maps_do_not(name: str) -> None:
    """Two scores change places by a rounding error: the k-th weight is elsewhere."""
    one, other = torch.tensor([2.0, 1.0, 1.0 - 1e-6]), torch.tensor([2.0, 1.0 - 1e-6, 1.0])
    chosen = [torch.where(top_k(scores, 2), scores, MASKED_SCORE).softmax(-1) for scores in (one, other)]
    assert float((chosen[0] - chosen[1]).abs().max()) > 0.2
    assert float((MAPS[name](one) - MAPS[name](other)).abs().max()) < 1e-5


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_top_k_are_the_highest(count: int) -> None:
    scores = torch.randn(3, 2, 5)
    chosen = top_k(scores, count)
    assert chosen.shape == scores.shape
    assert bool((chosen.sum(-1) == count).all())
    for row, mask in zip(scores.flatten(0, 1), chosen.flatten(0, 1), strict=True):
        assert sorted(row[mask].tolist()) == sorted(row.tolist())[-count:]


def test_equal_scores_at_the_border_are_all_in() -> None:
    assert top_k(torch.tensor([1.0, 3.0, 1.0, 0.0]), 2).tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    "scores",
    [
        [0.3, -0.2, 0.9, 0.2],
        [0.0, 0.0, 0.0, 0.0],
        [5.0, 0.0, -5.0, MASKED_SCORE],
        [1.0, 1.0, MASKED_SCORE, MASKED_SCORE],
        [0.0, 0.0, -2.0, -2.0],  # in entmax the square root of exactly 0, for a support that is not chosen
        [7.0],
    ],
)
def test_gradients_are_finite(name: str, scores: list[float]) -> None:
    given_scores = torch.tensor(scores, requires_grad=True)
    weights = MAPS[name](given_scores)
    torch.autograd.backward((weights * torch.arange(1.0, 1.0 + len(scores))).sum())
    assert given_scores.grad is not None
    assert bool(torch.isfinite(given_scores.grad).all())
    # Nothing is gained by raising all scores, and nothing reaches a slot that has no weight.
    assert float(given_scores.grad.sum()) == pytest.approx(0.0, abs=1e-5)
    assert bool((given_scores.grad[weights == 0] == 0).all())


def test_gradients_are_those_of_small_differences(name: str) -> None:
    scores = torch.tensor([[0.3, -0.2, 0.9, 0.2], [2.0, 1.5, -3.0, 1.9]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(MAPS[name], (scores,))
