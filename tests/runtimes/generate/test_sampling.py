"""Sampler: what is drawn from, how likely, and that a seed says it all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nsm.errors import InputError
from nsm.runtimes.generate.sampling import Sampler
from nsm.trace import Array

numbers = st.floats(-30, 30, width=32)
logits_of_any_length = hnp.arrays(np.float32, st.integers(1, 40), elements=numbers)
different_logits = hnp.arrays(np.float32, st.integers(1, 40), elements=numbers, unique=True)
temperatures = st.floats(0.05, 5)
shares = st.floats(0.01, 1)


def softmax(logits: Array, temperature: float = 1.0) -> Array:
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    shares: Array = weights / weights.sum()
    return shares


@given(logits_of_any_length, st.floats(0, 5), st.none() | st.integers(1, 50), shares)
def test_probabilities_sum_to_one(logits: Array, temperature: float, top_k: int | None, top_p: float) -> None:
    found = Sampler(temperature, top_k, top_p).probabilities(logits)
    assert found.shape == logits.shape
    assert (found >= 0).all()
    assert found.sum() == pytest.approx(1.0, abs=1e-12)


@given(logits_of_any_length, temperatures)
def test_without_limits_they_are_the_softmax(logits: Array, temperature: float) -> None:
    found = Sampler(temperature).probabilities(logits)
    np.testing.assert_allclose(found, softmax(logits, temperature), rtol=1e-9, atol=1e-300)


def test_without_limits_the_least_likely_token_stays_possible() -> None:
    found = Sampler().probabilities(np.array([0.0, -90.0, -50.0], np.float32))
    assert found.tolist() == pytest.approx([1.0, np.exp(-90.0), np.exp(-50.0)], rel=1e-9)


@given(different_logits, st.integers(1, 50), temperatures)
def test_top_k_keeps_the_k_most_likely(logits: Array, top_k: int, temperature: float) -> None:
    found = Sampler(temperature, top_k=top_k).probabilities(logits)
    kept = np.sort(np.argsort(logits)[-top_k:])
    whole = softmax(logits, temperature)
    expected = np.zeros(len(logits))
    expected[kept] = whole[kept] / whole[kept].sum()
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_top_k_keeps_k_of_equals(top_k: int) -> None:
    found = Sampler(top_k=top_k).probabilities(np.zeros(5, np.float32))
    assert found.tolist() == pytest.approx([1 / top_k] * top_k + [0.0] * (5 - top_k))


@given(different_logits, st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits: Array, top_p: float) -> None:
    found = Sampler(top_p=top_p).probabilities(logits)
    whole = softmax(logits)
    kept = found > 0
    if not kept.all():
        assert whole[kept].min() >= whole[~kept].max()
    assert whole[kept].sum() >= top_p - 1e-9
    # Without its least likely token the set would not reach p.
    assert whole[kept].sum() - whole[kept].min() < top_p + 1e-9
    np.testing.assert_allclose(found[kept], whole[kept] / whole[kept].sum(), rtol=1e-9)


def test_top_p_by_hand() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25]))
    assert Sampler(top_p=0.4).probabilities(logits).tolist() == [0, 1, 0, 0]
    assert Sampler(top_p=0.6).probabilities(logits).tolist() == pytest.approx([0, 2 / 3, 0, 1 / 3])
    assert Sampler(top_p=0.8).probabilities(logits).tolist() == pytest.approx([0, 5 / 9, 1 / 6, 5 / 18])
    assert Sampler(top_p=0.95).probabilities(logits).tolist() == pytest.approx([0.1, 0.5, 0.15, 0.25])


@given(different_logits, st.integers(1, 50), st.floats(0.01, 0.99))
def test_both_limits_keep_what_each_keeps(logits: Array, top_k: int, top_p: float) -> None:
    both = Sampler(top_k=top_k, top_p=top_p).probabilities(logits) > 0
    by_k = Sampler(top_k=top_k).probabilities(logits) > 0
    by_p = Sampler(top_p=top_p).probabilities(logits) > 0
    assert np.array_equal(both, by_k & by_p)


@given(logits_of_any_length, st.none() | st.integers(1, 50), shares, st.integers(0, 9))
def test_temperature_zero_takes_the_most_likely(logits: Array, top_k: int | None, top_p: float, seed: int) -> None:
    assert Sampler(0.0, top_k, top_p, seed)(logits) == logits.argmax()


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-308, 5e-324])
def test_a_temperature_near_zero_is_like_zero(temperature: float) -> None:
    found = Sampler(temperature).probabilities(np.array([-3.0, 12.5, 8.0], np.float32))
    assert found.tolist() == [0, 1, 0]


def test_a_high_temperature_evens_out() -> None:
    logits = np.array([0.0, 5.0])
    likely = [Sampler(temperature).probabilities(logits)[1] for temperature in (0.5, 1.0, 4.0, 1e6)]
    assert likely == sorted(likely, reverse=True)
    assert likely[-1] == pytest.approx(0.5, abs=1e-5)


def test_what_is_impossible_is_never_drawn() -> None:
    found = Sampler().probabilities(np.array([1.0, -np.inf, 1.0], np.float32))
    assert found.tolist() == [0.5, 0, 0.5]


@given(st.integers(0, 2**32), temperatures)
def test_the_same_seed_draws_the_same_tokens(seed: int, temperature: float) -> None:
    logits = np.random.default_rng(0).standard_normal((20, 8))
    one, other = Sampler(temperature, seed=seed), Sampler(temperature, seed=seed)
    assert [one(row) for row in logits] == [other(row) for row in logits]


def test_other_seeds_draw_other_tokens() -> None:
    drawn = {tuple(sampler(np.zeros(8)) for _ in range(20)) for sampler in (Sampler(seed=seed) for seed in range(5))}
    assert len(drawn) == 5


def test_draws_are_as_frequent_as_they_are_probable() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.7]))
    sampler = Sampler(seed=0)
    counts = np.bincount([sampler(logits) for _ in range(4000)], minlength=3) / 4000
    # Four standard deviations of a share of 4000 draws.
    np.testing.assert_allclose(counts, [0.1, 0.2, 0.7], atol=4 * 0.5 / np.sqrt(4000))


def test_logits_are_not_changed() -> None:
    logits = np.array([1.0, 2.0], np.float32)
    Sampler(0.5, top_k=1)(logits)
    assert logits.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature is 0 or more; given -0.1"),
        ({"temperature": float("nan")}, "temperature is 0 or more; given nan"),
        ({"temperature": float("inf")}, "temperature is 0 or more; given inf"),
        ({"top_k": 0}, "top_k is at least 1; given 0"),
        ({"top_k": -3}, "top_k is at least 1; given -3"),
        ({"top_p": 0.0}, "top_p is a probability above 0, at most 1; given 0.0"),
        ({"top_p": 1.01}, "top_p is a probability above 0, at most 1; given 1.01"),
        ({"top_p": float("nan")}, "top_p is a probability above 0, at most 1; given nan"),
        ({"seed": -1}, "seed is 0 or more; given -1"),
    ],
)
def test_numbers_outside_their_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampler(**arguments)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ([0.0, np.nan, 1.0], "logits that are finite, .*given 1 NaN, 0 inf and 0 -inf of 3"),
        ([np.nan, -np.inf], "given 1 NaN, 0 inf and 1 -inf of 2"),
        ([np.inf, 1.0, np.inf], "given 0 NaN, 2 inf and 0 -inf of 3"),
        ([-np.inf, -np.inf], "given 0 NaN, 0 inf and 2 -inf of 2"),
        ([], r"the logits of one token, \[V\] numbers; given float64 of shape \[0\]"),
        ([[0.0, 1.0]], r"given float64 of shape \[1, 2\]"),
        (1.0, r"given float64 of shape \[\]"),
        (["a", "b"], r"given <U1 of shape \[2\]"),
        ([[0.0], [1.0, 2.0]], "logits is not an array"),
    ],
)
def test_logits_that_nothing_can_be_drawn_from_are_refused(logits: Any, message: str, temperature: float) -> None:
    sampler = Sampler(temperature)
    for call in (sampler, sampler.probabilities):
        with pytest.raises(InputError, match=message):
            call(logits if message.endswith("array") else np.array(logits))


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_tokens_with_minus_infinity_are_never_drawn(temperature: float) -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.1, -np.inf], np.float32)
    sampler = Sampler(temperature, seed=0)
    assert {sampler(logits) for _ in range(100)} <= {1, 3}
    assert sampler.probabilities(logits)[[0, 2, 4]].tolist() == [0.0] * 3
