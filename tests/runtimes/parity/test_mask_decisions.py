from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from nsm.errors import InputError
from nsm.models.adaptive import AdaptiveNSM
from nsm.runtimes.parity.budgets import find_budget
from nsm.runtimes.parity.comparison import compare
from nsm.runtimes.parity.mask_decisions import Decisions, decided_masks, decided_states, thresholds_of
from nsm.runtimes.parity.report import ParityReport
from nsm.trace import Array, Arrays, Trace
from tests.runtimes.adaptive import (
    ALLOCATE,
    AT,
    PRUNE,
    SAMPLED,
    STREAMS,
    Spoil,
    adaptive_session,
    adaptive_spec,
    adaptive_trace,
)
from tests.runtimes.fake import fake_session, fake_spec, fake_trace

FP32 = find_budget("fp32")
CLOSE, FAR = 2e-5, 1e-3  # the bound is 2 * 1e-4 * rms of the importances, about 9e-5
THRESHOLDS = (PRUNE, ALLOCATE)


def checked(
    margin: float, late: bool = True, spoil: Spoil | None = None, thresholds: tuple[float, ...] = THRESHOLDS
) -> ParityReport:
    report = compare(adaptive_trace(margin), adaptive_session(margin, late, spoil), FP32, None, thresholds)
    json.dumps(report.to_json(), allow_nan=False)
    return report


def test_the_same_decisions_are_no_mask_decisions() -> None:
    report = checked(CLOSE, late=False)
    report.require()
    assert (report.mask_decisions, report.mask_mismatches, report.mask_decisions_per_1000_steps) == (0, 0, 0.0)


def test_a_close_decision_is_excused_and_counted() -> None:
    report = checked(CLOSE)
    report.require()
    assert report.mask_mismatches == 0
    assert report.mask_decisions == 1  # of the free run; the single step from that state is not one of its steps
    steps = STREAMS * 64 - (64 - AT - 1)
    assert report.mask_decisions_per_1000_steps == pytest.approx(1000 / steps)
    data = report.to_json()
    assert (data["mask_decisions"], data["mask_decisions_per_1000_steps"]) == (1, report.mask_decisions_per_1000_steps)
    assert (report.one_step.max, report.free_run.max) == (0.0, 0.0)


def test_a_decision_that_was_not_close_is_not_excused() -> None:
    report = checked(FAR)
    assert (report.mask_decisions, report.mask_mismatches) == (0, 2)
    assert "2 entries of masks or counters differ" in report.failures
    assert report.free_run.max > 0.01  # its states are compared all the same


def test_without_thresholds_nothing_is_excused() -> None:
    report = checked(CLOSE, thresholds=())
    assert (report.mask_decisions, report.mask_mismatches) == (0, 2)
    assert not report.passed


def test_the_excuse_comes_from_the_budget() -> None:
    trace, session = adaptive_trace(FAR), adaptive_session(FAR)
    loose = replace(FP32, free_run_p99=1e-2)
    report = compare(trace, session, loose, None, THRESHOLDS)
    assert (report.mask_decisions, report.mask_mismatches) == (1, 0)


def test_a_stream_is_no_longer_compared_after_its_branch() -> None:
    def spoil(stream: int, step: int, outputs: Array, state: Mapping[str, Array]) -> None:
        if stream == 0 and step > AT and step not in SAMPLED:  # single steps are not spoiled
            outputs += 1.0
            state["0.bank"][...] += 1.0
            state["0.mask"][0] = False  # which is not compared either

    report = checked(CLOSE, spoil=spoil)
    report.require()
    assert report.free_run.max == 0.0


def test_the_step_of_the_branch_is_not_compared_either() -> None:
    def spoil(stream: int, step: int, outputs: Array, state: Mapping[str, Array]) -> None:
        if (stream, step) == (0, AT):
            outputs += 1.0

    checked(CLOSE, spoil=spoil).require()


