from __future__ import annotations

import numpy as np
import pytest

from nsm.errors import InputError
from nsm.runtimes.parity.budgets import BUDGETS, find_budget
from nsm.runtimes.parity.metrics import (
    kl_divergence,
    mean,
    probed_error,
    quantile,
    relative_error,
    rms_norm,
    slot_errors,
)

# -- budgets and measures -----------------------------------------------------------------------------------------


def test_a_precision_without_a_budget_is_refused() -> None:
    with pytest.raises(InputError, match=r"'fp8'; expected one of: fp32"):
        find_budget("fp8")


@pytest.mark.parametrize("name", list(BUDGETS))
def test_budgets_are_found_by_their_name(name: str) -> None:
    budget = find_budget(name)
    assert budget.precision == name
    assert 0 < budget.one_step_p99 < budget.free_run_p99 < 1
    assert 0 < budget.kl_mean < budget.kl_p999
    assert 0.9 < budget.agreement <= 1


def test_relative_error() -> None:
    wanted = np.array([3.0, 4.0])
    assert relative_error(np.array([3.0, 4.5]), wanted, 0.0) == pytest.approx(0.1)
    assert relative_error(np.array([3.0, 4.5]), wanted, 50.0) == pytest.approx(0.01)
    assert relative_error(wanted, wanted, 0.0) == 0.0
    assert relative_error(np.zeros(2), np.zeros(2), 0.0) == 0.0
    assert relative_error(np.ones(2), np.zeros(2), 0.0) == np.inf
    assert np.isnan(relative_error(np.zeros(0), np.zeros(0), 1.0))
    for bad in (np.nan, np.inf):
        assert relative_error(np.array([bad, 4.0]), wanted, 0.0) == np.inf
    assert relative_error(np.array([np.inf, 4.0]), np.array([np.inf, 4.0]), 0.0) == np.inf


def test_slot_errors_are_per_slot_with_a_floor_for_small_ones() -> None:
    wanted = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 5.0]])
    given = wanted + np.array([[0.0, 0.5], [0.0, 0.1], [0.0, 0.0]])
    rms = np.sqrt(50 / 3)
    np.testing.assert_allclose(slot_errors(given, wanted), [0.1, 0.1 / (0.01 * rms), 0.0], rtol=1e-12)
    np.testing.assert_array_equal(slot_errors(np.zeros((2, 2)), np.zeros((2, 2))), [0.0, 0.0])
    np.testing.assert_array_equal(slot_errors(np.ones((1, 2)), np.zeros((1, 2))), [np.inf])
    assert slot_errors(np.array([[np.nan, 4.0]]), wanted[:1]).tolist() == [np.inf]


def test_rms_norm_is_over_streams_and_steps() -> None:
    assert rms_norm(np.array([[[3.0, 4.0], [0.0, 0.0]]])) == pytest.approx(np.sqrt(12.5))
    assert rms_norm(np.ones((2, 2), bool)) == 0.0
    assert rms_norm(np.zeros((0, 2, 3))) == 0.0


def test_kl_divergence_is_that_of_the_softmax() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    wanted = float(np.sum(p * np.log(p / q)))
    given = kl_divergence(np.log(p)[None] + 700.0, np.log(q)[None] - 900.0)
    np.testing.assert_allclose(given, [wanted], rtol=1e-9)
    assert kl_divergence(np.log(p)[None], np.log(p)[None]).tolist() == [0.0]


def test_a_quantile_is_one_of_the_values() -> None:
    values = np.array([np.nan, 1.0, 2.0, 3.0, np.inf])
    assert [quantile(values, q) for q in (0.0, 0.5, 0.6, 1.0)] == [1.0, 3.0, 3.0, np.inf]
    assert np.isnan(quantile(np.full(3, np.nan), 0.5))


def test_the_mean_is_of_what_is_known() -> None:
    assert mean(np.array([[1.0, np.nan], [3.0, np.nan]])) == 2.0
    assert mean(np.array([1.0, np.inf])) == np.inf
    assert np.isnan(mean(np.full(2, np.nan)))


def test_fill_values_count_in_no_probed_error() -> None:
    wanted = np.array([3.0, 4.0, -np.inf, -3e38, 1e31], np.float32)
    given = np.array([3.0, 4.5, -np.inf, -3e38, 1e31], np.float32)
    assert probed_error(given, wanted) == (0.5, 5.0)
    assert probed_error(np.array([True, False]), np.array([True, True])) == (1.0, np.sqrt(2))
    assert probed_error(np.array([2, 7]), np.array([2, 4])) == (3.0, np.sqrt(20))


@pytest.mark.parametrize(
    ("given", "wanted"), [(np.nan, 1.0), (np.inf, 1.0), (1.0, -np.inf), (np.inf, -np.inf), (np.nan, np.nan)]
)
def test_what_is_finite_on_one_side_only_is_infinitely_wrong(given: float, wanted: float) -> None:
    assert probed_error(np.array([1.0, given]), np.array([1.0, wanted]))[0] == np.inf
