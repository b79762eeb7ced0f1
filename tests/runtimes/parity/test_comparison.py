from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from nsm.bundle import Bundle
from nsm.errors import ParityError
from nsm.runtimes.backends.onnxruntime import load
from nsm.runtimes.opening.artifacts import open_bundle
from nsm.runtimes.parity.budgets import find_budget
from nsm.runtimes.parity.comparison import compare
from nsm.runtimes.parity.replay import SPLIT_STEPS
from nsm.runtimes.session.session import Session
from nsm.trace import Arrays
from tests.runtimes.fake import (
    CHUNK,
    After,
    FakeRuntime,
    assert_same,
    fake_initial,
    fake_session,
    fake_spec,
    fake_trace,
    with_output,
)
from tests.runtimes.half_state import HalfState
from tests.runtimes.spoilers import (
    bank_of_a_slot_that_is_off,
    commit_forgets,
    counter,
    decode_forgets,
    decode_off,
    frozen,
    half_state,
    infinite_state,
    late,
    mask,
    nan_output,
    nan_state,
    one_counter_for_all_lanes,
    outputs_by_the_first_lane,
    swapped_lanes,
    unread_state,
    zeros,
)

FP32 = find_budget("fp32")


# -- honest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_the_same_model_passes_on_any_number_of_lanes(batch: int) -> None:
    trace = fake_trace(streams=4, steps=64)
    report = compare(trace, fake_session(fake_spec(batch)), FP32)
    assert report.passed
    report.require()
    assert (report.streams, report.steps, report.first_divergence) == (4, 64, None)
    assert (report.one_step.max, report.free_run.max, report.state_error_max) == (0.0, 0.0, 0.0)
    assert report.split is not None
    assert report.split.max == 0.0
    assert (report.staggered is None) == (batch == 1)
    assert report.staggered is None or report.staggered.max == 0.0
    assert (report.argmax_agreement, report.unexcused_argmax_changes, report.mask_mismatches) == (1.0, 0, 0)
    assert set(report.per_tensor) == {"outputs", "0.bank", "0.tail", "0.written"}


def test_every_target_is_the_model(bundle: Bundle, target: str) -> None:
    with open_bundle(bundle, target) as session:
        report = compare(bundle.trace(), session, FP32)
        report.require()
        assert (report.target, report.effective_precision) == (target, "fp32")
        assert 0 < report.one_step.p99 <= FP32.one_step_p99
        assert 0 < report.free_run.p99 <= FP32.free_run_p99
        assert report.split is not None
        assert 0 < report.split.p99 <= FP32.free_run_p99
        assert report.drift is not None
        assert_same(session.read_state(), bundle.state_init())


def test_a_session_that_has_lived_before_is_reset_before_and_after() -> None:
    session = fake_session()
    fresh = session.read_state()
    session.step(np.ones((2, CHUNK), int), [1, 1])
    assert compare(fake_trace(steps=8), session, FP32).passed
    assert_same(session.read_state(), fresh)
    assert not session.offsets.any()


def test_the_session_is_reset_after_an_error_too() -> None:
    session = fake_session()
    fresh = session.read_state()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(fake_trace(steps=8), session, FP32, stop)
    assert_same(session.read_state(), fresh)


def test_progress_counts_every_step_to_the_end() -> None:
    trace, seen = fake_trace(streams=3, steps=8), []
    compare(trace, fake_session(), FP32, lambda done, total: seen.append((done, total)))
    total = 2 * 8 + 2 * len(trace.sampled) + 2 * SPLIT_STEPS + 1  # one lane starts a step later
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_a_trace_may_be_cut_and_keep_states_of_some_streams_and_outputs_of_some_tokens() -> None:
    trace = fake_trace(streams=4, steps=64).first(10)
    trace = replace(
        trace,
        positions=np.array([1, 3]),
        outputs={"outputs": trace.outputs["outputs"][:, :, [1, 3]]},
        before={name: value[:3] for name, value in trace.before.items()},
        after={name: value[:3] for name, value in trace.after.items()},
    )
    report = compare(trace, fake_session(), FP32)
    report.require()
    assert report.steps == 10


def test_what_stands_after_the_valid_tokens_is_not_compared() -> None:
    trace = fake_trace(streams=2, steps=1)
    tokens, valid = trace.inputs["tokens"], np.full((2, 1), 2)
    session = fake_session()
    outputs = session.step(tokens[:, 0], valid[:, 0])["outputs"]
    state = session.read_state()
    outputs[:, 2:] = np.nan
    partial = replace(
        with_output(trace, outputs[:, None]),
        inputs={"tokens": tokens, "valid": valid},
        after={name: value[:, None] for name, value in state.items()},
    )
    compare(partial, fake_session(), FP32).require()


