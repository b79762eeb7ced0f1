from __future__ import annotations

import numpy as np
import pytest

from nsm.runtimes.parity.drift import MIN_STEPS, MIN_STREAMS, drift_exponent
from nsm.trace import Array

STREAMS, STEPS = 16, 512


def errors(exponent: float, streams: int = STREAMS, steps: int = STEPS) -> Array:
    """1e-7 * t^exponent with log-normal noise."""
    noise = np.random.default_rng(0).lognormal(0.0, 0.2, (streams, steps))
    return np.asarray(1e-7 * np.arange(1, steps + 1) ** exponent * noise)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0], ids=["bounded", "diffusive", "linear"])
def test_the_exponent_of_known_growth(exponent: float) -> None:
    drift = drift_exponent(errors(exponent))
    assert drift is not None
    assert drift.exponent == pytest.approx(exponent, abs=0.05)
    assert drift.low <= drift.exponent <= drift.high
    assert drift.high - drift.low < 0.2


def test_a_random_walk_is_diffusive() -> None:
    walk = np.abs(np.random.default_rng(1).standard_normal((256, 128)).cumsum(1))
    drift = drift_exponent(walk)
    assert drift is not None
    assert drift.low < 0.5 < drift.high
    assert drift.exponent == pytest.approx(0.5, abs=0.15)


def test_a_decaying_error_has_a_negative_exponent() -> None:
    drift = drift_exponent(errors(-1.0))
    assert drift is not None
    assert drift.high < -0.8


def test_the_scale_of_the_errors_does_not_matter() -> None:
    one, other = drift_exponent(errors(0.5)), drift_exponent(errors(0.5) * 1e6)
    assert one is not None
    assert other is not None
    assert other.exponent == pytest.approx(one.exponent)


def test_the_interval_is_the_same_every_time() -> None:
    assert drift_exponent(errors(0.5)) == drift_exponent(errors(0.5))


def test_the_interval_holds_the_truth_nearly_always() -> None:
    """With eight streams the bootstrap's 95 % are a little too narrow; 50 % would hold the truth half the time."""
    random = np.random.default_rng(2)
    growth = 1e-7 * np.arange(1, MIN_STEPS + 1) ** 0.5
    found = [drift_exponent(growth * random.lognormal(0, 0.5, (MIN_STREAMS, MIN_STEPS))) for _ in range(40)]
    assert sum(drift is not None and drift.low <= 0.5 <= drift.high for drift in found) >= 30


@pytest.mark.parametrize(("streams", "steps"), [(MIN_STREAMS - 1, STEPS), (STREAMS, MIN_STEPS - 1)])
def test_too_few_streams_or_steps_say_nothing(streams: int, steps: int) -> None:
    assert drift_exponent(errors(0.5, streams, steps)) is None


def test_the_least_that_is_enough_says_something() -> None:
    assert drift_exponent(errors(0.5, MIN_STREAMS, MIN_STEPS)) is not None


@pytest.mark.parametrize("part", [slice(STEPS // 4, STEPS // 2), slice(STEPS // 2, None)], ids=["early", "late"])
def test_no_error_at_all_says_nothing(part: slice) -> None:
    given = errors(0.5)
    given[:, part] = 0.0
    assert drift_exponent(given) is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_errors_that_are_not_finite_say_nothing(value: float) -> None:
    for step in (STEPS // 4, STEPS - 1):
        given = errors(0.5)
        given[3, step] = value
        assert drift_exponent(given) is None


def test_the_first_quarter_is_not_looked_at() -> None:
    given = errors(0.5)
    wanted = drift_exponent(given)
    given[:, : STEPS // 4] = np.nan
    assert drift_exponent(given) == wanted


def test_a_stream_without_error_does_not_spoil_the_interval() -> None:
    given = errors(0.5, MIN_STREAMS, STEPS)
    given[: MIN_STREAMS // 2 - 1] = 0.0
    drift = drift_exponent(given)
    assert drift is not None
    assert np.isfinite([drift.exponent, drift.low, drift.high]).all()
