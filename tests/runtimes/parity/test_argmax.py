from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from nsm.errors import ParityError
from nsm.runtimes.base import State
from nsm.runtimes.parity.argmax import MAX_LISTED_CHANGES
from nsm.runtimes.parity.budgets import Budget, find_budget
from nsm.runtimes.parity.comparison import compare
from nsm.runtimes.session.session import Session
from nsm.trace import Array, Arrays, Trace
from tests.runtimes.fake import (
    CHUNK,
    OUTPUTS,
    After,
    FakeRuntime,
    fake_initial,
    fake_session,
    fake_spec,
    fake_trace,
    with_output,
)

FP32 = find_budget("fp32")


# -- argmax changes --------------------------------------------------------------------------------------------------


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
    assert (report.excused_argmax_changes, report.unexcused_argmax_changes) == (1, 0)
    (change,) = report.argmax_changes
    assert change.excused
    assert report.argmax_agreement == 1 - 1 / (8 * 64 * CHUNK)


def test_a_flip_beyond_the_references_margin_is_not_excused() -> None:
    trace, after, _ = _flip(4e-4)
    report = compare(trace, fake_session(after=after), FP32)
    assert (report.excused_argmax_changes, report.unexcused_argmax_changes) == (0, 1)
    low, high = np.argsort(fake_trace(streams=8, steps=64).outputs["outputs"][0, 5, 1])[-2:].tolist()
    assert report.to_json()["argmax_changes"] == [
        {
            "stream": 0,
            "step": 5,
            "token": 1,
            "decision": 0,
            "reference": low,
            "target": high,
            "margin": pytest.approx(4e-4, rel=0.01),
            "excused": False,
        }
    ]
    assert report.argmax_changes_left_off == 0
    assert any(
        f"1 of {8 * 64 * CHUNK} decisions have another argmax without excuse" in text for text in report.failures
    )


def test_the_excuse_grows_with_the_budget() -> None:
    trace, after, _ = _flip(4e-4)
    loose = Budget("fp32", 1.0, 1e-3, 1.0, 1.0, 1.0)
    report = compare(trace, fake_session(after=after), loose)
    report.require()
    assert (report.excused_argmax_changes, report.unexcused_argmax_changes) == (1, 0)


def test_the_excuse_does_not_grow_with_the_measured_error() -> None:
    trace, change, rms = _flip(1e-2)

    def after(calls: int, given: Arrays, state: Arrays, before: Arrays) -> None:
        change(calls, given, state, before)
        given["outputs"] += np.float32(0.3 * rms)  # the same for every class: an error without an argmax change

    report = compare(trace, fake_session(after=after), FP32)
    assert report.free_run.p50 > 0.1  # twice that would excuse the argmax change
    assert (report.excused_argmax_changes, report.unexcused_argmax_changes) == (0, 1)


def test_the_excuse_does_not_grow_with_another_output() -> None:
    trace, change, rms = _flip(4e-4)
    entry = fake_spec().entry("step")
    loud = replace(entry.outputs[0], name="loud")
    spec = replace(fake_spec(entries=("step",)), entries=(replace(entry, outputs=(*entry.outputs, loud)),))
    values = np.full_like(trace.outputs["outputs"], 100 * rms)

    def after(calls: int, given: Arrays, state: Arrays, before: Arrays) -> None:
        change(calls, given, state, before)
        given["loud"] = np.full_like(given["outputs"], 100 * rms)

    both = replace(trace, outputs={**trace.outputs, "loud": values})
    report = compare(both, fake_session(spec, after=after), FP32)
    assert (report.excused_argmax_changes, report.unexcused_argmax_changes) == (0, 1)


def _shaped(shape: tuple[int, ...], after: After | None = None) -> tuple[Trace, Session]:
    """A trace and a session whose output of a token has another shape than a row of logits."""
    plain = fake_spec()
    entries = tuple(
        replace(entry, outputs=tuple(replace(item, shape=(*item.shape[:2], *shape)) for item in entry.outputs))
        for entry in plain.entries
    )

    def reshaped(outputs: Array) -> Array:
        size = int(np.prod(shape))
        wide = np.concatenate([outputs, -outputs], -1)  # as many decisions the other way round
        return wide[..., :size].reshape(*outputs.shape[:-1], *shape)

    class Shaped(FakeRuntime):
        def call(self, entry: str, inputs: Mapping[str, Array], state: State) -> tuple[Arrays, State]:
            outputs, handle = super().call(entry, inputs, state)
            outputs = {name: reshaped(value) for name, value in outputs.items()}
            if after is not None and entry == "step":
                after(self.calls, outputs, {}, {})
            return outputs, handle

    spec = replace(plain, entries=entries)
    trace = fake_trace(streams=4, steps=16)
    session = Session(Shaped(spec), spec, fake_initial(spec), trace.fingerprint, "fake")
    return with_output(trace, reshaped(trace.outputs["outputs"])), session


