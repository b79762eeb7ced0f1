from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from nsm.errors import InputError
from nsm.results import AcceptedBudget
from nsm.runtimes.base import State
from nsm.runtimes.parity.budgets import check_budgets, find_budget, parse_budgets
from nsm.runtimes.parity.comparison import compare
from nsm.runtimes.parity.metrics import rms_norm
from nsm.runtimes.session.session import Session
from nsm.trace import Array, Arrays, Origin, Trace
from tests.runtimes.fake import (
    CHUNK,
    After,
    FakeRuntime,
    fake_initial,
    fake_session,
    fake_spec,
    fake_trace,
)
from tests.runtimes.spoilers import (
    bank_of_a_slot_that_is_off,
    far_off,
    half_state,
    infinite_state,
    late,
    nan_output,
    swapped_lanes,
)

FP32 = find_budget("fp32")


# -- the report ---------------------------------------------------------------------------------------------------

KEYS = {
    "target": (),
    "precision": (),
    "status": (),
    "streams": (),
    "steps": (),
    "state_streams": (),
    "sampled_steps": (),
    "one_step": ("p50", "p99", "max"),
    "free_run": ("p50", "p99", "max"),
    "split": ("p50", "p99", "max"),
    "drift_exponent": (),
    "state_error": ("p99", "max"),
    "argmax_agreement": (),
    "unexcused_argmax_changes": (),
    "kl": ("mean", "p999"),
    "mask_mismatches": (),
    "first_divergence": (),
    "budget": (),
}


@pytest.mark.parametrize("after", [None, nan_output, infinite_state, late], ids=["honest", "NaN", "inf", "late"])
def test_the_json_has_every_key_and_no_number_that_json_does_not_know(after: After | None) -> None:
    report = compare(fake_trace(streams=8), fake_session(after=after), FP32)
    data: dict[str, Any] = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert set(KEYS) <= set(data)
    for name, parts in KEYS.items():
        if parts:
            assert set(parts) <= set(data[name])
    assert data["status"] == ("passed" if after is None else "failed")
    assert bool(data["failures"]) == (after is not None)
    assert data["budget"]["free_run_p99"] == FP32.free_run_p99


def test_the_report_says_how_much_rests_on_how_few_states() -> None:
    whole = fake_trace()
    fewer = replace(
        whole,
        before={name: value[:1] for name, value in whole.before.items()},
        after={name: value[:1] for name, value in whole.after.items()},
    )
    report = compare(fewer, fake_session(), FP32)
    data = report.to_json()
    assert (data["streams"], data["steps"], data["state_streams"]) == (4, 64, 1)
    assert data["sampled_steps"] == whole.sampled.tolist()
    assert report.coverage == "4 streams of 64 steps (synthetic), states of 1 at 6 of the steps"


def test_the_json_says_where_the_first_divergence_is() -> None:
    data = compare(fake_trace(), fake_session(after=late), FP32).to_json()
    assert {"stream": 0, "step": 30, "tensor": "outputs"}.items() <= data["first_divergence"].items()