def without_the_branch_among_the_samples(trace: Trace) -> Trace:
    kept = trace.sampled != AT
    return replace(
        trace,
        sampled=trace.sampled[kept],
        before={name: value[:, kept] for name, value in trace.before.items()},
        after={name: value[:, kept] for name, value in trace.after.items()},
    )


@pytest.mark.parametrize(("margin", "mask_decisions", "mismatches"), [(CLOSE, 1, 0), (FAR, 0, 1)])
def test_a_branch_between_two_samples_is_judged_where_it_is(
    margin: float, mask_decisions: int, mismatches: int
) -> None:
    trace = without_the_branch_among_the_samples(adaptive_trace(margin))
    report = compare(trace, adaptive_session(margin), FP32, None, THRESHOLDS)
    assert (report.mask_decisions, report.mask_mismatches, report.passed) == (
        mask_decisions,
        mismatches,
        mask_decisions == 1,
    )


@pytest.mark.parametrize("stream", [0, 30])
def test_a_mask_that_differs_for_one_step_between_two_samples_fails(stream: int) -> None:
    """Of a stream whose states were not kept, too."""

    def spoil(given: int, step: int, outputs: Array, state: Mapping[str, Array]) -> None:
        if given == stream and step in (15, 16):
            state["0.mask"][2] = step == 15

    trace = adaptive_trace(CLOSE)
    trace = replace(
        trace,
        before={name: value[:1] for name, value in trace.before.items()},
        after={name: value[:1] for name, value in trace.after.items()},
    )
    report = compare(trace, adaptive_session(CLOSE, False, spoil), FP32, None, THRESHOLDS)
    assert report.mask_mismatches == 1
    assert "1 entries of masks or counters differ" in report.failures


def test_a_trace_without_its_decisions_is_refused() -> None:
    trace = replace(adaptive_trace(CLOSE, streams=2), decisions={})
    with pytest.raises(
        InputError, match=r"decides about 0\.mask, 0\.importance\. .* older nsm has none: export it again"
    ):
        compare(trace, adaptive_session(CLOSE), FP32, None, THRESHOLDS)


def test_a_trace_of_other_decisions_is_refused() -> None:
    trace = adaptive_trace(CLOSE, streams=2)
    short = replace(trace, decisions={name: value[:, 1:] for name, value in trace.decisions.items()})
    with pytest.raises(InputError, match=r"0\.mask of shape \[2, 64, 3\]; the model expects \[2, 65, 3\]"):
        compare(short, adaptive_session(CLOSE), FP32, None, THRESHOLDS)


def test_a_model_that_decides_nothing_does_not_have_its_state_read_at_every_step() -> None:
    session, reads = fake_session(), 0
    read = session.read_state

    def counted() -> Arrays:
        nonlocal reads
        reads += 1
        return read()

    session.read_state = counted  # type: ignore[method-assign]
    trace = fake_trace(streams=2)
    compare(trace, session, FP32).require()
    assert reads < trace.steps


@pytest.mark.parametrize(("stream", "step"), [(0, 10), (1, 50)], ids=["before the branch", "another stream"])
def test_everything_else_is_compared_as_before(stream: int, step: int) -> None:
    def spoil(given: int, at: int, outputs: Array, state: Mapping[str, Array]) -> None:
        if (given, at) == (stream, step):
            outputs += 1.0

    report = checked(CLOSE, spoil=spoil)
    found = report.first_divergence
    assert found is not None
    assert (found.stream, found.step) == (stream, step)


def test_counters_are_exact_after_a_branch_too() -> None:
    def spoil(stream: int, step: int, outputs: Array, state: Mapping[str, Array]) -> None:
        if stream == 0 and step == 62:
            state["0.mask"][...] ^= True  # excused: the stream has left already

    checked(CLOSE, spoil=spoil).require()
    session = adaptive_session(CLOSE)
    whole = session.read_state

    def off() -> dict[str, Array]:
        state = whole()
        state["lane.count"][0] += state["lane.count"][0] == 64
        return state

    session.read_state = off  # type: ignore[method-assign]
    report = compare(adaptive_trace(CLOSE), session, FP32, None, THRESHOLDS)
    assert report.mask_decisions == 1
    assert report.mask_mismatches > 0


