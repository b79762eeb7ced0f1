from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from nsm.quantization import rewrite
from nsm.quantization.calibration_data import Asymmetric
from nsm.quantization.linear_ops import linear_ops_of
from nsm.quantization.policy import LEVELS, SAFE_SUM
from nsm.quantization.rewrite import quantised_weight
from nsm.trace import Array
from tests.quantization.graphs import (
    BLOCK,
    DEPTH,
    LANES,
    SCALES,
    TOKENS,
    WIDTH,
    Fast,
    blocked,
    chosen,
    compiled,
    constants,
    feeds,
    four_products,
    largest_pair,
    make_graph,
    product_node,
    run,
    slow_int8,
    static,
    weights,
)

Slow = Callable[[Array, Array, str], Array]
"""(activations, weight, name of the weight) -> their linear op."""


# -- a matrix --------------------------------------------------------------------------------------------------------

MATRICES = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
    elements=st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-1, 1, width=32),
)


@given(MATRICES)
@example(np.full((2, 1), 300 * 2.0**-149, np.float32))  # its scale has hardly a digit
def test_a_weight_is_off_by_half_a_scale_at_most(weight: Array) -> None:
    levels, scale = quantised_weight(weight)
    assert levels.dtype == np.int8
    assert scale.dtype == np.float32
    assert (levels.shape, scale.shape) == (weight.shape, weight.shape[1:])
    assert np.all(scale > 0)
    assert levels.min() >= -127
    error = np.abs(weight.astype(np.float64) - levels * scale.astype(np.float64))
    assert np.all(error <= scale * (0.5 + 1e-4))  # the division is rounded too
    used = np.abs(levels).max(0)
    assert np.all((used == 127) | (np.abs(weight).max(0) < 1e-35))  # the range is used to its end


@given(MATRICES)
def test_the_range_is_symmetric(weight: Array) -> None:
    (levels, scale), (mirrored, same) = quantised_weight(weight), quantised_weight(-weight)
    np.testing.assert_array_equal(mirrored, -levels)
    np.testing.assert_array_equal(same, scale)


@given(MATRICES)
def test_neighbours_of_a_saturation_safe_matrix_do_not_add_up_to_more_than_is_safe(weight: Array) -> None:
    levels, scale = quantised_weight(weight, saturation_safe=True)
    free, finer = quantised_weight(weight)
    assert largest_pair(levels) <= SAFE_SUM
    assert np.all((finer <= scale) & (scale <= 2 * finer * (1 + 1e-6)) | (scale == 1.0))
    error = np.abs(weight.astype(np.float64) - levels * scale.astype(np.float64))
    assert np.all(error <= scale * (0.5 + 1e-4))
    for column in range(weight.shape[1]):  # one that is safe as it is stays as it is
        if largest_pair(free[:, [column]]) < LEVELS:
            np.testing.assert_array_equal(levels[:, column], free[:, column])


def test_it_is_what_counting_by_hand_gives() -> None:
    weight = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    weight[:, 2] = 0.0
    levels, scale = quantised_weight(weight)
    wanted, scales = slow_int8(weight)
    np.testing.assert_array_equal(levels, wanted)
    np.testing.assert_array_equal(scale, scales)
    assert not levels[:, 2].any()
    assert scale[2] == 1.0


# -- the forms, on a graph with linear ops that share ------------------------------------------------------------------


def slow_weights(x: Array, weight: Array, name: str) -> Array:
    levels, scales = slow_int8(weight)
    return np.asarray(x.astype(np.float64) @ (levels * scales))


def slow_static(x: Array, weight: Array, name: str) -> Array:
    levels = np.clip(np.rint(x / SCALES[name]), -128, 127)
    return slow_weights(levels * SCALES[name], weight, name)


def slow_dynamic(x: Array, weight: Array, name: str) -> Array:
    """DynamicQuantizeLinear as the ONNX standard defines it, then a linear op of integers."""
    least, largest = min(np.float32(0), x.min()), max(np.float32(0), x.max())
    scale = np.float32((largest - least) / np.float32(255))
    zero = np.clip(np.rint(-least / scale), 0, 255)
    levels = np.clip(np.rint(x / scale) + zero, 0, 255)
    integers, scales = slow_int8(weight)
    return np.asarray((levels - zero).astype(np.int64) @ integers.astype(np.int64) * float(scale) * scales)


