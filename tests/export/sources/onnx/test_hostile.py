"""ONNX files that ask for far too much, are damaged, or hold operators that are no step's."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from nsm.errors import InputError, NsmError, UnsupportedError
from nsm.export.sources.onnx.file import reading as onnx_file
from nsm.export.sources.onnx.file.limits import DEEPEST
from nsm.export.sources.onnx.file.operators import RANDOM
from nsm.export.sources.onnx.source import load_onnx
from nsm.export.sources.state_options import parse_states
from tests.export.foreign_graphs import FLOAT, HALF, PLAIN, leaky, write

OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]


def function(name: str, nodes: list[onnx.NodeProto], attributes: list[str] | None = None) -> onnx.FunctionProto:
    return helper.make_function("mine", name, ["a"], ["b"], nodes, OPSETS, attributes)


def call(name: str, given: str, made: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(name, [given], [made], domain="mine", **attributes)


def calling(path: Path, functions: list[onnx.FunctionProto], last: onnx.NodeProto) -> Path:
    """A step whose answer is that of a function."""
    nodes = [*leaky()[:2], last]
    return write(path, nodes, *PLAIN, HALF, functions=functions, opsets=OPSETS[1:])


def doubling(levels: int) -> list[onnx.FunctionProto]:
    """Functions of which each calls the one before twice; the first adds."""
    found = [function("F0", [helper.make_node("Add", ["a", "a"], ["b"])])]
    return found + [
        function(f"F{level}", [call(f"F{level - 1}", "a", "t"), call(f"F{level - 1}", "t", "b")])
        for level in range(1, levels)
    ]


def chained(levels: int) -> list[onnx.FunctionProto]:
    found = [function("F0", [helper.make_node("Neg", ["a"], ["b"])])]
    return found + [function(f"F{level}", [call(f"F{level - 1}", "a", "b")]) for level in range(1, levels)]


def handed_on() -> list[onnx.FunctionProto]:
    """Each of a thousand nodes takes the tensor that the call gives."""
    attribute = onnx.AttributeProto(name="value", type=onnx.AttributeProto.TENSOR, ref_attr_name="table")
    nodes = []
    for place in range(1000):
        nodes.append(helper.make_node("Constant", [], [f"t{place}"]))
        nodes[-1].attribute.append(attribute)
    return [function("F", [*nodes, helper.make_node("Neg", ["a"], ["b"])], ["table"])]


TABLE = numpy_helper.from_array(np.zeros(1 << 20, np.float32))
BRANCH = helper.make_graph([], "none", [], [helper.make_tensor_value_info("x", FLOAT, None)])
CALLS: dict[str, tuple[list[onnx.FunctionProto], onnx.NodeProto, str]] = {
    "twice each": (doubling(40), call("F39", "hn", "y"), r"its graph has 549,755,813,890 nodes"),
    "itself": ([function("F", [call("F", "a", "b")])], call("F", "hn", "y"), "deep, or without end"),
    "each other": (
        [function("F", [call("G", "a", "b")]), function("G", [call("F", "a", "b")])],
        call("G", "hn", "y"),
        "deep, or without end",
    ),
    "deep": (chained(DEEPEST + 1), call(f"F{DEEPEST}", "hn", "y"), f"more than {DEEPEST} deep"),
    "deep, seen from below": (
        chained(DEEPEST + 1)[::-1],
        call(f"F{DEEPEST}", "hn", "y"),
        f"more than {DEEPEST} deep",
    ),
    "a tensor for each": (handed_on(), call("F", "hn", "y", table=TABLE), r"attributes of 8,\d+,\d+,\d+ bytes"),
    "a graph": (doubling(1), call("F0", "hn", "y", body=BRANCH), "the node y gives a graph to the function F0"),
}


@pytest.mark.parametrize("kind", CALLS)
def test_functions_that_would_become_far_too_much_are_refused_before_they_are_put_in_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions, last, message = CALLS[kind]

    def inlined(_model: onnx.ModelProto) -> None:
        raise AssertionError("the functions were put in line")

    monkeypatch.setattr(onnx_file, "inline_local_functions", inlined)
    with pytest.raises(UnsupportedError, match=message) as caught:
        load_onnx(calling(tmp_path / "m.onnx", functions, last))
    assert "without functions of its own" in str(caught.value)


def test_functions_that_call_functions_are_put_in_line(tmp_path: Path) -> None:
    source = load_onnx(calling(tmp_path / "m.onnx", doubling(6), call("F5", "hn", "y")))
    with_session = source.reference(source.spec())
    assert with_session is not None
    with with_session as session:
        np.testing.assert_allclose(session.feed(np.ones((1, 2, 3), np.float32))["y"][0, :, 0], [1 * 2**32, 1.5 * 2**32])
    assert load_onnx(calling(tmp_path / "m.onnx", chained(DEEPEST), call(f"F{DEEPEST - 1}", "hn", "y"))).lanes is None


# -- weights -----------------------------------------------------------------------------------------------------------


def beside(tensor: TensorProto, **entries: object) -> None:
    """Say that its numbers lie in a file."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "w.bin", **entries}.items():
        tensor.external_data.add(key=key, value=str(value))