@pytest.mark.parametrize("shape", [(), (1,), (2, OUTPUTS), (1, 2, OUTPUTS)], ids=str)
def test_an_output_of_any_rank_is_compared(shape: tuple[int, ...]) -> None:
    report = compare(*_shaped(shape), FP32)
    report.require()
    assert (report.argmax_agreement, report.kl_mean) == (1.0, 0.0)
    assert (
        report.curves.argmax_changes.shape
        == report.curves.margins.shape
        == (4 * 16 * CHUNK * int(np.prod(shape[:-1])),)
    )
    assert np.isfinite(report.curves.margins).all() == (shape[-1:] == (OUTPUTS,))


def test_one_number_a_token_that_is_off_fails() -> None:
    def after(calls: int, given: Arrays, state: Arrays, before: Arrays) -> None:
        given["outputs"] *= 1 + 1e-3

    report = compare(*_shaped((), after), FP32)
    assert any("free-run error p99 of outputs" in text for text in report.failures)


def test_agreement_is_the_share_of_all_decisions_of_a_token() -> None:
    def after(calls: int, given: Arrays, state: Arrays, before: Arrays) -> None:
        given["outputs"] = given["outputs"][:, :, ::-1].copy()  # the other codebook's: every decision is another one

    report = compare(*_shaped((2, OUTPUTS), after), FP32)
    decisions = 4 * 16 * CHUNK * 2
    assert report.argmax_agreement == 0.0
    assert report.unexcused_argmax_changes + report.excused_argmax_changes == decisions
    assert any(f"of {decisions} decisions have another argmax" in text for text in report.failures)


def test_all_flips_are_counted_and_the_first_are_listed() -> None:
    def after(calls: int, given: Arrays, state: Arrays, before: Arrays) -> None:
        given["outputs"] = given["outputs"][:, :, ::-1].copy()  # the other codebook's

    report = compare(*_shaped((2, OUTPUTS), after), FP32)
    data = report.to_json()
    assert len(report.argmax_changes) == MAX_LISTED_CHANGES == len(data["argmax_changes"])
    assert (
        data["argmax_changes_left_off"]
        == report.unexcused_argmax_changes + report.excused_argmax_changes - MAX_LISTED_CHANGES
        == 4 * 16 * CHUNK * 2 - 100
    )
    places = [
        (change.step, change.stream, change.token, change.decision)
        for change in report.argmax_changes
        if not change.excused
    ]
    assert places == sorted(places)
    assert places[:3] == [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0)]


def test_flips_without_excuse_are_listed_before_excused_ones() -> None:
    trace, after, _ = _flip(4e-4)
    outputs = trace.outputs["outputs"]
    low, high = np.argsort(outputs[0, 0, 3])[-2:]
    top = outputs[0, 0, 3, high]
    outputs[0, 0, 3, low] = top  # no lead at all: the reference takes the first of the two

    def both(calls: int, given: Arrays, state: Arrays, before: Arrays) -> None:
        after(calls, given, state, before)
        if calls == 1 and given["outputs"][0, 3, high] == top:
            given["outputs"][0, 3, [low, high]] = top
            given["outputs"][0, 3, max(low, high)] = np.nextafter(top, np.float32(np.inf))

    argmax_changes = compare(trace, fake_session(after=both), FP32).argmax_changes
    assert [(change.step, change.excused) for change in argmax_changes] == [(5, False), (0, True)]


def test_a_lower_agreement_may_be_allowed() -> None:
    trace, after, _ = _flip(1e-2)
    loose = Budget("fp32", 1.0, 1e-6, 0.999, 1.0, 1.0)
    report = compare(trace, fake_session(after=after), replace(loose, free_run_p99=1e-3))
    assert report.unexcused_argmax_changes == 1
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
