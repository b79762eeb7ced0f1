from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nsm.errors import ParityError
from nsm.runtimes.budgets import Budget, find_budget
from nsm.runtimes.parity import compare
from nsm.trace import Arrays, Trace
from tests.runtimes.fake import (
    CHUNK,
    After,
    fake_session,
    fake_trace,
    with_output,
)

FP32 = find_budget("fp32")


# -- flips of the argmax ------------------------------------------------------------------------------------------


def _flip(margin: float) -> tuple[Trace, After, float]:
    """A trace and a spoiler that disagree about one argmax: at stream 0, step 5, token 1.

    The reference's margin is `margin` times the rms of its logits, and so is that of the target, the other way round.
    """
    trace = fake_trace(streams=8, steps=64)
    outputs = trace.outputs["outputs"].copy()
    rms = float(np.sqrt(np.mean(outputs.astype(np.float64) ** 2)))
    row = outputs[0, 5, 1]
    low, high = np.argsort(row)[-2:]
    top = row[high]
    row[low] = np.float32(top + margin * rms)

    def after(calls: int, given: Arrays, state: Arrays, before: Arrays) -> None:
        if calls == 6 and given["outputs"][0, 1, high] == top:
            given["outputs"][0, 1, low] = np.float32(top - margin * rms)

    assert 5 not in trace.sampled
    return with_output(trace, outputs), after, rms


def test_a_flip_within_the_references_margin_is_excused_and_reported() -> None:
    trace, after, _ = _flip(1e-4)
    report = compare(trace, fake_session(after=after), FP32)
    report.require()
    assert (report.excused_flips, report.unexcused_flips) == (1, 0)
    assert report.argmax_agreement == 1 - 1 / (8 * 64 * CHUNK)


def test_a_flip_beyond_the_references_margin_is_not_excused() -> None:
    trace, after, _ = _flip(4e-4)
    report = compare(trace, fake_session(after=after), FP32)
    assert (report.excused_flips, report.unexcused_flips) == (0, 1)
    assert any(f"1 of {8 * 64 * CHUNK} tokens have another argmax without excuse" in text for text in report.failures)


def test_the_excuse_grows_with_the_budget() -> None:
    trace, after, _ = _flip(4e-4)
    loose = Budget("fp32", 1.0, 1e-3, 1.0, 1.0, 1.0)
    report = compare(trace, fake_session(after=after), loose)
    report.require()
    assert (report.excused_flips, report.unexcused_flips) == (1, 0)


def test_the_excuse_does_not_grow_with_the_measured_error() -> None:
    trace, flip, rms = _flip(1e-2)

    def after(calls: int, given: Arrays, state: Arrays, before: Arrays) -> None:
        flip(calls, given, state, before)
        given["outputs"] += np.float32(0.3 * rms)  # the same for every class: an error without a flip

    report = compare(trace, fake_session(after=after), FP32)
    assert report.free_run.p50 > 0.1  # twice that would excuse the flip
    assert (report.excused_flips, report.unexcused_flips) == (0, 1)


def test_a_lower_agreement_may_be_allowed() -> None:
    trace, after, _ = _flip(1e-2)
    loose = Budget("fp32", 1.0, 1e-6, 0.999, 1.0, 1.0)
    report = compare(trace, fake_session(after=after), replace(loose, free_run_p99=1e-3))
    assert report.unexcused_flips == 1
    report.require()


@pytest.mark.parametrize(
    ("budget", "message"),
    [(replace(FP32, kl_mean=1e-15), "KL mean is"), (replace(FP32, kl_p999=1e-15), r"KL p99\.9 is")],
    ids=["mean", "p99.9"],
)
def test_the_distance_of_the_distributions_has_its_own_budget(budget: Budget, message: str) -> None:
    def after(calls: int, given: Arrays, state: Arrays, before: Arrays) -> None:
        given["outputs"] *= 1 + 2e-6

    assert compare(fake_trace(), fake_session(after=after), FP32).passed
    report = compare(fake_trace(), fake_session(after=after), budget)
    with pytest.raises(ParityError, match=message):
        report.require()
