"""How the forms are written: what a graph in low precision holds, and what backends make of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from nsm.bundle import Bundle
from nsm.quantization import rewrite
from nsm.quantization.calibration_data import Asymmetric
from nsm.quantization.linear_ops import linear_ops_of
from nsm.trace import Arrays
from tests.quantization.graphs import FAST, chosen, compiled, constants, count, feeds, four_products, run, weights

ALL = pytest.mark.parametrize("scheme", FAST)


def check(model: onnx.ModelProto, scheme: str) -> None:
    """The checker knows the ONNX standard alone, and `blocked` uses an operator of ONNX Runtime."""
    if scheme != "block-wise":
        onnx.checker.check_model(model, full_check=True)
    nodes = [node.name for node in model.graph.node]
    values = [name for node in model.graph.node for name in node.output]
    assert len(set(nodes)) == len(nodes)
    assert len(set(values)) == len(values)


@ALL
def test_the_graph_that_is_given_stays_as_it_was(scheme: str) -> None:
    model = four_products(weights())
    before = model.SerializeToString(deterministic=True)
    low = FAST[scheme](model, chosen(model))
    assert model.SerializeToString(deterministic=True) == before
    assert low.SerializeToString(deterministic=True) != before
    check(low, scheme)


@ALL
def test_inputs_and_outputs_keep_their_names_and_order(scheme: str) -> None:
    model = four_products(weights())
    low = FAST[scheme](model, chosen(model))
    assert list(low.graph.input) == list(model.graph.input)
    assert list(low.graph.output) == list(model.graph.output)
    assert [value.name for value in low.graph.output] == ["y", "w", "r"]


@ALL
def test_only_what_was_chosen_is_rewritten(scheme: str) -> None:
    model = four_products(weights())
    first, *others = linear_ops_of(model)
    low = FAST[scheme](model, [first])
    left = {item.node: item for item in linear_ops_of(low)}
    assert {name: left[name] for name in left if name != first.node} == {item.node: item for item in others}
    assert first.node not in left
    kept = {node.name: node for node in low.graph.node}
    assert all(kept[node.name] == node for node in model.graph.node if node.name != first.node)
    if scheme != "bf16":  # ONNX Runtime has no linear op in bf16 on the CPU
        outputs, plain = run(low, feeds()), run(model, feeds())
        np.testing.assert_array_equal(outputs["r"], plain["r"])
        assert np.abs(outputs["y"] - plain["y"]).max() > 1e-3


@ALL
def test_nothing_chosen_changes_nothing(scheme: str) -> None:
    model = four_products(weights())
    low = FAST[scheme](model, [])
    assert low.graph == model.graph


@ALL
def test_weights_that_nothing_reads_are_gone_and_the_others_are_there_once(scheme: str) -> None:
    model = four_products(weights())
    held = constants(FAST[scheme](model, chosen(model)))
    low = FAST[scheme](model, chosen(model))
    read = {name for node in low.graph.node for name in node.input}
    assert set(held) <= read
    assert not {"A", "B"} & set(held)
    np.testing.assert_array_equal(held["C"], weights()["C"])
    # A is a matrix of two linear ops, and stored once.
    sizes = Counter(value.shape for value in held.values() if value.ndim > 1)
    assert sizes == Counter([held["C"].shape, *[((8, 2, 16) if scheme == "block-wise" else (24, 8))] * 2])


def test_a_weight_that_one_product_keeps_in_float_stays() -> None:
    model = four_products(weights())
    held = constants(rewrite.weights_only(model, [item for item in linear_ops_of(model) if item.node == "one/MatMul"]))
    assert {"A", "A.int8", "A.scale"} <= set(held)


@pytest.mark.parametrize(
    ("scheme", "kinds"),
    [
        ("weight-only", {"DequantizeLinear": 2, "MatMul": 4}),
        ("dynamic", {"DynamicQuantizeLinear": 2, "MatMulInteger": 3, "MatMul": 1}),
        ("fp16", {"Cast": 2 + 3, "MatMul": 4}),
        ("block-wise", {"MatMulNBits": 3, "MatMul": 1}),
    ],
)
def test_what_products_share_is_made_once(scheme: str, kinds: dict[str, int]) -> None:
    model = four_products(weights())
    low = FAST[scheme](model, chosen(model))
    assert {kind: count(low, kind) for kind in kinds} == kinds


@pytest.mark.parametrize(("other", "pairs"), [(0.02, 2), (0.03, 3)])
def test_an_activation_is_quantised_once_for_each_scale(other: float, pairs: int) -> None:
    model = four_products(weights())
    keys = {linear_op.weight: linear_op.key for linear_op in linear_ops_of(model)}
    low = rewrite.static(model, chosen(model), {keys["A"]: 0.02, keys["B"]: other})
    assert count(low, "QuantizeLinear") == pairs
    assert count(low, "DequantizeLinear") == pairs + 2
    check(low, "static")


# -- a real graph ----------------------------------------------------------------------------------------------------


def first_call(exported: Path) -> Arrays:
    bundle = Bundle(exported)
    entry, initial = bundle.manifest.spec.entry("step"), bundle.state_init()
    tokens = np.random.default_rng(0).integers(0, 20, entry.inputs[0].shape)
    given: Arrays = {"tokens": tokens, "valid": np.full(2, tokens.shape[1])}
    return given | {state.past: initial[state.name] for state in bundle.manifest.spec.states_of(entry.reads)}


@ALL
@pytest.mark.parametrize("entry", ["step", "decode", "commit"])
def test_every_entry_of_a_bundle_takes_every_form(scheme: str, entry: str, exported: Path) -> None:
    model = onnx.load(str(exported / "graphs" / f"{entry}.onnx"))
    linear_ops = linear_ops_of(model)
    if scheme == "static":
        low = rewrite.static(
            model, linear_ops, dict.fromkeys([item.key for item in linear_ops], 0.05), saturation_safe=True
        )
    elif scheme == "dynamic":
        low = rewrite.dynamic(model, linear_ops, saturation_safe=True)
    else:
        low = FAST[scheme](model, linear_ops)
    check(low, scheme)
    assert linear_ops_of(low) == []
    assert [value.name for value in low.graph.input] == [value.name for value in model.graph.input]
    assert [value.name for value in low.graph.output] == [value.name for value in model.graph.output]
    if entry == "step" and scheme != "bf16":  # ONNX Runtime has no linear op in bf16 on the CPU
        given = first_call(exported)
        outputs, plain = run(low, given)["outputs"], run(model, given)["outputs"]
        assert 0 < np.abs(outputs - plain).max() < 0.2 * np.abs(plain).max()


def fully_connected(model: onnx.ModelProto) -> list[str]:
    """What OpenVINO computes the linear ops with constant matrices in."""
    found = []
    for operation in compiled(model).get_runtime_model().get_ops():
        info = operation.get_rt_info()
        if info["layerType"].astype(str) == "FullyConnected":
            found.append(info["runtimePrecision"].astype(str))
    return found


def test_openvino_computes_static_products_in_int8(exported: Path) -> None:
    model = onnx.load(str(exported / "graphs" / "step.onnx"))
    linear_ops = linear_ops_of(model)
    assert fully_connected(model) == ["f32"] * len(linear_ops)
    scales = dict.fromkeys([item.key for item in linear_ops], 0.05)
    low = rewrite.static(model, linear_ops[:4], scales)
    assert sorted(fully_connected(low)) == ["f32"] * (len(linear_ops) - 4) + ["i8"] * 4


def test_openvino_computes_unsigned_products_in_bytes_too() -> None:
    """Otherwise a zero point would turn them back into fp32 without a word."""
    model = four_products(weights())
    scales = {linear_op.key: 0.02 for linear_op in linear_ops_of(model)}
    asymmetric = {linear_op.key: Asymmetric(1 / 64, 37) for linear_op in chosen(model)}
    low = rewrite.static(model, chosen(model), scales, asymmetric=asymmetric)
    found = fully_connected(low)
    assert len(found) == 4
    assert found.count("f32") == 1
    results, wanted = compiled(low)(feeds()), run(low, feeds())
    for name, value in wanted.items():
        np.testing.assert_allclose(results[name], value, rtol=1e-4, atol=1e-3, err_msg=name)


def test_openvino_gives_what_onnxruntime_gives() -> None:
    model = four_products(weights())
    low = FAST["static"](model, chosen(model))
    results, wanted = compiled(low)(feeds()), run(low, feeds())
    for name, value in wanted.items():
        np.testing.assert_allclose(results[name], value, rtol=1e-4, atol=1e-3, err_msg=name)
    assert fully_connected(low).count("i8") == 3