def test_the_json_holds_the_drift_and_its_interval() -> None:
    def after(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
        outputs["outputs"] *= 1 + 1e-7 * calls

    data = compare(fake_trace(streams=8), fake_session(after=after), FP32).to_json()
    low, high = data["drift_interval"]
    assert low <= data["drift_exponent"] <= high
    assert data["drift_exponent"] == pytest.approx(1.0, abs=0.3)


def test_the_state_error_is_that_of_the_active_slots() -> None:
    report = compare(fake_trace(), fake_session(after=bank_of_a_slot_that_is_off), FP32)
    assert report.state_error_max == 0.0
    assert not report.passed

    def after(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
        if calls == 64:
            state["0.bank"][0, 1] *= 1 + 1e-2

    report = compare(fake_trace(streams=2), fake_session(after=after), FP32)
    assert report.state_error_max == pytest.approx(1e-2, rel=1e-3)


def test_a_model_without_banks_has_a_state_error_too() -> None:
    spec, trace = fake_spec(entries=("step",)), fake_trace(streams=2, steps=4)
    names = {"0.bank": "0.memory", "0.mask": "0.gate"}
    states = tuple(replace(s, name=names.get(s.name, s.name)) for s in spec.states)
    reads = tuple(state.name for state in states)
    renamed = replace(spec, states=states, entries=(replace(spec.entry("step"), reads=reads, writes=reads),))

    class Renamed(FakeRuntime):
        def load_state(self, arrays: Mapping[str, Array]) -> State:
            return super().load_state({s.name: arrays[names.get(s.name, s.name)] for s in spec.states})

        def read_state(self, state: State) -> Arrays:
            return {names.get(name, name): value for name, value in super().read_state(state).items()}

    def rename(arrays: Mapping[str, Array]) -> Arrays:
        return {names.get(name, name): value for name, value in arrays.items()}

    session = Session(Renamed(spec, half_state), renamed, rename(fake_initial(spec)), "f" * 64, "fake")
    report = compare(replace(trace, before=rename(trace.before), after=rename(trace.after)), session, FP32)
    assert report.state_error_max == pytest.approx(report.per_tensor["0.memory"]["free_run_p99"])
    assert report.state_error_max > 0
    assert report.state_error_by_layer == {}
    assert report.state_error_by_age == ()


def test_the_gain_is_that_of_one_tensor_on_the_same_samples() -> None:
    """The worst tensor of single steps is not that of the free run; their ratio would be no gain of either."""

    def after(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
        outputs["outputs"] *= 1 + 1e-3  # the same at every step
        state["0.written"] *= 1 + 1e-4 * calls  # nothing reads it; errors of 64 steps add up

    trace = fake_trace()
    report = compare(trace, fake_session(after=after), FP32)
    assert (report.one_step.tensor, report.free_run.tensor) == ("outputs", "0.written")
    assert report.per_tensor["outputs"]["gain"] == pytest.approx(1.0, rel=1e-3)
    assert np.isnan(report.per_tensor["0.bank"]["gain"]), "single steps have no error"
    factors = np.cumprod(1 + 1e-4 * np.arange(1, 65))  # written adds CHUNK, and is scaled, at every step
    written = np.array([np.sum(factors[step] / np.concatenate([[1], factors[:step]])) for step in range(64)])
    errors = (written / np.arange(1, 65) - 1)[trace.sampled]
    assert report.gain is not None
    assert report.gain.tensor == "0.written"
    assert report.gain.ratio == pytest.approx(np.sort(errors)[3] / 1e-4, rel=0.02)
    data = report.to_json()
    assert data["gain"] == {"ratio": report.gain.ratio, "tensor": "0.written"}
    assert data["per_tensor"]["0.bank"]["gain"] is None
    assert compare(trace, fake_session(), FP32).to_json()["gain"] is None


# -- the mean, layers and ages ------------------------------------------------------------------------------------


def test_the_mean_is_over_streams_and_steps_of_the_outputs() -> None:
    def after(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
        if calls > 32:
            outputs["outputs"] *= 1 + 1e-3

    report = compare(fake_trace(), fake_session(after=after), FP32)
    assert report.free_run_mean == pytest.approx(0.5e-3, rel=0.01)
    assert report.to_json()["free_run_mean"] == report.free_run_mean
    assert report.free_run.p99 == pytest.approx(1e-3, rel=0.01)


def test_a_mean_that_is_not_finite_is_null() -> None:
    report = compare(fake_trace(), fake_session(after=nan_output), FP32)
    assert np.isfinite(report.free_run_mean)
    trace = fake_trace()
    nothing = replace(trace, inputs={**trace.inputs, "valid": np.zeros((4, 64), np.int64)})
    assert compare(nothing, fake_session(), FP32).to_json()["free_run_mean"] is None


def test_the_state_error_is_split_by_layer_and_by_age() -> None:
    def after(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
        if calls == 64:
            state["0.bank"][:, 1] *= 1 + 1e-2

    trace = fake_trace(streams=2)
    report = compare(trace, fake_session(after=after), FP32)
    assert list(report.state_error_by_layer) == ["0.bank"]
    assert report.state_error_by_layer["0.bank"].max == pytest.approx(1e-2, rel=1e-3)
    assert report.state_error_by_layer["0.bank"].p50 == 0.0
    data = report.to_json()
    assert set(data["state_error_by_layer"]["0.bank"]) == {"p50", "p99", "max"}
    by_age = {(item["from"], item["to"]): item for item in data["state_error_by_age"]}
    assert [start for start, _ in by_age] == [2 ** int(np.log2(step + 1)) for step in trace.sampled]
    assert by_age[64, 127]["p99"] == pytest.approx(1e-2, rel=1e-3)
    assert all(item["p99"] == 0.0 for (start, _), item in by_age.items() if start < 64)


# -- the curves ---------------------------------------------------------------------------------------------------


def test_the_curves_follow_the_streams_and_stay_out_of_the_json() -> None:
    trace = fake_trace()
    report = compare(trace, fake_session(after=late), FP32)
    curves = report.curves
    assert curves.free_run_p50.shape == curves.free_run_p99.shape == (64,)
    assert curves.free_run_p99[:30].max() == 0.0
    assert curves.free_run_p50[30:].min() == pytest.approx(1e-3, rel=0.01)
    assert curves.sampled.tolist() == trace.sampled.tolist()
    assert set(curves.states) == set(curves.one_step) == {"0.bank", "0.tail", "0.written"}
    assert all(values.shape == trace.sampled.shape for values in curves.states.values())
    assert "curves" not in report.to_json()


def test_the_curves_of_a_state_are_those_of_the_worst_stream() -> None:
    def after(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
        if calls == 64:
            state["0.tail"][0] *= 1 + 1e-2

    trace = fake_trace(streams=2)
    curves = compare(trace, fake_session(after=after), FP32).curves
    size, usual = float(np.linalg.norm(trace.after["0.tail"][0, -1])), rms_norm(trace.after["0.tail"])
    assert curves.states["0.tail"][-1] == pytest.approx(1e-2 * size / max(size, usual), rel=1e-3)
    assert curves.states["0.tail"][:-1].max() == 0.0
    assert curves.one_step["0.tail"].max() == 0.0


def test_the_curves_hold_the_margins_and_the_flips() -> None:
    report = compare(fake_trace(), fake_session(after=swapped_lanes), FP32)
    curves = report.curves
    assert curves.margins.shape == curves.argmax_changes.shape == (4 * 64 * CHUNK,)
    assert curves.argmax_changes.sum() == report.excused_argmax_changes + report.unexcused_argmax_changes > 0
    assert curves.excused_margin == pytest.approx(2 * FP32.free_run_p99)


def conditioned(floor: float, source: Origin = "recorded") -> Trace:
    """A trace whose outputs have this conditioning floor in a free run."""
    return replace(fake_trace(), conditioning={"one_step": {}, "free_run": {"outputs": floor}}, source=source)


@pytest.mark.parametrize(("floor", "passes"), [(0.0, False), (2e-4, False), (2.6e-4, True), (1e-3, True)])
def test_an_error_within_four_conditioning_floors_passes_in_fp32(floor: float, passes: bool) -> None:
    """`late` is off by 1e-3 from step 30 on."""
    report = compare(conditioned(floor), fake_session(after=late), FP32)
    assert report.passed == passes
    assert report.excused_by_conditioning == (("outputs",) if passes else ())
    assert report.limits["free_run"]["outputs"] == max(FP32.free_run_p99, 4 * floor)
    assert report.per_tensor["outputs"]["free_run_floor"] == floor
    assert report.to_json()["conditioning_floor"] == floor
    if not passes:
        (failure,) = (text for text in report.failures if "free-run" in text)
        assert failure == f"free-run error p99 of outputs is 0.001, the budget {max(1e-4, 4 * floor):.3g}"


def test_other_precisions_are_not_excused_by_the_floor() -> None:
    half = find_budget("fp16")
    report = compare(conditioned(5e-3), fake_session(), half)
    assert report.limits["free_run"]["outputs"] == half.free_run_p99


@pytest.mark.parametrize("floor", [0.011, 10.0, float("inf")])
def test_a_model_that_amplifies_rounding_cannot_be_compared(floor: float) -> None:
    report = compare(conditioned(floor), fake_session(), FP32)
    assert not report.passed
    (failure,) = report.failures
    assert "the model amplifies rounding: its conditioning floor is " in failure


@pytest.mark.parametrize(
    ("budget", "passes"),
    [
        (AcceptedBudget("outputs", 2e-3), True),
        (AcceptedBudget("outputs", 0.9e-3), False),
        (AcceptedBudget("0.tail", 2e-3), False),
        (AcceptedBudget("outputs", 2e-3, absolute=True), True),
        (AcceptedBudget("outputs", 1e-6, absolute=True), False),
    ],
    ids=str,
)
def test_a_user_accepts_a_budget_for_a_tensor(budget: AcceptedBudget, passes: bool) -> None:
    """`late` is off by 1e-3, in outputs of norm 2 that are below 1."""
    report = compare(fake_trace(), fake_session(after=late), FP32, accepted=[budget])
    assert report.passed == passes
    assert report.to_json()["accepted"] == [asdict(budget)]
    if budget.absolute:
        assert 0 < report.per_tensor["outputs"]["free_run_p99"] < 1e-3


def test_an_accepted_tensor_may_be_ill_conditioned() -> None:
    assert not compare(conditioned(0.02), fake_session(), FP32).passed
    assert compare(conditioned(0.02), fake_session(), FP32, accepted=[AcceptedBudget("outputs", 0.1)]).passed


def test_budgets_are_parsed() -> None:
    assert parse_budgets(["outputs=1e-3", "0.bank=abs:2"]) == (
        AcceptedBudget("outputs", 1e-3),
        AcceptedBudget("0.bank", 2.0, absolute=True),
    )
    assert [str(item) for item in parse_budgets(["a=b=1e-3", "0.bank=abs:2"])] == ["a=b=0.001", "0.bank=abs:2"]


@pytest.mark.parametrize(
    "text", ["outputs", "=1", "outputs=", "outputs=much", "outputs=-1", "outputs=0", "outputs=nan"]
)
def test_a_budget_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"--budget expects NAME=VALUE or NAME=abs:VALUE .*; given"):
        parse_budgets([text])


def test_two_budgets_of_a_tensor_and_those_of_no_tensor_are_refused() -> None:
    with pytest.raises(InputError, match="given twice for outputs"):
        parse_budgets(["outputs=1", "outputs=abs:1"])
    with pytest.raises(InputError, match=r"--budget names 'output'; expected an output or a state: outputs, 0\.bank"):
        check_budgets(parse_budgets(["output=1"]), fake_spec())


def test_a_failure_says_which_cause_is_likely() -> None:
    assert "--bisect" in compare(conditioned(0.0), fake_session(after=far_off), FP32).verdict()
    assert (
        "give real sequences with --data"
        in compare(conditioned(0.0, "synthetic"), fake_session(after=late), FP32).verdict()
    )
    assert (
        "amplifies rounding over these streams"
        in compare(conditioned(0.02), fake_session(after=far_off), FP32).verdict()
    )