def test_only_the_first_mismatch_of_a_stream_may_be_excused() -> None:
    def spoil(stream: int, step: int, outputs: Array, state: Mapping[str, Array]) -> None:
        if stream == 0 and step == 10:
            state["0.mask"][0] = False  # slot 0, which is far from every threshold

    report = checked(CLOSE, spoil=spoil)
    assert report.mask_decisions == 0  # the stream had strayed before
    assert report.mask_mismatches > 2


def test_more_than_one_branch_in_1000_steps_fails_in_fp32() -> None:
    trace = adaptive_trace(CLOSE, streams=4)
    report = compare(trace, adaptive_session(CLOSE), FP32, None, THRESHOLDS)
    assert report.mask_mismatches == 0
    (failure,) = report.failures
    assert failure.startswith("differing mask decisions: 1, 4.")
    int8 = replace(FP32, precision="int8")
    session = adaptive_session(CLOSE, effective_precision="int8")
    compare(trace, session, int8, None, THRESHOLDS).require()


def test_a_trace_of_branches_alone_proves_nothing() -> None:
    trace = adaptive_trace(CLOSE, streams=1)
    cut = replace(
        trace,
        sampled=trace.sampled[3:4],
        before={name: value[:, 3:4] for name, value in trace.before.items()},
        after={name: value[:, 3:4] for name, value in trace.after.items()},
    )
    report = compare(cut, adaptive_session(CLOSE), FP32, None, THRESHOLDS)
    assert "0.bank was never compared (free_run)" in report.failures
    assert "outputs was never compared (one_step)" in report.failures


# -- margins ------------------------------------------------------------------------------------------------------


def decisions(importance: list[list[float]], mask: list[list[bool]]) -> Decisions:
    """Of one stream and one step; the two rows are before and after it."""
    held = {"0.importance": np.array([importance]), "0.mask": np.array([mask])}
    trace: Trace = replace(adaptive_trace(CLOSE, streams=1), decisions=held)
    return Decisions(trace, ("0.mask",), THRESHOLDS, 1e-4)


def test_the_margin_of_an_active_slot_is_that_of_its_own_importance() -> None:
    found = decisions([[0.5, 0.12, 0.36], [0.5, 0.101, 0.36]], [[True, True, True], [True, True, True]])
    assert found.margin("0.mask", 0, 0, np.array([False, True, False])) == pytest.approx(0.001)
    assert found.margin("0.mask", 0, 0, np.array([True, False, False])) == pytest.approx(0.15)


def test_the_margin_of_a_free_slot_is_that_of_the_least_important_active_one() -> None:
    found = decisions([[0.5, 0.37, 0.5], [0.5, 0.352, 0.5]], [[True, True, False], [True, True, True]])
    assert found.margin("0.mask", 0, 0, np.array([False, False, True])) == pytest.approx(0.002)


def test_the_lowest_layer_that_differs_must_be_close() -> None:
    found = decisions([[0.5, 0.1, 0.5]] * 2, [[True, True, True]] * 2)
    slots = {"0.mask": np.array([False, True, False])}
    assert found.excused(0, 0, slots)
    assert not found.excused(0, 0, {"0.mask": np.array([True, False, False])})


def test_masks_that_a_model_does_not_decide_about_are_exact() -> None:
    assert decided_masks(adaptive_spec()) == ("0.mask",)
    assert decided_states(adaptive_spec()) == ("0.mask", "0.importance")
    assert decided_masks(fake_spec()) == ()


def test_the_thresholds_are_those_of_the_config() -> None:
    model = AdaptiveNSM(vocab_size=5, state_dim=16, max_states=4, initial_states=2)
    assert thresholds_of(model.config) == (0.1, 0.45)
    assert thresholds_of({"vocab_size": 5}) == ()