# -- dishonest ----------------------------------------------------------------------------------------------------


DISHONEST: Mapping[str, tuple[After, str]] = {
    "outputs off after step 30": (late, r"free-run error p99 of outputs is 0\.001, the budget 0\.0001"),
    "state never changes": (frozen, r"one-step error p99 of"),
    "state off that nothing reads": (unread_state, r"one-step error p99 of 0\.written is 0\.001"),
    "slot off that is switched off": (bank_of_a_slot_that_is_off, r"error p99 of 0\.bank"),
    "mask flipped": (mask, r"entries of masks or counters differ"),
    "counter off": (counter, r"entries of masks or counters differ"),
    "outputs zero": (zeros, r"error p99 of outputs is 1, "),
    "lanes swapped": (swapped_lanes, r"error p99 of outputs"),
    "NaN in an output": (nan_output, r"NaN or infinity \(The output outputs .* on lanes \[1\]"),
    "NaN in a state": (nan_state, r"0\.written|NaN"),
    "infinity in a state": (infinite_state, r"0\.written|NaN"),
    "state in half precision": (half_state, r"error p99 of 0\.bank"),
}


@pytest.mark.parametrize(("after", "message"), DISHONEST.values(), ids=DISHONEST)
def test_a_dishonest_target_fails(after: After, message: str) -> None:
    session = fake_session(after=after)
    fresh = session.read_state()
    report = compare(fake_trace(), session, FP32)
    assert not report.passed
    with pytest.raises(ParityError, match=rf"Parity failed on fake fp32: .*{message}"):
        report.require()
    assert report.to_json()["status"] == "failed"
    json.dumps(report.to_json(), allow_nan=False)
    assert_same(session.read_state(), fresh)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (one_counter_for_all_lanes, r"\d+ entries of masks or counters differ"),
        (outputs_by_the_first_lane, r"error p99 of outputs in lanes of different age is 0\.001, the budget 0\.0001"),
    ],
)
def test_a_target_that_is_right_while_lanes_march_in_step_fails(after: After, message: str) -> None:
    report = compare(fake_trace(), fake_session(after=after), FP32)
    assert report.staggered is not None
    assert (report.one_step.max, report.free_run.max) == (0.0, 0.0)
    with pytest.raises(ParityError, match=message):
        report.require()
    assert compare(fake_trace(), fake_session(fake_spec(1), after=after), FP32).staggered is None


def test_the_first_divergence_is_named() -> None:
    report = compare(fake_trace(), fake_session(after=late), FP32)
    found = report.first_divergence
    assert found is not None
    assert (found.stream, found.step, found.tensor) == (0, 30, "outputs")
    assert found.error == pytest.approx(1e-3, rel=0.01)
    assert report.one_step.max == 0.0


