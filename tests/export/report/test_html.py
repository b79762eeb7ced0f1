from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path

import pytest

from nsm.errors import InputError
from nsm.export.report.html import page, write_page
from nsm.results import QuantizationResult
from nsm.runtimes.parity.budgets import find_budget
from nsm.runtimes.parity.comparison import compare
from nsm.runtimes.parity.report import Bisection, ParityReport
from nsm.trace import Arrays
from tests.export.report.pictures import points, svgs
from tests.runtimes.fake import After, fake_session, fake_spec, fake_trace
from tests.runtimes.spoilers import half_state, infinite_state, late, nan_output, swapped_lanes

FP32 = find_budget("fp32")


@functools.cache
def report_of(after: After | None = None, streams: int = 8, steps: int = 64) -> ParityReport:
    return compare(fake_trace(streams, steps), fake_session(after=after), FP32)


def drawn(report: ParityReport) -> str:
    return page("model.nsm", [report], {}, {}, {})


@pytest.mark.parametrize(
    "after",
    [None, late, half_state, swapped_lanes, nan_output, infinite_state],
    ids=lambda item: str(item and item.__name__),
)
def test_the_page_is_whole_whatever_was_found(after: After | None) -> None:
    report = report_of(after)
    text = drawn(report)
    assert text.startswith("<!doctype html>")
    assert ("✓ fake passed" in text) == report.passed
    assert ("✗ fake failed" in text) == (not report.passed)
    for failure in report.failures:
        assert failure.replace("'", "&#x27;") in text
    assert len(svgs(text)) >= 2
    for tag in ("section", "table", "details", "ul", "div", "p", "h3", "main", "body", "html"):
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    text = drawn(report_of(late))
    assert not re.findall(r"https?:|//[a-z]|<script|<link|<img|\bsrc=|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text


def test_everything_that_has_a_budget_is_in_the_table() -> None:
    report = report_of(late)
    text = drawn(report)
    for part in ("one-step error p99", "free-run error p99", "in single tokens p99", "KL mean", "KL p99.9"):
        assert part in text
    rows = re.findall(
        r"<td>(free-run error p99[^<]*)</td><td class='number'>([^<]*)</td><td class='number'>([^<]*)<", text
    )
    assert rows == [(f"free-run error p99, of {report.free_run.tensor}", f"{report.free_run.p99:.2e}", "1.00e-04")]
    assert text.count("class='bad'") == sum(
        not value <= limit
        for value, limit in (
            (report.one_step.p99, FP32.one_step_p99),
            (report.free_run.p99, FP32.free_run_p99),
            (report.kl_mean, FP32.kl_mean),
            (report.kl_p999, FP32.kl_p999),
        )
    )
    assert "in single tokens" not in drawn(compare(fake_trace(), fake_session(fake_spec(entries=("step",))), FP32))


def test_the_page_says_what_was_compared() -> None:
    assert "8 streams of 64 steps (synthetic), states of 8 at 6 of the steps" in drawn(report_of())


def test_the_first_divergence_is_told_and_marked() -> None:
    text = drawn(report_of(late))
    assert "First over budget: stream 0, step 30, <code>outputs</code>" in text
    assert "first over budget: outputs" in text
    assert "irst over budget" not in drawn(report_of())


def test_the_error_over_the_stream_and_its_drift_are_drawn() -> None:
    def after(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
        outputs["outputs"] *= 1 + 1e-6 * calls

    report = report_of(after)
    assert report.drift is not None
    picture = svgs(drawn(report))[0]
    assert len(points(picture, "one")) == len(points(picture, "two")) == 64
    (x0, y0), *_, (x1, y1) = points(picture, "fit")
    assert x1 > x0
    assert y1 < y0
    assert f"exponent {report.drift.exponent:.2f}" in drawn(report)


def test_one_step_and_free_run_are_drawn_together() -> None:
    def after(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
        outputs["outputs"] *= 1 + 1e-6 * calls
        state["0.tail"] *= 1 + 1e-6 * calls  # calls since the state was loaded: one, in single steps

    outputs, states = svgs(drawn(report_of(after)))[:2]
    sampled = len(report_of().sampled_steps)
    for picture, free in ((outputs, 64), (states, sampled)):
        single = points(picture, "three")
        assert len(single) == sampled
        assert len(points(picture, "one")) == free
        assert max(y for _, y in single) - min(y for _, y in single) < 1.0, "single steps have one error, whenever"
        assert points(picture, "one")[-1][1] < single[-1][1] - 20, "the free run has grown away from them"
        assert points(picture, "one")[0] == pytest.approx(single[0], abs=0.2)


def test_flips_are_listed_and_those_without_excuse_are_in_sight() -> None:
    def after(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
        if calls == 12:
            outputs["outputs"][0, 2] *= -1

    assert "<details" not in drawn(report_of())
    report = compare(fake_trace(2, 64), fake_session(after=after), FP32)
    (change,) = report.argmax_changes
    text = drawn(report)
    assert "<details open><summary>Argmax changes: 1 not excused, 0 excused" in text
    row = (0, 11, 2, 0, change.reference, change.target, f"{change.margin:.2e}")
    cells = "".join(f"<td class='number'>{number}</td>" for number in row)
    assert f"<tr>{cells}<td><span class='failed'>not excused</span></td></tr>" in text
    many = drawn(report_of(swapped_lanes))
    assert many.count("not excused</span>") + many.count("<td>excused</td>") == 100
    assert "more are not listed" in many
    assert "<details><summary>" in drawn(replace(report, unexcused_argmax_changes=0, excused_argmax_changes=1))


def test_what_kept_in_fp32_is_told_with_its_reason() -> None:
    reason = "router layer: always fp32"
    facts = QuantizationResult("dynamic", (), {"route <0>": reason, "route 1": reason})
    text = page("model.nsm", [report_of()], {}, {}, {"fake": facts})
    assert "Kept in fp32" in text
    assert "Scheme of the other linear ops: dynamic." in text
    assert f"<td>{reason}</td><td class='number'>2</td><td><code>route &lt;0&gt;, route 1</code>" in text
    assert "None. Scheme: fp16." in page("model.nsm", [report_of()], {}, {}, {"fake": QuantizationResult("fp16")})
    assert "ept in fp32" not in drawn(report_of())


def test_capacity_and_limits_are_told() -> None:
    lines = ["capacity: 256 tokens of a stream, then reset its lane", "limit: <b> 100"]
    text = page("model.nsm", [report_of()], {}, {}, {}, lines)
    assert "<p>capacity: 256 tokens of a stream, then reset its lane</p><p>limit: &lt;b&gt; 100</p>" in text


def test_states_without_any_error_are_left_out_of_the_map() -> None:
    def after(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
        state["0.bank"] *= 1 + 1e-7

    text = drawn(report_of(after))
    assert "<title>0.bank, 0:" in text
    assert "<title>0.tail" not in text
    assert "2 of 3 states are exact and not shown." in text


def test_branches_are_in_the_table_where_there_are_any() -> None:
    report = report_of()
    assert "mask decisions excused" not in drawn(report)
    assert "mask decisions excused in 1000 steps" in drawn(
        replace(report, mask_decisions=1, mask_decisions_per_1000_steps=0.5)
    )


def test_what_was_not_run_and_what_was_bisected_is_told() -> None:
    found = Bisection("operation", "linear", 1e-3, 1e-5, "One operation <b>.", "MatMul", "node")
    text = page("<model>", [report_of()], {"tensorrt": "no GPU <here>"}, {"fake": found}, {})
    assert "? tensorrt not run" in text
    assert "Not run. no GPU &lt;here&gt;" in text
    assert "<b>Bisected:</b> One operation &lt;b&gt;." in text
    assert "Parity of &lt;model&gt;" in text


def test_one_stream_of_one_step_makes_a_page() -> None:
    text = drawn(report_of(streams=1, steps=1))
    assert "drift exponent</td><td class='number'>-<" in text


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "parity.html"
    target.write_text(page("old.nsm", [report_of()], {}, {}, {}))
    write_page(target, "model.nsm", [report_of()], {}, {}, {})
    assert target.read_text(encoding="utf-8") == page("model.nsm", [report_of()], {}, {}, {})
    assert [item.name for item in tmp_path.iterdir()] == ["parity.html"]
    with pytest.raises(InputError, match="Make the folder first"):
        write_page(tmp_path / "none" / "x.html", "model.nsm", [], {}, {}, {})
