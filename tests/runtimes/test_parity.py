from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nsm.bundle import Bundle
from nsm.errors import InputError, ParityError
from nsm.runtimes.base import Runtime, State
from nsm.runtimes.budgets import BUDGETS, Budget, find_budget
from nsm.runtimes.measures import kl_divergence, quantile, relative_error, rms_norm, slot_errors
from nsm.runtimes.onnxruntime import load
from nsm.runtimes.opening import open_bundle
from nsm.runtimes.parity import SPLIT_STEPS, compare
from nsm.runtimes.session import Session
from nsm.trace import Array, Arrays, Trace
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
    assert (report.argmax_agreement, report.unexcused_flips, report.mask_mismatches) == (1.0, 0, 0)
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
    total = 2 * 8 + 2 * len(trace.sampled) + SPLIT_STEPS
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


def _late(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    if calls > 30:
        outputs["outputs"] *= 1 + 1e-3


def _frozen(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    state.update(before)


def _unread_state(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    state["0.written"] *= 1 + 1e-3


def _bank_of_a_slot_that_is_off(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    state["0.bank"][:, -1] += 1.0


def _mask(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    state["0.mask"][:, 0] ^= True


def _counter(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    state["lane.count"] += 1


def _zeros(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    outputs["outputs"][...] = 0


def _swapped_lanes(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    outputs["outputs"] = outputs["outputs"][::-1].copy()


def _nan_output(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    if calls == 40:
        outputs["outputs"][1, 0, 0] = np.nan


def _nan_state(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    if calls == 64:
        state["0.written"][0, 0] = np.nan


def _infinite_state(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    state["0.written"][0, 0] = np.inf


def _half_state(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    state["0.bank"] = state["0.bank"].astype(np.float16).astype(np.float32)


DISHONEST: Mapping[str, tuple[After, str]] = {
    "outputs off after step 30": (_late, r"free-run error p99 of outputs is 0\.001, the budget 0\.0001"),
    "state never changes": (_frozen, r"one-step error p99 of"),
    "state off that nothing reads": (_unread_state, r"one-step error p99 of 0\.written is 0\.001"),
    "slot off that is switched off": (_bank_of_a_slot_that_is_off, r"error p99 of 0\.bank"),
    "mask flipped": (_mask, r"entries of masks or counters differ"),
    "counter off": (_counter, r"entries of masks or counters differ"),
    "outputs zero": (_zeros, r"error p99 of outputs is 1, "),
    "lanes swapped": (_swapped_lanes, r"error p99 of outputs"),
    "NaN in an output": (_nan_output, r"NaN or infinity \(The output outputs .* on lanes \[1\]"),
    "NaN in a state": (_nan_state, r"0\.written|NaN"),
    "infinity in a state": (_infinite_state, r"0\.written|NaN"),
    "state in half precision": (_half_state, r"error p99 of 0\.bank"),
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


def test_the_first_divergence_is_named() -> None:
    report = compare(fake_trace(), fake_session(after=_late), FP32)
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
    found = compare(fake_trace(), fake_session(after=_unread_state), FP32).first_divergence
    assert found is not None
    assert (found.stream, found.step, found.tensor) == (0, 0, "0.written")


def test_a_flipped_mask_is_counted_entry_by_entry() -> None:
    trace = fake_trace(streams=2, steps=1)
    report = compare(trace, fake_session(after=_mask), FP32)
    assert report.mask_mismatches == 2 * 2  # two lanes, in the free run and in the single step


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
    assert report.to_json()["gain"] > 3
    assert report.drift is not None
    assert report.drift.exponent > 0.3
    assert all("one-step" not in failure for failure in report.failures)
    assert any("free-run" in failure for failure in report.failures)


class HalfState:
    """A real runtime whose banks are rounded to half precision after every call."""

    def __init__(self, inner: Runtime, names: tuple[str, ...]) -> None:
        self.effective_precision = inner.effective_precision
        self.load_state, self.read_state, self.close = inner.load_state, inner.read_state, inner.close
        self.finite = inner.finite
        self._inner, self._names = inner, names

    def call(self, entry: str, inputs: Mapping[str, Array], state: State) -> tuple[Arrays, State]:
        outputs, state = self._inner.call(entry, inputs, state)
        arrays = self._inner.read_state(state)
        rounded = {name: arrays[name].astype(np.float16).astype(np.float32) for name in self._names}
        return outputs, self._inner.load_state({**arrays, **rounded})


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


def _decode_off(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    outputs["outputs"] *= 1 + 1e-3


def _decode_forgets(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    state["0.bank"][...] = before["0.bank"]


def _commit_forgets(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
    state["0.written"][...] = before["0.written"]


@pytest.mark.parametrize(
    ("spoiled", "after", "message"),
    [
        ("decode", _decode_off, r"error p99 of outputs in split calls is 0\.001, the budget 0\.0001"),
        ("decode", _decode_forgets, r"error p99 of (0\.bank|outputs) in split calls is"),
        ("commit", _commit_forgets, r"error p99 of 0\.written in split calls is"),
        ("decode", _counter, "entries of masks or counters differ"),
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
    assert runtime.called[8 + len(trace.sampled) :] == [*decoded, "step", *decoded, "step"]


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
    report = compare(partial, fake_session(after=_decode_off, spoiled="decode"), FP32)
    assert any("in split calls" in failure for failure in report.failures)


def test_an_artifact_that_only_steps_has_no_split_run() -> None:
    report = compare(fake_trace(), fake_session(fake_spec(entries=("step",))), FP32)
    report.require()
    assert report.split is None
    assert report.to_json()["split"] is None


# -- nothing compared ---------------------------------------------------------------------------------------------


def test_a_state_that_never_changes_proves_nothing() -> None:
    trace = fake_trace(streams=2, steps=2)
    start = {name: np.stack([value, value], 1) for name, value in fake_initial(fake_spec()).items()}
    answers = [fake_session().step(tokens)["outputs"] for tokens in np.swapaxes(trace.inputs["tokens"], 0, 1)]
    still = replace(with_output(trace, np.stack(answers, 1)), before=start, after=start)
    report = compare(still, fake_session(fake_spec(entries=("step",)), after=_frozen), FP32)
    assert report.failures == ("no state ever changed",)


def test_a_trace_of_a_graph_without_valid_is_refused_where_not_all_tokens_count() -> None:
    trace = fake_trace(streams=2, steps=2)
    partial = replace(trace, inputs={**trace.inputs, "valid": np.full((2, 2), CHUNK)})
    compare(partial, fake_session(), FP32).require()
    with pytest.raises(InputError, match=r"other inputs than the model: \['valid'\]"):
        compare(partial, fake_session(fake_spec(valid=False)), FP32)
    compare(trace, fake_session(fake_spec(valid=False)), FP32).require()


def test_a_trace_without_valid_tokens_proves_nothing() -> None:
    trace = fake_trace(streams=2, steps=2)
    report = compare(replace(trace, inputs={**trace.inputs, "valid": np.zeros((2, 2), np.int64)}), fake_session(), FP32)
    assert not report.passed
    assert "outputs was never compared (one_step)" in report.failures
    assert "outputs was never compared (free_run)" in report.failures
    assert any(failure.startswith("KL mean is nan") for failure in report.failures)
    json.dumps(report.to_json(), allow_nan=False)


def _empty(trace: Trace, what: str) -> Trace:
    if what == "streams":
        return replace(
            trace,
            inputs={name: value[:0] for name, value in trace.inputs.items()},
            outputs={name: value[:0] for name, value in trace.outputs.items()},
            before={name: value[:0] for name, value in trace.before.items()},
            after={name: value[:0] for name, value in trace.after.items()},
        )
    if what == "steps":
        return trace.first(0)
    if what == "positions":
        return replace(trace, positions=trace.positions[:0], outputs={"outputs": trace.outputs["outputs"][:, :, :0]})
    return replace(
        trace,
        sampled=trace.sampled[:0],
        before={name: value[:, :0] for name, value in trace.before.items()},
        after={name: value[:, :0] for name, value in trace.after.items()},
    )


@pytest.mark.parametrize("what", ["streams", "steps", "positions", "sampled states"])
def test_an_empty_trace_is_refused(what: str) -> None:
    with pytest.raises(InputError, match="The trace is empty: there is nothing to compare"):
        compare(_empty(fake_trace(steps=4), what), fake_session(), FP32)


def _without(arrays: Mapping[str, Array], name: str) -> Arrays:
    return {key: value for key, value in arrays.items() if key != name}


def _foreign(trace: Trace) -> Mapping[str, tuple[Trace, str]]:
    outputs, tokens = trace.outputs["outputs"], trace.inputs["tokens"]
    turned = {**trace.after, "0.bank": trace.after["0.bank"][..., :1]}
    return {
        "another model": (replace(trace, fingerprint="0" * 64), "recorded from another model"),
        "no state before": (replace(trace, before=_without(trace.before, "0.tail")), r"other states than the model"),
        "no state after": (replace(trace, after=_without(trace.after, "0.tail")), r"other states .*\['0\.tail'\]"),
        "a state too many": (
            replace(trace, before={**trace.before, "x": outputs}, after={**trace.after, "x": outputs}),
            r"other states than the model: \['x'\]",
        ),
        "no output": (replace(trace, outputs={}), r"other outputs than the model: \['outputs'\]"),
        "an output too many": (replace(trace, outputs={**trace.outputs, "y": outputs}), r"other outputs .*\['y'\]"),
        "no inputs": (replace(trace, inputs={}), "tokens"),
        "an input too many": (replace(trace, inputs={**trace.inputs, "y": tokens}), "y"),
        "longer calls": (replace(trace, inputs={**trace.inputs, "tokens": np.tile(tokens, 2)}), "tokens"),
        "fewer steps of outputs": (with_output(trace, outputs[:, :-1]), "outputs"),
        "more steps of outputs": (with_output(trace, np.tile(outputs, (1, 2, 1, 1))), "outputs"),
        "fewer streams of outputs": (with_output(trace, outputs[:-1]), "outputs"),
        "narrower outputs": (with_output(trace, outputs[..., :1]), "outputs"),
        "positions outside the call": (replace(trace, positions=trace.positions + 1), "positions"),
        "a step outside the trace": (replace(trace, sampled=trace.sampled + trace.steps), "step"),
        "narrower states": (replace(trace, after=turned), r"0\.bank"),
    }


@pytest.mark.parametrize("what", list(_foreign(fake_trace(streams=2, steps=2))))
def test_a_trace_that_does_not_fit_the_session_is_refused(what: str) -> None:
    trace, message = _foreign(fake_trace(streams=2, steps=2))[what]
    with pytest.raises(InputError, match=message):
        compare(trace, fake_session(), FP32)


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


# -- the report ---------------------------------------------------------------------------------------------------

KEYS = {
    "target": (),
    "precision": (),
    "status": (),
    "streams": (),
    "steps": (),
    "one_step": ("p50", "p99", "max"),
    "free_run": ("p50", "p99", "max"),
    "split": ("p50", "p99", "max"),
    "drift_exponent": (),
    "state_error": ("p99", "max"),
    "argmax_agreement": (),
    "unexcused_flips": (),
    "kl": ("mean", "p999"),
    "mask_mismatches": (),
    "first_divergence": (),
    "budget": (),
}


@pytest.mark.parametrize("after", [None, _nan_output, _infinite_state, _late], ids=["honest", "NaN", "inf", "late"])
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


def test_the_json_says_where_the_first_divergence_is() -> None:
    data = compare(fake_trace(), fake_session(after=_late), FP32).to_json()
    assert {"stream": 0, "step": 30, "tensor": "outputs"}.items() <= data["first_divergence"].items()


def test_the_json_holds_the_drift_and_its_interval() -> None:
    def after(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
        outputs["outputs"] *= 1 + 1e-7 * calls

    data = compare(fake_trace(streams=8), fake_session(after=after), FP32).to_json()
    low, high = data["drift_interval"]
    assert low <= data["drift_exponent"] <= high
    assert data["drift_exponent"] == pytest.approx(1.0, abs=0.3)


def test_the_state_error_is_that_of_the_active_slots() -> None:
    report = compare(fake_trace(), fake_session(after=_bank_of_a_slot_that_is_off), FP32)
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

    session = Session(Renamed(spec, _half_state), renamed, rename(fake_initial(spec)), "f" * 64, "fake")
    report = compare(replace(trace, before=rename(trace.before), after=rename(trace.after)), session, FP32)
    assert report.state_error_max == pytest.approx(report.per_tensor["0.memory"]["free_run_p99"])
    assert report.state_error_max > 0


# -- budgets and measures -----------------------------------------------------------------------------------------


def test_a_precision_without_a_budget_is_refused() -> None:
    with pytest.raises(InputError, match=r"no parity budget for precision 'fp8'; there is one for: fp32"):
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