@pytest.mark.parametrize(("factor", "step"), [(1 + 1.2e-4, 30), (1 + 0.8e-4, None)], ids=["over", "under"])
def test_a_divergence_begins_where_the_budget_ends(factor: float, step: int | None) -> None:
    def after(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
        if calls > 30:
            outputs["outputs"] *= np.float32(factor)

    report = compare(fake_trace(), fake_session(after=after), FP32)
    found = report.first_divergence
    assert (None if found is None else found.step) == step
    assert any("free-run" in failure for failure in report.failures) == (step is not None)


def test_a_divergence_of_a_state_is_named_with_the_step_at_which_it_was_looked_at() -> None:
    found = compare(fake_trace(), fake_session(after=unread_state), FP32).first_divergence
    assert found is not None
    # Of the sampled steps 0, 1, ..., the first whose error is over the budget relative to what is usual for the state.
    assert (found.stream, found.step, found.tensor) == (0, 1, "0.written")


def test_a_flipped_mask_is_counted_entry_by_entry() -> None:
    trace = fake_trace(streams=2, steps=1)
    report = compare(trace, fake_session(after=mask), FP32)
    assert report.mask_mismatches == 3 * 2  # two lanes, in the free run, the single step and the staggered run


def test_a_wrong_effective_precision_fails_however_small_the_error() -> None:
    report = compare(fake_trace(), fake_session(effective_precision="bf16"), FP32)
    assert report.failures == ("the backend computes in bf16 instead of fp32",)


def test_a_reset_that_forgets_a_state_fails() -> None:
    spec = fake_spec()
    start = fake_initial(spec)["0.bank"]

    def loaded(arrays: Arrays, held: Arrays) -> Arrays:
        is_reset = bool(held) and np.array_equal(arrays["0.bank"], start)
        return {**arrays, "0.bank": held["0.bank"]} if is_reset else arrays

    report = compare(fake_trace(), fake_session(spec, loaded=loaded), FP32)
    found = report.first_divergence
    assert not report.passed
    assert found is not None
    assert found.stream == 2  # the second pair of streams is the first that needs a reset
    session = fake_session(spec, loaded=loaded)
    session.step(np.ones((2, CHUNK), int))
    assert not compare(fake_trace(streams=2), session, FP32).passed


def test_slightly_wrong_feedback_shows_in_the_free_run_alone() -> None:
    def after(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
        state["0.bank"] *= 1 + 6e-6

    report = compare(fake_trace(streams=8), fake_session(after=after), FP32)
    assert 0 < report.one_step.max < FP32.one_step_p99
    assert report.free_run.p99 > FP32.free_run_p99
    assert report.gain is not None
    assert report.gain.ratio > 3
    assert report.gain.tensor == "0.bank"
    assert report.drift is not None
    assert report.drift.exponent > 0.2
    assert all("one-step" not in failure for failure in report.failures)
    assert any("free-run" in failure for failure in report.failures)


@pytest.mark.parametrize("names", [("0.bank",), ("0.tail", "1.tail"), ("1.value",)])
def test_a_real_target_with_state_in_half_precision_fails(bundle: Bundle, names: tuple[str, ...]) -> None:
    spec = bundle.manifest.spec
    files = {entry.name: bundle.path / "graphs" / f"{entry.name}.onnx" for entry in spec.entries}
    runtime = HalfState(load(files, spec, "cpu", 1), names)
    with Session(runtime, spec, bundle.state_init(), bundle.manifest.fingerprint, "onnxruntime") as session:
        report = compare(bundle.trace().first(16), session, FP32)
    assert not report.passed
    assert report.free_run.p99 > FP32.free_run_p99
    assert all(report.per_tensor[name]["one_step_p99"] > FP32.one_step_p99 for name in names)


# -- in pieces --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoiled", "after", "message"),
    [
        ("decode", decode_off, r"error p99 of outputs in split calls is 0\.001, the budget 0\.0001"),
        ("decode", decode_forgets, r"error p99 of (0\.bank|outputs) in split calls is"),
        ("commit", commit_forgets, r"error p99 of 0\.written in split calls is"),
        ("decode", counter, "entries of masks or counters differ"),
    ],
)
def test_a_dishonest_decode_or_commit_fails_although_the_step_is_right(
    spoiled: str, after: After, message: str
) -> None:
    report = compare(fake_trace(), fake_session(after=after, spoiled=spoiled), FP32)
    assert (report.one_step.max, report.free_run.max) == (0.0, 0.0)
    with pytest.raises(ParityError, match=message):
        report.require()


def test_decode_and_step_take_turns_in_the_split_run() -> None:
    spec = fake_spec()
    runtime = FakeRuntime(spec)
    session = Session(runtime, spec, fake_initial(spec), "f" * 64, "fake")
    trace = fake_trace(streams=2, steps=8)
    compare(trace, session, FP32).require()
    decoded = [*["decode"] * CHUNK, "commit"]
    assert runtime.called[8 + len(trace.sampled) :] == [
        *decoded,
        "step",
        *decoded,
        "step",
        *["step"] * (SPLIT_STEPS + 1),
    ]


def test_a_trace_with_partial_chunks_is_split_too() -> None:
    trace = fake_trace(streams=2, steps=1)
    session, valid = fake_session(), np.array([[3], [1]])
    outputs = session.step(trace.inputs["tokens"][:, 0], valid[:, 0])["outputs"]
    partial = replace(
        with_output(trace, outputs[:, None]),
        inputs={**trace.inputs, "valid": valid},
        after={name: value[:, None] for name, value in session.read_state().items()},
    )
    compare(partial, fake_session(), FP32).require()
    report = compare(partial, fake_session(after=decode_off, spoiled="decode"), FP32)
    assert any("in split calls" in failure for failure in report.failures)


def test_an_artifact_that_only_steps_has_no_split_run() -> None:
    report = compare(fake_trace(), fake_session(fake_spec(entries=("step",))), FP32)
    report.require()
    assert report.split is None
    assert report.to_json()["split"] is None
