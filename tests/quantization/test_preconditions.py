from __future__ import annotations

import numpy as np
import pytest

from nsm.errors import InputError, UnsupportedError
from nsm.quantization.policy import LONGEST, POLICIES, SMALLEST
from nsm.quantization.preconditions import (
    MAX_STEPS,
    MIN_CALLS,
    check_bounded,
    check_enough,
    check_recurrent,
    check_trace,
    size_of,
)
from nsm.trace import Array, Arrays, Trace

LENGTH = 4


def of_calls(*calls: int) -> list[Array]:
    """A sequence of so many calls and a bit each."""
    return [np.zeros(count * LENGTH + 3, int) for count in calls]


# -- sequences to calibrate on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "calls", [[MIN_CALLS], [MIN_CALLS // 2] * 2, [2] * (MIN_CALLS // 2), [2, *[1] * (MIN_CALLS - 2)]]
)
def test_enough_is_enough_however_it_is_cut(calls: list[int]) -> None:
    check_enough(of_calls(*calls), LENGTH)


@pytest.mark.parametrize(
    ("calls", "given"),
    [
        ([], (0, 0, 0)),
        ([1], (1, 1, 1)),
        ([MIN_CALLS - 1], (1, MIN_CALLS - 1, MIN_CALLS - 1)),
        ([0, 3, 5], (3, 8, 5)),
        ([1] * 100, (100, 100, 1)),
    ],
)
def test_too_little_is_refused_with_what_was_given_and_what_is_needed(
    calls: list[int], given: tuple[int, int, int]
) -> None:
    message = f"at least {MIN_CALLS} calls of {LENGTH} tokens in all, and a sequence of two calls or more, .*"
    found = "Given sequences: {}, calls: {}, in the longest: {}\\. Give more or longer".format(*given)
    with pytest.raises(InputError, match=message + found):
        check_enough(of_calls(*calls), LENGTH)


# -- states that explode ---------------------------------------------------------------------------------------------


def grown(factor: float, steps: int, others: float = 0.0) -> Trace:
    """A trace of two streams whose state is multiplied by `factor` in every call, beside one that stays."""
    sampled = np.unique(np.geomspace(1, steps, 16).round().astype(int) - 1)
    before = np.full((2, 3), 0.1) * factor ** sampled[:, None, None]
    kept = np.full((2, len(sampled), 3), others, np.float32)

    def states(bank: Array) -> Arrays:
        return {"bank": bank.swapaxes(0, 1).astype(np.float32), "still": kept}

    empty: Array = np.empty(0, np.int64)
    inputs = {"tokens": np.zeros((2, steps, 1))}
    return Trace(inputs, {}, empty, sampled, states(before), states(before * factor), "", "recorded")


@pytest.mark.parametrize("steps", [64, 200])
def test_a_trace_whose_states_explode_is_refused(steps: int) -> None:
    with pytest.raises(
        UnsupportedError, match=r"states explode: .* grows from .* within \d+ calls of the model in fp32"
    ):
        check_trace(grown(1.1, steps))


@pytest.mark.parametrize(
    ("factor", "steps", "others"), [(1.0, 200, 0.0), (1.01, 200, 0.0), (0.9, 64, 0.0), (1.1, 64, 9.0)]
)
def test_a_trace_whose_states_settle_or_matter_little_is_fine(factor: float, steps: int, others: float) -> None:
    check_trace(grown(factor, steps, others))


def test_of_a_long_trace_the_beginning_is_looked_at() -> None:
    """A stream may double its state over thousands of calls."""
    assert 1.005**MAX_STEPS < 30 < 1.005**4096
    check_trace(grown(1.005, 4096))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_state_that_begins_at_zero_does_not_explode(steps: int) -> None:
    check_bounded([0.0, *[0.3] * steps], steps)


def test_the_largest_state_is_the_size_and_counters_are_none() -> None:
    state = {"a": np.array([3.0, 4.0]), "b": np.array([1.0]), "count": np.array([99]), "none": np.empty((2, 0))}
    assert size_of(state) == pytest.approx(12.5**0.5)
    assert size_of({"count": np.array([99])}) == 0.0


# -- weights inside of recurrent operators ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "precision", "largest", "length", "take"),
    [
        ("openvino", "int8", {"LSTM": SMALLEST}, 16, "Take --precision fp16, or --precision bf16, or --target onnxr"),
        ("openvino", "int8-weights", {"GRU": SMALLEST, "": SMALLEST - 1}, 1, "Take --precision fp16"),
        ("onnxruntime", "int8-weights", {"RNN": SMALLEST}, 16, "Take --target onnxruntime --precision int8, or keep"),
        ("tensorrt", "fp16", {"GRU": SMALLEST, "LSTM": SMALLEST}, 16, "inside of GRU and LSTM operators"),
        (
            "onnxruntime",
            "int8",
            {"GRU": SMALLEST},
            LONGEST + 1,
            f"{LONGEST} tokens; given 17. Take --tokens-per-call 16",
        ),
    ],
)
def test_low_precision_that_reaches_no_weight_is_refused(
    target: str, precision: str, largest: dict[str, int], length: int, take: str
) -> None:
    with pytest.raises(UnsupportedError, match="large weights of this model are all inside of") as caught:
        check_recurrent(largest, target, precision, POLICIES[target, precision], length)
    assert take in str(caught.value)
    assert str(caught.value).endswith("or keep fp32.")


@pytest.mark.parametrize(
    ("target", "precision", "largest", "length"),
    [
        ("openvino", "int8", {"LSTM": 10 * SMALLEST, "": SMALLEST}, 16),
        ("openvino", "int8", {"LSTM": SMALLEST - 1}, 16),  # too small in any operator, which is told later
        ("openvino", "int8", {}, 16),
        ("openvino", "fp16", {"LSTM": SMALLEST}, 16),
        ("onnxruntime", "int8", {"LSTM": SMALLEST}, 1000),
        ("mobile", "int8", {"GRU": SMALLEST}, LONGEST),
    ],
)
def test_low_precision_that_reaches_weights_is_not(
    target: str, precision: str, largest: dict[str, int], length: int
) -> None:
    check_recurrent(largest, target, precision, POLICIES[target, precision], length)
