"""ONNX files as exporters and their users really write them: open sizes, branches, defaults, old operators."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

import nsm
from nsm.errors import ConfigError, InputError, UnsupportedError
from nsm.export.options import ExportOptions
from nsm.export.pipeline import export
from nsm.export.sources.onnx.source import load_onnx
from nsm.export.sources.state_options import parse_shapes, parse_states
from tests.export.foreign_graphs import FLOAT, HALF, PLAIN, Ports, leaky, write
from tests.export.helpers import invoke, refused, succeeded


class Voice(nn.Module):
    """Frames that are padded, filtered and remembered."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Conv1d(1, 4, 8, stride=4)
        self.cell = nn.GRUCell(4, 6)
        self.head = nn.Linear(6, 1)

    def forward(self, frame: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        padded = nn.functional.pad(frame.unsqueeze(1), (4, 4), mode="reflect")
        new = self.cell(self.filters(padded).relu().mean(-1), state)
        return torch.sigmoid(self.head(new)), new


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_model_by_torchs_older_exporter_is_exact(dynamic: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {"input_names": ["frame", "state"], "output_names": ["speech", "stateN"]}
    if dynamic:  # all axes, as people do who do not know which
        names["dynamic_axes"] = {"frame": [0, 1], "state": [0], "speech": [0], "stateN": [0]}
    model = Voice().eval()
    path = tmp_path / "voice.onnx"
    with warnings.catch_warnings(action="ignore"):  # that it is the older exporter, and what it does not fold
        torch.onnx.export(model, (torch.zeros(1, 32), torch.zeros(1, 6)), str(path), dynamo=False, **names)
    shapes = ["--shape", "frame=batch,32"] if dynamic else []
    lanes = 1 + dynamic
    made: tuple[str | Path, ...] = (
        "export",
        path,
        "-t",
        "ort",
        "-o",
        tmp_path / "voice.nsm",
        *shapes,
        "--batch",
        str(lanes),
    )
    succeeded(invoke(*made, "--golden-steps", "8", "--num-samples", "2"))
    frames = np.random.default_rng(0).standard_normal((lanes, 5, 32)).astype(np.float32)
    with nsm.open(tmp_path / "voice.nsm") as session, torch.no_grad():
        answers, state = session.run(frames)["speech"], torch.zeros(lanes, 6)
        for place in range(5):
            wanted, state = model(torch.tensor(frames[:, place]), state)
            np.testing.assert_allclose(answers[:, place], wanted, rtol=1e-5)


def test_open_sizes_that_are_no_step_say_how_to_fix_them(tmp_path: Path) -> None:
    inputs: Ports = {"x": [None, None, None], "h": [None, 3]}
    path = write(tmp_path / "m.onnx", leaky(), inputs, {"y": [None, None], "hn": [None, None]}, HALF)
    with pytest.raises(UnsupportedError, match=r"axis 2 is dynamic besides .*--shape x=x\.0,512,512"):
        load_onnx(path)
    with pytest.raises(UnsupportedError, match=r"does not run .*--shape x=1,512"):
        load_onnx(path, shapes={"x": "batch,7,5"})


@pytest.mark.parametrize("size", [None, -1])
def test_axes_without_a_name_can_be_given_one(size: int | None, tmp_path: Path) -> None:
    """Old exporters write -1 for what may be of any size."""
    path = write(tmp_path / "m.onnx", leaky(), {"x": [size, size], "h": [size, 3]}, PLAIN[1], HALF)
    source = load_onnx(path, shapes={"x": "batch,3"})
    assert source.lanes is None
    assert source.token_spec.shape == (3,)
    assert load_onnx(path, shapes={"x": "1,3"}).lanes == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("z=1,3", "there is no input 'z'; there are x, h"),
        ("x=1", r"the shape \['batch', 3\]; expected a size"),
        ("x=1,4", "where the graph has a size, that one"),
        ("x=0,3", "expected a size"),
        ("x=,3", "expected a size"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", leaky(), *PLAIN, HALF)
    with pytest.raises(InputError, match=message):
        load_onnx(path, shapes=parse_shapes([text]))


@pytest.mark.parametrize("arguments", [("--shape", "x"), ("--shape", "x=1,3", "--shape", "x=1,3")])
def test_shapes_are_pairs_and_belong_to_onnx(arguments: tuple[str, ...], checkpoint: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", leaky(), *PLAIN, HALF)
    assert "expected NAME=SIZES" in refused(invoke("export", path, "-t", "ort", *arguments), 2)
    assert "--shape applies to foreign .onnx" in refused(invoke("export", checkpoint, "-t", "ort", "--shape", "x=1"), 2)


def test_a_branch_may_use_what_lies_outside_of_it(tmp_path: Path) -> None:
    branches = {
        name: helper.make_graph(
            [helper.make_node(kind, ["faded", "x"], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, FLOAT, None)],
        )
        for name, kind in (("more", "Add"), ("less", "Sub"))
    }
    nodes = [
        helper.make_node("Mul", ["h", "half"], ["faded"]),
        helper.make_node("ReduceSum", ["h"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "half"], ["large"]),
        helper.make_node("If", ["large"], ["hn"], then_branch=branches["less"], else_branch=branches["more"]),
        helper.make_node("Identity", ["hn"], ["y"]),
    ]
    path = write(tmp_path / "m.onnx", nodes, {"x": [1, 3], "h": [1, 3]}, {"y": [1, 3], "hn": [1, 3]}, HALF)
    bundle = export(path, ExportOptions(["onnxruntime"], output=tmp_path / "m.nsm", num_samples=2, golden_steps=8))
    x = np.random.default_rng(0).standard_normal((1, 6, 3)).astype(np.float32)
    plain, state = ort.InferenceSession(str(path)), np.zeros((1, 3), np.float32)
    with nsm.open(bundle.path) as session:
        given = session.run(x)["y"]
    for place in range(6):
        wanted, state = plain.run(["y", "hn"], {"x": x[:, place], "h": state})
        np.testing.assert_allclose(given[:, place], wanted, rtol=1e-6)


def test_lanes_that_read_the_first_one_are_found_out(tmp_path: Path) -> None:
    nodes = [helper.make_node("Gather", ["h", "first"], ["one"], axis=0), helper.make_node("Add", ["one", "x"], ["hn"])]
    nodes.append(helper.make_node("Identity", ["hn"], ["y"]))
    path = write(tmp_path / "m.onnx", nodes, *PLAIN, {"first": 0})
    with pytest.raises(UnsupportedError, match=r"when another one is beside it \(output y of lane 1\)"):
        load_onnx(path)
    assert load_onnx(path, shapes={"x": "1,3"}).lanes == 1


def test_a_state_that_is_never_read_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["c", "x"], ["hn"]), helper.make_node("Add", ["c", "hn"], ["cn"])]
    nodes.append(helper.make_node("Identity", ["hn"], ["y"]))
    path = write(tmp_path / "m.onnx", nodes, {**PLAIN[0], "c": ["batch", 3]}, {**PLAIN[1], "cn": ["batch", 3]})
    with pytest.raises(InputError, match=r"never reads its states h.*a tensor of its own for each state"):
        load_onnx(path)


def test_the_reference_of_an_old_file_is_the_file_and_not_its_conversion(tmp_path: Path) -> None:
    """`Upsample` of version 9 goes by other coordinates than the `Resize` that it is converted to."""
    nodes = [
        helper.make_node("Upsample", ["x", "scales"], ["wide"], mode="linear"),
        helper.make_node("Add", ["wide", "h"], ["hn"]),
        helper.make_node("Identity", ["hn"], ["y"]),
    ]
    inputs: Ports = {"x": [1, 1, 3], "h": [1, 1, 6]}
    scales = {"scales": np.array([1, 1, 2], np.float32)}
    path = write(tmp_path / "m.onnx", nodes, inputs, {"y": [1, 1, 6], "hn": [1, 1, 6]}, scales, opset=9)
    output = refused(invoke("export", path, "-t", "ort", "-o", tmp_path / "m.nsm", "--golden-steps", "4"), 5)
    assert "one-step error" in output


def test_what_takes_a_logarithm_is_examined_on_positive_numbers(tmp_path: Path) -> None:
    nodes = [helper.make_node("Log", ["x"], ["power"]), helper.make_node("Mul", ["h", "half"], ["faded"])]
    nodes += [helper.make_node("Add", ["faded", "power"], ["hn"]), helper.make_node("Identity", ["hn"], ["y"])]
    assert load_onnx(write(tmp_path / "m.onnx", nodes, *PLAIN, HALF)).lanes is None
    nodes[0] = helper.make_node("Log", ["h"], ["power"])
    nodes[2] = helper.make_node("Add", ["power", "x"], ["hn"])
    with pytest.raises(ConfigError, match=r"NaN or infinity in \['y', 'h'\] for made-up tokens, .* and positive ones"):
        load_onnx(write(tmp_path / "m.onnx", [nodes[0], *nodes[2:]], *PLAIN))


@pytest.mark.parametrize(("size", "message"), [(0, "at least 1"), (-5, "at least 1"), (9, "embeddings for 8 ids")])
def test_a_number_of_ids_that_cannot_be_is_refused(size: int, message: str, tmp_path: Path) -> None:
    nodes = [helper.make_node("Gather", ["table", "ids"], ["x"]), *leaky()]
    table = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    inputs: Ports = {"ids": ["batch"], "h": ["batch", 3]}
    path = write(tmp_path / "m.onnx", nodes, inputs, PLAIN[1], {**HALF, "table": table})
    assert load_onnx(path).token_spec.maximum == 7
    assert load_onnx(path, vocab_size=5).token_spec.maximum == 4
    with pytest.raises(InputError, match=message):
        load_onnx(path, vocab_size=size)


def test_a_number_of_ids_is_of_ids(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="of a graph over ids; the input x is float32"):
        load_onnx(write(tmp_path / "m.onnx", leaky(), *PLAIN, HALF), vocab_size=8)


@pytest.mark.parametrize("named", [[], ["h=hn"]])
def test_a_state_with_a_default_value_starts_from_it(named: list[str], tmp_path: Path) -> None:
    start = np.array([[1, 2, 3]], np.float32)
    inputs: Ports = {"x": [1, 3], "h": [1, 3]}
    path = write(tmp_path / "m.onnx", leaky(), inputs, {"y": [1, 3], "hn": [1, 3]}, {**HALF, "h": start})
    source = load_onnx(path, parse_states(named))
    np.testing.assert_array_equal(source.initial_arrays(1)["h"], start)
    with pytest.raises(InputError, match="No states were found"):
        load_onnx(path, constants={"h": "1,2,3"})


def test_a_constant_has_one_number_or_all(tmp_path: Path) -> None:
    inputs: Ports = {"x": ["batch", 3], "h": ["batch", 3], "half": [1, 3]}
    path = write(tmp_path / "m.onnx", leaky(), inputs, PLAIN[1])
    for text in ("0.5", "0.5,0.5,0.5"):
        assert load_onnx(path, constants={"half": text}).lanes is None
    with pytest.raises(InputError, match="as many as it takes"):
        load_onnx(path, constants={"half": "0.5,0.5"})


def test_who_names_a_state_names_all(tmp_path: Path) -> None:
    nodes = [*leaky(), helper.make_node("Add", ["memory", "x"], ["later"])]
    inputs: Ports = {**PLAIN[0], "memory": ["batch", 3]}
    path = write(tmp_path / "m.onnx", nodes, inputs, {**PLAIN[1], "later": ["batch", 3]}, HALF)
    with pytest.raises(InputError, match=r"(?s)memory -> later: a state or data.*--state h=hn --state memory=later"):
        load_onnx(path)
    with pytest.raises(InputError, match=r"expected exactly one input, found 2: x, h\. .*name all states"):
        load_onnx(path, parse_states(["memory=later"]))
    assert list(load_onnx(path, parse_states(["memory=later", "h=hn"])).config["states"]) == ["memory", "h"]


def test_a_cache_that_grows_is_said_before_anything_else_about_the_inputs(tmp_path: Path) -> None:
    past, present = "past_key_values.0.key", "present.0.key"
    nodes = [
        helper.make_node("Concat", [past, "x"], [present], axis=1),
        helper.make_node("ReduceSum", [present], ["y"]),
        helper.make_node("Add", ["attention_mask", "x"], ["z"]),
    ]
    inputs: Ports = {"x": ["batch", 1, 3], "attention_mask": ["batch", 1, 3], past: ["batch", "past", 3]}
    path = write(tmp_path / "m.onnx", nodes, inputs, {"y": [1], present: ["batch", "all", 3], "z": ["batch", 1, 3]})
    with pytest.raises(UnsupportedError, match=r"axes 0 and 1 are open.*a cache that grows"):
        load_onnx(path)


def test_functions_of_a_file_are_put_in_line(tmp_path: Path) -> None:
    double = helper.make_function(
        "mine", "Double", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 18)]
    )
    nodes = [*leaky()[:2], helper.make_node("Double", ["hn"], ["y"], domain="mine")]
    more: dict[str, Any] = {"functions": [double], "opsets": [helper.make_opsetid("mine", 1)]}
    assert load_onnx(write(tmp_path / "m.onnx", nodes, *PLAIN, HALF, **more)).lanes is None


def test_an_output_may_not_be_called_like_the_input_of_a_step(tmp_path: Path) -> None:
    nodes = [*leaky()[:2], helper.make_node("Add", ["hn", "hn"], ["tokens"])]
    path = write(tmp_path / "m.onnx", nodes, PLAIN[0], {"tokens": ["batch", 3], "hn": ["batch", 3]}, HALF)
    with pytest.raises(InputError, match=r"the outputs tokens; .*another name"):
        load_onnx(path)
