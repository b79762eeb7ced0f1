from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from nsm.quantization.linear_ops import LinearOp, linear_ops_of, weight_key
from nsm.trace import Array
from tests.quantization.graphs import make_graph, product_node


def numbers(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def single(weight: Array, node: onnx.NodeProto | None = None) -> onnx.ModelProto:
    """x [2, 3, 4] and w, in one node."""
    return make_graph([node or product_node("a/MatMul", "x", "w", "y")], {"x": [2, 3, 4]}, {"y": []}, {"w": weight})


def test_a_product_with_a_constant_matrix_is_found_with_all_there_is_to_know() -> None:
    weight = numbers(4, 5)
    (found,) = linear_ops_of(single(weight))
    assert found == LinearOp("a/MatMul", "x", "w", (4, 5), weight_key(weight), largest=float(np.abs(weight).max()))
    assert found.size == 20


def test_they_come_in_the_order_of_the_graph() -> None:
    weights = {name: numbers(4, 4, seed=seed) for seed, name in enumerate("ba")}
    nodes = [product_node("late", "x", "b", "y"), product_node("early", "y", "a", "z")]
    found = linear_ops_of(make_graph(nodes, {"x": [2, 3, 4]}, {"z": [2, 3, 4]}, weights))
    assert [(item.node, item.activation, item.weight) for item in found] == [("late", "x", "b"), ("early", "y", "a")]


@pytest.mark.parametrize(
    "model",
    [
        single(numbers(2, 4, 5)),
        single(numbers(4)),
        single(numbers(4, 5).astype(np.float64)),
        single(np.ones((4, 5), np.int32)),
        single(numbers(3, 2), product_node("a/MatMul", "w", "x", "y")),
        single(numbers(4, 4), helper.make_node("Add", ["x", "w"], ["y"], "a/Add")),
        single(numbers(1), helper.make_node("Relu", ["x"], ["y"], "a/Relu")),
        make_graph([product_node("a/MatMul", "x", "z", "y")], {"x": [2, 4], "z": [4, 5]}, {"y": [2, 5]}, {}),
    ],
    ids=["batched", "vector", "double", "integer", "on the left", "sum", "one input", "two activations"],
)
def test_nothing_else_is_a_product(model: onnx.ModelProto) -> None:
    assert linear_ops_of(model) == []


def test_the_key_is_of_the_numbers() -> None:
    weight = numbers(4, 5)
    other = make_graph([product_node("b", "t", "v", "u")], {"t": [7, 4]}, {"u": [7, 5]}, {"v": weight.copy()})
    (first,), (second,) = linear_ops_of(single(weight)), linear_ops_of(other)
    assert first.key == second.key
    changed = weight.copy()
    changed[3, 4] = np.nextafter(changed[3, 4], np.float32(9))
    assert weight_key(changed) != first.key
    assert weight_key(np.asfortranarray(weight)) == first.key  # how they lie in memory is no matter
    assert weight_key(weight.T) != first.key


# -- a real bundle ---------------------------------------------------------------------------------------------------


def read(exported: Path, entry: str) -> tuple[onnx.ModelProto, list[LinearOp]]:
    model = onnx.load(str(exported / "graphs" / f"{entry}.onnx"))
    return model, [linear_op for linear_op in linear_ops_of(model) if not linear_op.sums]


def test_the_products_of_a_bundle_are_named_after_their_modules(exported: Path) -> None:
    model, found = read(exported, "step")
    modules = ["projection", "router.product", "attention.fuse", "feed_forward.0", "feed_forward.2"]
    wanted = [f"layers.{layer}.{module}/MatMul" for layer in (0, 1) for module in modules]
    assert [item.node for item in found] == [*wanted, "head.1/MatMul"]
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)  # they are found again by their names


def test_the_entries_of_a_bundle_share_keys_although_their_weights_have_other_names(exported: Path) -> None:
    (_, step), (_, decode) = read(exported, "step"), read(exported, "decode")
    assert {item.node: item.key for item in step} == {item.node: item.key for item in decode}
    assert len({item.key for item in step}) == len(step) == 11
    assert {item.weight for item in step} != {item.weight for item in decode}


def test_the_numbers_of_a_bundle_are_those_of_the_model(exported: Path) -> None:
    model, found = read(exported, "step")
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for item in found:
        assert held[item.weight].shape == item.shape
        assert weight_key(held[item.weight]) == item.key
    assert all(np.ptp(held[item.weight]) > 0 for item in found)
