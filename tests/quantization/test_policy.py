from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsm.errors import UnsupportedError
from nsm.export.verify.artifact import PRECISIONS
from nsm.quantization.linear_ops import LinearOp
from nsm.quantization.policy import POLICIES, SMALLEST, Policy, Scheme, find_policy
from nsm.runtimes.targets import TARGETS

ROUTER = "layers.0.router.product/MatMul"
LIFT = "layers.3.consolidation.lift.1.value/MatMul.2"


def linear_op(node: str, depth: int = 512, width: int = 512) -> LinearOp:
    return LinearOp(node, "x", "w", (depth, width), node)


# -- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "precision"), POLICIES)
def test_every_row_names_a_target_and_a_precision(target: str, precision: str) -> None:
    assert target in TARGETS
    assert precision in PRECISIONS
    assert precision != "fp32"
    assert POLICIES[target, precision].scheme in get_args(Scheme)
    assert find_policy(target, precision) is POLICIES[target, precision]


def test_every_precision_is_built_on_some_target() -> None:
    assert {precision for _, precision in POLICIES} == {*PRECISIONS} - {"fp32"}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=map(" ".join, POLICIES))
def test_every_policy_keeps_what_decides_about_slots(policy: Policy) -> None:
    chosen, kept = policy.chosen([linear_op(ROUTER), linear_op(LIFT), linear_op("layers.0.projection/MatMul")])
    assert [item.node for item in chosen] == ["layers.0.projection/MatMul"]
    assert set(kept) == {ROUTER, LIFT}


@pytest.mark.parametrize("target", TARGETS)
def test_fp32_needs_no_policy(target: str) -> None:
    assert find_policy(target, "fp32") is None


@pytest.mark.parametrize(
    ("target", "precision", "known"),
    [
        ("onnx", "int8", "fp32"),
        ("tensorrt", "int4", "fp32, int8, int8-weights, fp16, bf16"),
    ],
)
def test_what_is_not_there_is_refused_with_what_there_is(target: str, precision: str, known: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        find_policy(target, precision)
    assert str(caught.value) == f"The target {target} is not built in {precision}. It is built in: {known}."


@pytest.mark.parametrize(
    ("target", "precision", "reason", "instead"),
    [
        ("onnxruntime", "fp16", "back to fp32", "int8"),
        ("onnxruntime", "bf16", "no linear ops in bf16", "int8"),
        ("onnxruntime-cuda", "int8", "no kernels for int8", "fp16"),
        ("onnxruntime-cuda", "int8-weights", "measured on a GPU", "fp16"),
    ],
)
def test_what_looks_as_if_it_should_be_there_is_refused_with_the_reason(
    target: str, precision: str, reason: str, instead: str
) -> None:
    with pytest.raises(UnsupportedError, match=f"{reason}.* Use {instead}.* It is built in: fp32, "):
        find_policy(target, precision)
    find_policy(target, instead)


# -- the choice ------------------------------------------------------------------------------------------------------


def test_routers_and_lifts_and_small_matrices_stay_with_the_reason() -> None:
    linear_ops = [
        linear_op("layers.0.projection/MatMul", 128, 128),
        linear_op(ROUTER),
        linear_op("layers.0.memory.out/MatMul", 128, 127),
        linear_op(LIFT),
        linear_op(f"layers.1.{ROUTER}", 2, 2),
        linear_op("head.1/MatMul"),
    ]
    chosen, kept = Policy("static").chosen(linear_ops)
    assert chosen == [linear_ops[0], linear_ops[5]]
    assert linear_ops[0].size == SMALLEST
    assert kept == {
        ROUTER: "router layer: always fp32",
        "layers.0.memory.out/MatMul": "its 128 x 127 numbers are too few to gain",
        LIFT: "router layer: always fp32",
        f"layers.1.{ROUTER}": "router layer: always fp32",
    }


def test_a_name_that_only_looks_like_a_router_is_chosen() -> None:
    names = ["layers.0.router_product/MatMul", "layers.0.router.products/MatMul", "layers.0.lifted/MatMul"]
    chosen, kept = Policy("static").chosen([linear_op(name) for name in names])
    assert ([item.node for item in chosen], kept) == (names, {})


def test_other_patterns_take_the_place_of_these() -> None:
    policy = Policy("fp16", keep=(("head.*", "it is the head"),))
    chosen, kept = policy.chosen([linear_op(ROUTER), linear_op("head.1/MatMul")])
    assert ([item.node for item in chosen], kept) == ([ROUTER], {"head.1/MatMul": "it is the head"})


MODULES = ("router.product", "lift.0.value", "lift.1.product", "projection", "feed_forward.0", "attention.fuse")
NODES = st.builds("layers.{}.{}/MatMul.{}".format, st.integers(0, 9), st.sampled_from(MODULES), st.integers(2, 9))
PRODUCTS = st.lists(
    st.builds(linear_op, NODES, st.integers(1, 300), st.integers(1, 300)), unique_by=lambda item: item.node
)


@given(PRODUCTS, st.sampled_from(sorted(POLICIES)))
def test_every_product_is_either_chosen_or_kept(linear_ops: list[LinearOp], row: tuple[str, str]) -> None:
    chosen, kept = POLICIES[row].chosen(linear_ops)
    names = [item.node for item in chosen]
    assert not set(names) & set(kept)
    assert sorted([*names, *kept]) == sorted(item.node for item in linear_ops)
    assert chosen == [item for item in linear_ops if item.node in names]  # in their order
    assert all(reason for reason in kept.values())
    for item in linear_ops:
        decides = ".router.product/" in item.node or ".lift." in item.node
        assert (item.node in kept) == (decides or item.size < SMALLEST)


def test_a_small_sum_stays_float_and_needs_no_reason() -> None:
    sums = LinearOp("later/MatMul", "x", "w", (16, 17), "key", sums=True)
    assert Policy("dynamic").chosen([sums, linear_op("large")]) == ([linear_op("large")], {})
