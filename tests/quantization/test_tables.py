"""Tables that ids are looked up in: found, kept in less room, and looked up as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import nsm
from nsm.quantization import rewrite
from nsm.quantization.linear_ops import LinearOp, linear_ops_of, weight_key
from nsm.quantization.policy import LARGEST_HALF, SMALLEST, SMALLEST_TABLE, Policy, Tables, find_policy
from nsm.trace import Array
from tests.export.helpers import quantization_of
from tests.quantization.graphs import compiled, constants, run

ROWS, WIDTH = 11, 6
IDS = np.array([[0, 10, 3], [3, 3, 7]])
KINDS: tuple[Tables, ...] = ("int8", "fp16", "bf16")


def table(seed: int = 0) -> Array:
    """Rows of very different sizes, one of them of zeros."""
    random = np.random.default_rng(seed)
    numbers = random.standard_normal((ROWS, WIDTH)) * 10.0 ** random.integers(-3, 3, (ROWS, 1))
    numbers[7] = 0
    return numbers.astype(np.float32)


def model_of(numbers: Array, axis: int = 0, linear_op: bool = False) -> onnx.ModelProto:
    """y = numbers[ids]; with `linear_op` also z = x @ numbers."""
    kind = helper.np_dtype_to_tensor_dtype(numbers.dtype)
    nodes = [helper.make_node("Gather", ["t", "ids"], ["y"], "embed/Gather", axis=axis)]
    outputs = [helper.make_tensor_value_info("y", kind, [*IDS.shape, *numbers.shape[1:]])]
    if linear_op:
        nodes.append(helper.make_node("MatMul", ["x", "t"], ["z"], "head/MatMul"))
        outputs.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, WIDTH]))
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, list(IDS.shape))]
    if linear_op:
        inputs.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, ROWS]))
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(numbers, "t")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def tables_of(model: onnx.ModelProto) -> list[LinearOp]:
    return linear_ops_of(model, ("Gather",))


def test_a_table_is_found_only_where_it_is_asked_for() -> None:
    model = model_of(table())
    assert linear_ops_of(model) == []
    (found,) = tables_of(model)
    largest = float(np.abs(table()).max())
    wanted = LinearOp(
        "embed/Gather", "ids", "t", (ROWS, WIDTH), weight_key(table()), operator="Gather", largest=largest
    )
    assert found == wanted


@pytest.mark.parametrize(
    "model",
    [model_of(table(), axis=1), model_of(table()[0]), model_of(table()[None]), model_of(table().astype(np.float64))],
    ids=["columns", "vector", "three axes", "double"],
)
def test_nothing_else_is_a_table(model: onnx.ModelProto) -> None:
    assert tables_of(model) == []


def slow_rows(numbers: Array) -> Array:
    """Row by row, number by number: what int8 makes of it."""
    rows = np.zeros_like(numbers)
    for row, given in enumerate(numbers):
        largest = max(abs(number) for number in given)
        scale = np.float32(largest) / np.float32(127) if largest else np.float32(1)
        for column, number in enumerate(given):
            rows[row, column] = np.float32(round(float(number / scale))) * scale
    return rows


@pytest.mark.parametrize("optimise", [False, True])
def test_int8_has_a_scale_for_each_row(optimise: bool) -> None:
    model = model_of(table())
    low = rewrite.looked_up(model, tables_of(model), "int8")
    onnx.checker.check_model(low, full_check=True)
    held = constants(low)
    assert {name: (value.dtype.name, value.shape) for name, value in held.items()} == {
        "t.rows": ("int8", (ROWS, WIDTH)),
        "t.rows.scale": ("float32", (ROWS, 1)),
    }
    (given,) = run(low, {"ids": IDS}, optimise).values()
    np.testing.assert_array_equal(given, slow_rows(table())[IDS])
    np.testing.assert_array_equal(compiled(low)({"ids": IDS})["y"], given)
    step = np.abs(table()).max(1, keepdims=True) / 127
    assert (np.abs(given - table()[IDS]) <= (step / 2 + 1e-6)[IDS]).all()


def test_halves_are_the_nearest() -> None:
    model = model_of(table())
    low = rewrite.looked_up(model, tables_of(model), "fp16")
    onnx.checker.check_model(low, full_check=True)
    wanted = table().astype(np.float16).astype(np.float32)[IDS]
    np.testing.assert_array_equal(run(low, {"ids": IDS})["y"], wanted)
    np.testing.assert_array_equal(compiled(low)({"ids": IDS})["y"], wanted)
    low = rewrite.looked_up(model, tables_of(model), "bf16")
    onnx.checker.check_model(low, full_check=True)
    wanted = torch.from_numpy(table()).bfloat16().float().numpy()[IDS]
    (given,) = ReferenceEvaluator(low).run(["y"], {"ids": IDS})
    np.testing.assert_array_equal(given, wanted)
    np.testing.assert_array_equal(compiled(low)({"ids": IDS})["y"], wanted)


@pytest.mark.parametrize("kept", KINDS)
def test_a_matrix_that_is_also_a_product_s_stays_for_it(kept: Tables) -> None:
    model = model_of(table(), linear_op=True)
    before = model.SerializeToString(deterministic=True)
    low = rewrite.looked_up(model, tables_of(model), kept)
    assert model.SerializeToString(deterministic=True) == before
    np.testing.assert_array_equal(constants(low)["t"], table())
    assert [item.node for item in linear_ops_of(low)] == ["head/MatMul"]
    both = rewrite.weights_only(low, linear_ops_of(low))
    names = [tensor.name for tensor in both.graph.initializer]
    assert len(set(names)) == len(names)
    assert "t" not in names


# -- which ones ------------------------------------------------------------------------------------------------------


def lookup(rows: int, width: int, largest: float = 3.0) -> LinearOp:
    return LinearOp("embed/Gather", "ids", "t", (rows, width), "key", operator="Gather", largest=largest)


def test_a_table_of_bytes_must_be_worth_it() -> None:
    large, small = lookup(1, SMALLEST_TABLE), lookup(1, SMALLEST_TABLE - 1)
    assert Policy("dynamic").chosen([large]) == ([large], {})
    assert Policy("dynamic").chosen([small]) == ([], {"embed/Gather": "its 1 x 262143 numbers are too few to gain"})
    assert Policy("weight-only", tables="fp16").chosen([large]) == ([large], {})
    assert Policy("weight-only", tables="fp16").chosen([small])[0] == []
    halves = lookup(1, SMALLEST)  # a conversion costs next to nothing on a GPU
    assert Policy("fp16", tables="fp16").chosen([halves]) == ([halves], {})


@pytest.mark.parametrize(("target", "precision"), [("tensorrt", "int8"), ("tensorrt", "fp16"), ("tensorrt", "bf16")])
def test_numbers_that_fp16_does_not_hold_stay_float(target: str, precision: str) -> None:
    policy = find_policy(target, precision)
    assert policy is not None
    for largest in (1e5, np.inf, np.nan):
        chosen, kept = policy.chosen([lookup(512, 512, largest)])
        assert (chosen == []) == (precision != "bf16")
        assert all("fp16 ends at 65504" in reason for reason in kept.values())
    assert policy.chosen([lookup(512, 512, LARGEST_HALF)])[1] == {}
    matrix = LinearOp("one/MatMul", "x", "w", (512, 512), "key", largest=1e5)
    assert (policy.chosen([matrix])[0] == []) == (precision == "fp16")


@pytest.mark.parametrize("target", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_a_model_of_many_words_is_small_in_int8(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nsm.SimpleNSM(vocab_size=2048, d_model=128, num_states=4, num_layers=1, chunk_size=8).eval()
    with torch.no_grad():
        model.get_parameter("embed.weight").mul_(
            10
        )  # an untrained model's outputs are all rounding else, and the guard keeps a linear op
    words = np.random.default_rng(0).integers(0, 2048, (4, 96))
    path = tmp_path / "m.nsm"
    bundle = nsm.export_model(
        model, target, path, list(words), precision="int8", golden_steps=8, num_samples=2, allow_slower=True
    )
    artifact = bundle.artifact(target)
    assert artifact.parity.status == "passed"
    assert any("embed" in name for name in quantization_of(artifact).quantized)
    (low,) = (bundle.path / f"{target}-int8").glob("*.bin")
    whole = bundle.path / "graphs" / "weights.bin"
    assert low.stat().st_size < 0.35 * whole.stat().st_size  # 0.55 with the table in float