def slow_blocked(x: Array, weight: Array, name: str) -> Array:
    total = np.zeros((*x.shape[:-1], weight.shape[1]))
    for first in range(0, len(weight), BLOCK):
        total += slow_weights(x[..., first : first + BLOCK], weight[first : first + BLOCK], name)
    return total


SCHEMES: Mapping[str, tuple[Fast, Slow]] = {
    "weight-only": (rewrite.weights_only, slow_weights),
    "static": (static, slow_static),
    "dynamic": (rewrite.dynamic, slow_dynamic),
    "block-wise": (blocked, slow_blocked),
}


# Fused, ONNX Runtime quantizes the activations of weights-only linear ops as well, so there it is run as written.
@pytest.mark.parametrize(
    ("scheme", "optimise"),
    [(scheme, False) for scheme in SCHEMES] + [(scheme, True) for scheme in SCHEMES if scheme != "weight-only"],
)
def test_a_form_computes_what_it_says(scheme: str, optimise: bool) -> None:
    fast, slow = SCHEMES[scheme]
    given, numbers = feeds(), weights()
    model = four_products(numbers)
    outputs = run(fast(model, chosen(model)), given, optimise)
    x, z = given["x"], given["z"]
    wanted = {"y": slow(x, numbers["A"], "A") + slow(x, numbers["B"], "B"), "r": slow(z, numbers["A"], "A")}
    wanted["w"] = wanted["y"] @ numbers["C"]
    for name, value in wanted.items():
        np.testing.assert_allclose(outputs[name], value, rtol=1e-5, atol=1e-4, err_msg=name)
    plain = run(model, given)
    assert all(np.abs(outputs[name] - plain[name]).max() > 1e-3 for name in plain)  # not the linear op in fp32


def test_the_slow_forms_differ_from_each_other() -> None:
    x, weight = feeds()["x"], weights()["A"]
    results = [slow(x, weight, "A") for _, slow in SCHEMES.values()]
    for first in range(len(results)):
        for second in range(first):
            assert np.abs(results[first] - results[second]).max() > 1e-3


def test_static_rounds_to_even_and_clips() -> None:
    scale = 0.25
    halves = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 900.0, -127.5, -128.5, -900.0]], np.float32)
    size = halves.shape[1]
    model = make_graph(
        [product_node("a", "x", "w", "y")], {"x": [1, size]}, {"y": [1, size]}, {"w": np.eye(size, dtype=np.float32)}
    )
    (linear_op,) = linear_ops_of(model)
    low = rewrite.static(model, [linear_op], {linear_op.key: scale})
    wanted = np.array([[0, 2, 2, 0, -2, 126, 127, 127, -128, -128, -128]]) * scale
    for optimise in (False, True):
        np.testing.assert_allclose(run(low, {"x": halves * scale}, optimise)["y"], wanted, rtol=1e-6)