def biased(path: Path, change: Callable[[onnx.ModelProto, TensorProto], object]) -> Path:
    """A step with a weight of three numbers that is changed."""
    nodes = [*leaky()[:2], helper.make_node("Add", ["hn", "bias"], ["y"])]
    write(path, nodes, *PLAIN, {**HALF, "bias": np.arange(3, dtype=np.float32)})
    model = onnx.load(str(path))
    change(model, next(tensor for tensor in model.graph.initializer if tensor.name == "bias"))
    onnx.save(model, str(path))
    return path


def twice(tensor: TensorProto, place: str) -> None:
    """Two places, the first inside the folder; loaders take the last."""
    beside(tensor)
    tensor.external_data.add(key="location", value=place)


def declared(**fields: Any) -> Callable[[onnx.ModelProto, TensorProto], object]:
    def change(_: onnx.ModelProto, tensor: TensorProto) -> None:
        for name, value in fields.items():
            if name == "dims":
                tensor.dims[:] = value
            else:
                setattr(tensor, name, value)

    return change


def element_type(model: onnx.ModelProto, _: TensorProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = 99


WEIGHTS: dict[str, tuple[Callable[[onnx.ModelProto, TensorProto], object], str]] = {
    "longer than its shape": (
        lambda _, t: beside(t, length=4 << 30),
        r"to be 4294967296 bytes .*float\[3\] takes 12\.",
    ),
    "shorter than its shape": (lambda _, t: beside(t, length=8), r"to be 8 bytes of 'w\.bin', and float\[3\] takes 12"),
    "of no number of bytes": (lambda _, t: beside(t, length="many"), "to be many bytes"),
    "behind the end": (
        lambda _, t: beside(t, offset=1 << 20, length=12),
        "cannot be read from 'w.bin': it has 1,048,576 bytes, too few",
    ),
    "across the end, no length": (
        lambda _, t: beside(t, offset=(1 << 20) - 8),
        "cannot be read from 'w.bin': it has 1,048,576 bytes, too few",
    ),
    "in two places": (lambda _, t: twice(t, "../w.bin"), "to lie in '../w.bin', which is outside the folder"),
    "in a place with a zero byte": (lambda _, t: twice(t, "w\0.bin"), "is outside the folder"),
    "an unknown type": (declared(data_type=99), "the weight bias has the element type 99, which ONNX does not know"),
    "no type": (declared(data_type=0), "the weight bias has the element type 0, which"),
    "a negative size": (declared(dims=[-3]), r"the weight bias has the shape \[-3\]; sizes are 0 or more"),
    "more numbers than it has": (declared(dims=[1000]), "the weight bias is damaged: .*too small"),
    "fewer numbers than it has": (declared(dims=[2]), r"damaged: it has 12 bytes, and float\[2\] takes 8"),
    "numbers in two forms": (lambda _, t: t.float_data.extend([1.0, 2.0, 3.0]), "the weight bias is damaged"),
    "an input of an unknown type": (element_type, "x has the element type 99, which ONNX does not know"),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_weight_that_is_not_what_it_says_is_refused(kind: str, tmp_path: Path) -> None:
    change, message = WEIGHTS[kind]
    (tmp_path / "w.bin").write_bytes(bytes(1 << 20))
    with pytest.raises(InputError, match=message) as caught:
        load_onnx(biased(tmp_path / "m.onnx", change))
    assert type(caught.value) is InputError


def test_a_weight_without_a_length_is_as_long_as_its_shape(tmp_path: Path) -> None:
    with (tmp_path / "w.bin").open("wb") as file:
        file.write(np.array([9, 0, 1, 2], np.float32).tobytes())
        file.truncate(1 << 36)  # a hole: it takes no room on the disk
    tracemalloc.start()
    try:
        source = load_onnx(biased(tmp_path / "m.onnx", lambda _, tensor: beside(tensor, offset=4)))
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    reference = source.reference(source.spec())
    assert reference is not None
    with reference as session:
        np.testing.assert_array_equal(session.feed(np.zeros((1, 1, 3), np.float32))["y"], [[[0, 1, 2]]])


@pytest.mark.parametrize("shape", [[1, 10**12], [10**12, 3]])
def test_an_input_of_terabytes_is_refused(shape: list[int], tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", leaky(), {"x": shape, "h": [1, 3]}, PLAIN[1], HALF)
    with pytest.raises(
        UnsupportedError, match=r"x is float32\[\d+, \d+\], \d+,000,000,000,000 bytes; a call takes and"
    ):
        load_onnx(path)


# -- operators ---------------------------------------------------------------------------------------------------------


def noisy(kind: str) -> onnx.NodeProto:
    if kind in ("RandomNormal", "RandomUniform"):
        return helper.make_node(kind, [], ["noise"], "the_noise", shape=[1, 3])
    if kind == "Multinomial":
        return helper.make_node(kind, ["hn"], ["noise"], "the_noise", sample_size=1, dtype=TensorProto.INT32)
    return helper.make_node(kind, ["hn"], ["noise"], "the_noise")


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", RANDOM)
def test_random_numbers_are_refused_with_the_node_that_draws_them(kind: str, inside: bool, tmp_path: Path) -> None:
    """Also in a branch that is rarely taken."""
    nodes = [*leaky()[:2], noisy(kind)]
    if inside:
        drawing = helper.make_graph(nodes[2:], "one", [], [helper.make_tensor_value_info("noise", FLOAT, None)])
        resting = helper.make_graph(
            [helper.make_node("Identity", ["hn"], ["same"])],
            "other",
            [],
            [helper.make_tensor_value_info("same", FLOAT, None)],
        )
        nodes[2] = helper.make_node("If", ["never"], ["noise"], then_branch=drawing, else_branch=resting)
    nodes += [helper.make_node("Cast", ["noise"], ["cast"], to=FLOAT), helper.make_node("Add", ["hn", "cast"], ["y"])]
    path = write(tmp_path / "m.onnx", nodes, *PLAIN, {**HALF, "never": np.array(False)})
    with pytest.raises(UnsupportedError, match=rf"the node the_noise is {kind}, which draws random numbers: .*noise\."):
        load_onnx(path)


@pytest.mark.parametrize(("how", "fits"), [("absent", True), ("false", True), ("true", False), ("input", False)])
def test_dropout_is_refused_where_it_may_be_in_training_mode(how: str, fits: bool, tmp_path: Path) -> None:
    names = ["hn", "ratio", *([] if how == "absent" else ["training"])]
    nodes = [*leaky()[:2], helper.make_node("Dropout", names, ["y"], "drop")]
    constants = {**HALF, "ratio": np.float32(0.5), **({} if how == "absent" else {"training": np.array(how == "true")})}
    path = write(tmp_path / "m.onnx", nodes, *PLAIN, constants)
    if how == "input":  # a default value of false, which a call may change
        model = onnx.load(str(path))
        next(t for t in model.graph.initializer if t.name == "training").raw_data = b"\0"
        model.graph.input.append(helper.make_tensor_value_info("training", TensorProto.BOOL, []))
        onnx.save(model, str(path))
    if fits:
        assert load_onnx(path).lanes is None
        return
    with pytest.raises(
        UnsupportedError, match=r"the node drop is a Dropout that is, or may be, in training mode.*eval"
    ):
        load_onnx(path)


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.noise = Noise()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.noise(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = 0.5 * h + x
        return self.blocks[0](h), h


@pytest.mark.filterwarnings("ignore")
def test_the_module_that_a_node_comes_from_is_named(tmp_path: Path) -> None:
    path, arguments = tmp_path / "m.onnx", (torch.zeros(1, 3), torch.zeros(1, 3))
    names: dict[str, Any] = {"input_names": ["x", "h"], "output_names": ["y", "hn"]}
    torch.onnx.export(Stack(), arguments, str(path), dynamo=True, verbose=False, **names)
    with pytest.raises(
        UnsupportedError, match=r"the node \S+, of the module blocks\.0\.noise, is RandomNormalLike"
    ) as caught:
        load_onnx(path)
    assert "[" not in str(caught.value)


@pytest.mark.parametrize("scopes", ["['', 'layers.0', 'op']", "[", "3", "['op']", "[" * 10_000])
def test_what_is_no_name_of_a_module_is_left_out(scopes: str, tmp_path: Path) -> None:
    def foreign(model: onnx.ModelProto, _: TensorProto) -> None:
        node = model.graph.node[-1]
        node.domain, node.op_type, node.name = "com.microsoft", "QuickGelu", "gelu"
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)

    of = ", of the module layers.0," if "layers" in scopes else ""
    error: type[NsmError] = UnsupportedError
    with pytest.raises(
        error, match=rf"the node gelu{of} is the operator com\.microsoft::QuickGelu, which is not in the"
    ):
        load_onnx(biased(tmp_path / "m.onnx", foreign))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([1 << 20, 3], r"the input x is \[1048576, 3\], for 1,048,576 streams; at most 4,096 are taken"),
        ([1, 1 << 25], r"the input x is \[1, 33554432\], 33,554,432 numbers; a call takes at most 16,777,216"),
        ([0, 1 << 60], r"x is \[0, 1152921504606846976\], 1,152,921,504,606,846,976 numbers"),
    ],
)
def test_a_main_input_that_takes_hours_to_examine_is_refused(shape: list[int], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", leaky(), {**PLAIN[0], "x": shape}, PLAIN[1], HALF)
    with pytest.raises(UnsupportedError, match=message):
        load_onnx(path, parse_states(["h=hn"]))
