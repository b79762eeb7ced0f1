from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from nsm.errors import InputError
from nsm.runtimes.parity.budgets import find_budget
from nsm.runtimes.parity.comparison import compare
from nsm.trace import Array, Arrays, Trace
from tests.runtimes.fake import (
    CHUNK,
    fake_initial,
    fake_session,
    fake_spec,
    fake_trace,
    with_output,
)
from tests.runtimes.spoilers import (
    frozen,
)

FP32 = find_budget("fp32")


# -- nothing compared ---------------------------------------------------------------------------------------------


def test_a_state_that_never_changes_proves_nothing() -> None:
    trace = fake_trace(streams=2, steps=2)
    start = {name: np.stack([value, value], 1) for name, value in fake_initial(fake_spec()).items()}
    answers = [fake_session().step(tokens)["outputs"] for tokens in np.swapaxes(trace.inputs["tokens"], 0, 1)]
    still = replace(with_output(trace, np.stack(answers, 1)), before=start, after=start)
    report = compare(still, fake_session(fake_spec(entries=("step",)), after=frozen), FP32)
    assert report.failures == ("no state ever changed",)


def test_a_trace_of_a_graph_without_valid_is_refused_where_not_all_tokens_count() -> None:
    trace = fake_trace(streams=2, steps=2)
    partial = replace(trace, inputs={**trace.inputs, "valid": np.full((2, 2), CHUNK)})
    compare(partial, fake_session(), FP32).require()
    with pytest.raises(InputError, match=r"different inputs: \['valid'\]"):
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
        "no state before": (replace(trace, before=_without(trace.before, "0.tail")), r"different states"),
        "no state after": (replace(trace, after=_without(trace.after, "0.tail")), r"different states.*\['0\.tail'\]"),
        "a state too many": (
            replace(trace, before={**trace.before, "x": outputs}, after={**trace.after, "x": outputs}),
            r"different states: \['x'\]",
        ),
        "no output": (replace(trace, outputs={}), r"different outputs: \['outputs'\]"),
        "an output too many": (replace(trace, outputs={**trace.outputs, "y": outputs}), r"different outputs.*\['y'\]"),
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