@pytest.mark.parametrize("optimise", [False, True])
def test_unsigned_activations_are_what_their_zero_point_says(optimise: bool) -> None:
    """Those of one linear op, next to another that reads the same numbers as int8."""
    numbers, given = weights(), feeds()
    model = four_products(numbers)
    keys = {linear_op.weight: linear_op.key for linear_op in linear_ops_of(model)}
    scale, zero = 3 / 160, 37  # no number of the feeds lies half way between two levels
    scales = {keys[name]: float(SCALES[name]) for name in "AB"}
    low = rewrite.static(model, chosen(model), scales, asymmetric={keys["A"]: Asymmetric(scale, zero)})
    outputs = run(low, given, optimise)

    def linear_op(x: Array) -> Array:
        levels = np.clip(np.rint(x / np.float32(scale)) + zero, 0, 255) - zero
        return slow_weights(levels * np.float32(scale), numbers["A"], "A")

    y = linear_op(given["x"]) + slow_static(given["x"], numbers["B"], "B")
    np.testing.assert_allclose(outputs["y"], y, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(outputs["r"], linear_op(given["z"]), rtol=1e-5, atol=1e-4)


def test_dynamic_gives_zero_for_a_state_of_zeros() -> None:
    model = four_products(weights())
    zeros = {name: np.zeros_like(value) for name, value in feeds().items()}
    for optimise in (False, True):
        outputs = run(rewrite.dynamic(model, linear_ops_of(model)), zeros, optimise)
        assert not any(value.any() for value in outputs.values())


def test_blocked_stays_within_half_a_level_of_the_activations_of_a_block() -> None:
    numbers = weights()
    model = four_products(numbers)
    x = np.random.default_rng(5).standard_normal((LANES, TOKENS, DEPTH)).astype(np.float32)
    output = run(blocked(model, chosen(model)), {"x": x, "z": x})["r"]
    wanted, bound = slow_blocked(x, numbers["A"], "A"), np.zeros((LANES, TOKENS, WIDTH))
    for first in range(0, DEPTH, BLOCK):
        largest = np.abs(x[..., first : first + BLOCK]).max(-1, keepdims=True)
        bound += 0.5 * largest / 127 * np.abs(numbers["A"][first : first + BLOCK]).sum(0) * 1.01
    assert np.all(np.abs(output - wanted) <= bound)


def test_blocked_pads_a_depth_that_is_no_multiple_of_the_block() -> None:
    model = four_products(weights())
    low = blocked(model, chosen(model))
    held = constants(low)
    assert held["A.blocks"].shape == (WIDTH, 2, BLOCK)
    assert held["A.blocks"].dtype == np.uint8
    assert np.all(held["A.blocks"][:, 1, DEPTH - BLOCK :] == 128)  # zero, without a sign
    assert held["A.scales"].shape == (WIDTH * 2,)
    (node, *_) = (node for node in low.graph.node if node.op_type == "MatMulNBits")
    attributes = {item.name: item.i for item in node.attribute}
    # The accuracy level is what asks for the fast kernel, over activations in int8.
    assert attributes == {"K": DEPTH, "N": WIDTH, "bits": 8, "block_size": BLOCK, "accuracy_level": 4}


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_half_rounds_activations_and_weights_and_nothing_else(kind: int) -> None:
    """Numbers close to small whole ones, which both kinds of half round to them, and whose sums are exact.

    ONNX Runtime has no such linear ops on the CPU: it leaves the casts of fp16 out, and refuses bf16.
    """
    random = np.random.default_rng(3)
    whole = {name: random.choice([-3, -2, -1, 1, 2, 3], (DEPTH, WIDTH)) for name in "AB"}
    whole |= {name: random.choice([-3, -2, -1, 1, 2, 3], (LANES, TOKENS, DEPTH)) for name in "xz"}
    close = {name: value.astype(np.float32) + np.float32(2.0**-13) for name, value in whole.items()}
    numbers = {"A": close["A"], "B": close["B"], "C": weights()["C"]}
    model = four_products(numbers)
    low = rewrite.half(model, chosen(model), kind)
    given = {name: close[name] for name in "xz"}
    exact = dict(zip("ywr", ReferenceEvaluator(low).run(None, given), strict=True))
    y, r = whole["x"] @ whole["A"] + whole["x"] @ whole["B"], whole["z"] @ whole["A"]
    np.testing.assert_array_equal(exact["y"], y)
    np.testing.assert_array_equal(exact["r"], r)
    np.testing.assert_allclose(exact["w"], y @ numbers["C"], rtol=1e-6, atol=1e-5)
    assert all(value.dtype == np.float32 for value in exact.values())
    assert np.abs(run(model, given)["r"] - r).max() > 1e-3
    results = compiled(low)(given)
    for name, value in exact.items():
        np.testing.assert_allclose(results[name], value, rtol=1e-3, atol=2e-2, err_msg=name)


@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(-(2.0**126), 2.0**126, width=32)))
@example(np.full((3, 4), 1 + 2.0**-8, np.float32))
@example(np.full((3, 4), 1 + 3 * 2.0**-8, np.float32))
def test_bf16_weights_are_the_nearest_with_ties_to_even(weight: Array) -> None:
    model = make_graph([product_node("a", "x", "w", "y")], {"x": [1, 3]}, {"y": [1, 4]}, {"w": weight})
    (tensor,) = rewrite.half(model, linear_ops_of(model), TensorProto.BFLOAT16).graph.initializer
    assert (tensor.name, tensor.data_type, list(tensor.dims)) == ("w.half", TensorProto.BFLOAT16, [3, 4])
    wanted = helper.make_tensor("w.half", TensorProto.BFLOAT16, weight.shape, weight.ravel())
    assert tensor.raw_data == np.array(wanted.int32_data, np.uint16).tobytes()
