from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nsm.runtimes.parity.slot_age import errors_by_age, recorded_ages, slot_ages
from tests.runtimes.adaptive import adaptive_trace

ON, OFF = True, False


def ages(before: list[list[bool]], after: list[list[bool]], sampled: list[int]) -> list[list[int]]:
    """Of one stream, by sample."""
    found = slot_ages(np.array([before]), np.array([after]), np.array(sampled))
    return [[int(age) for age in row] for row in found[0]]


def test_a_slot_that_was_never_masked_is_as_old_as_the_stream() -> None:
    assert ages([[ON], [ON]], [[ON], [ON]], [0, 9]) == [[1], [10]]


def test_a_slot_that_was_masked_at_a_sample_is_as_old_as_the_steps_since() -> None:
    # Masked before step 0 and allocated by it; masked after step 3, and back some time before step 9.
    assert ages([[OFF], [ON], [ON]], [[ON], [OFF], [ON]], [0, 3, 9]) == [[1], [0], [6]]


def test_the_mask_before_a_sampled_step_counts_too() -> None:
    assert ages([[ON], [OFF]], [[ON], [ON]], [0, 5]) == [[1], [1]]


def test_slots_and_streams_have_ages_of_their_own() -> None:
    before = np.array([[[ON, OFF]], [[OFF, ON]]])
    np.testing.assert_array_equal(slot_ages(before, np.ones((2, 1, 2), bool), np.array([7])), [[[8, 1]], [[1, 8]]])


def test_errors_are_grouped_by_ages_that_double() -> None:
    found = errors_by_age([np.array([1, 2, 3]), np.array([8, 15])], [np.array([1.0, 2.0, 4.0]), np.array([5.0, 7.0])])
    assert [(item.start, item.end) for item in found] == [(1, 1), (2, 3), (8, 15)]
    assert [(item.p50, item.p99) for item in found] == [(1.0, 1.0), (4.0, 4.0), (7.0, 7.0)]


@pytest.mark.parametrize("age", [1, 2, 3, 4, 7, 8, 1023, 1024])
def test_an_age_lies_in_its_group(age: int) -> None:
    (item,) = errors_by_age([np.array([age])], [np.array([1.0])])
    assert item.start <= age <= item.end


def test_without_banks_there_are_no_ages() -> None:
    assert errors_by_age([], []) == ()


def test_where_the_mask_is_known_at_every_step_an_allocation_between_two_samples_is_seen() -> None:
    trace = adaptive_trace(1e-3, streams=2)
    masks = trace.decisions["0.mask"].copy()
    masks[1, 31:41, 0] = False  # off after the steps 30 .. 39; sampled are 27 and 45
    ages = recorded_ages(replace(trace, decisions={**trace.decisions, "0.mask": masks}), "0.mask")
    at = trace.sampled.tolist().index(45)
    assert ages[:, at, 0].tolist() == [46, 6]
    assert recorded_ages(replace(trace, decisions={}), "0.mask")[1, at, 0] == 46, "not seen without"
