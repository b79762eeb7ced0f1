"""ONNX files that are put right when they are read, or refused there: layouts, order, training mode, versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import nsm
from nsm.errors import UnsupportedError
from nsm.export.graphs.external_data import save_shared
from nsm.export.graphs.walk import graphs_of, nodes_of
from nsm.export.sources.onnx.file.reading import read_onnx
from nsm.export.sources.onnx.source import load_onnx
from tests.export.foreign_graphs import HALF, PLAIN, Ports, leaky, write
from tests.export.helpers import invoke, refused, succeeded

# Of torch's gates, by the order in which ONNX has them.
GATES = {"GRU": [1, 0, 2], "LSTM": [0, 3, 1, 2], "RNN": [0]}


def torch_weights(module: nn.RNNBase, kind: str) -> dict[str, np.ndarray]:
    def ordered(suffix: str) -> np.ndarray:
        directions = ["", "_reverse"] if module.bidirectional else [""]
        parts = []
        for direction in directions:
            value = getattr(module, f"{suffix}_l0{direction}").detach().numpy()
            gates = np.split(value, len(GATES[kind]))
            parts.append(np.concatenate([gates[place] for place in GATES[kind]]))
        return np.stack(parts)

    bias = np.concatenate([ordered("bias_ih"), ordered("bias_hh")], 1)
    return {"W": ordered("weight_ih"), "R": ordered("weight_hh"), "B": bias}


def streams_first(path: Path, module: nn.RNNBase, kind: str) -> Path:
    """A recurrent layer with `layout=1`: x [batch, time, 3], states [batch, directions, 4]."""
    directions = 2 if module.bidirectional else 1
    letters = ["h", "c"] if kind == "LSTM" else ["h"]
    more: dict[str, Any] = {"direction": "bidirectional"} if directions == 2 else {}
    if kind == "GRU":
        more["linear_before_reset"] = 1
    ends = [f"{letter}n" for letter in letters]
    nodes = [
        helper.make_node(
            kind, ["x", "W", "R", "B", "", *letters], ["Y", *ends], "memory", hidden_size=4, layout=1, **more
        ),
        helper.make_node("Reshape", ["Y", "shape"], ["y"]),
    ]
    constants = {**torch_weights(module, kind), "shape": np.array([0, 0, -1])}
    steps: int | str = 3 if directions == 2 else "time"
    inputs: Ports = {"x": ["batch", steps, 3], **{name: ["batch", directions, 4] for name in letters}}
    outputs: Ports = {"y": ["batch", steps, 4 * directions], **{name: ["batch", directions, 4] for name in ends}}
    return write(path, nodes, inputs, outputs, constants)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("kind", GATES)
def test_recurrences_with_the_streams_first_are_what_torch_computes(kind: str, directions: int, tmp_path: Path) -> None:
    """No runtime has kernels for them; PyTorch's layer is the independent loop."""
    torch.manual_seed(0)
    module: nn.RNNBase = getattr(nn, kind)(3, 4, batch_first=True, bidirectional=directions == 2)
    path = streams_first(tmp_path / "m.onnx", module, kind)
    with pytest.raises(Exception, match=r"layout"):
        ort.InferenceSession(str(path)).run(None, {})
    chunk = ("--tokens-per-call", "3") if directions == 1 else ()
    options = ("-t", "ort", "-t", "ov", "--batch", "2", "--num-samples", "2", "--golden-steps", "4", *chunk)
    succeeded(invoke("export", path, *options, "-o", tmp_path / "m.nsm"))
    x = np.random.default_rng(0).standard_normal((2, 6, 3)).astype(np.float32)
    held: Any = torch.zeros(directions, 2, 4)
    held = (held, held) if kind == "LSTM" else held
    wanted = []
    with torch.no_grad():
        for part in np.split(x, 2, axis=1):
            given, held = module(torch.from_numpy(part), held)
            wanted.append(given.numpy())
    hidden = (held[0] if kind == "LSTM" else held).movedim(1, 0)
    for target in ("onnxruntime", "openvino"):
        with nsm.open(tmp_path / "m.nsm", target) as session:
            tokens = x if directions == 1 else x.reshape(2, 2, 3, 3)
            (result,) = session.run(tokens).values()
            np.testing.assert_allclose(result.reshape(2, 6, -1), np.concatenate(wanted, 1), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(session.read_state()["h"], hidden, rtol=1e-4, atol=1e-6)


def test_a_layout_inside_a_branch_is_rewritten_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = streams_first(tmp_path / "m.onnx", nn.GRU(3, 4), "GRU")
    model = onnx.load(str(path))
    node = onnx.NodeProto()
    node.CopyFrom(model.graph.node[0])
    graph = helper.make_graph([node], "branch", [], [helper.make_tensor_value_info(n, 1, None) for n in node.output])
    model.graph.node[0].CopyFrom(
        helper.make_node("If", ["always"], list(node.output), then_branch=graph, else_branch=graph)
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    onnx.save(model, str(tmp_path / "branch.onnx"))
    read = read_onnx(tmp_path / "branch.onnx")
    kinds = [[node.op_type for node in one.node] for one in graphs_of(read.graph)]
    assert kinds.count(["Transpose", "Transpose", "GRU", "Transpose", "Transpose"]) == 2
    assert not any(item.name == "layout" for node in nodes_of(read.graph) for item in node.attribute)


# -- order -------------------------------------------------------------------------------------------------------------


def test_nodes_out_of_order_are_put_in_order(tmp_path: Path) -> None:
    """Converters to half precision append their casts; a branch counts as what it uses."""
    branch = [
        helper.make_graph(
            [helper.make_node(kind, ["faded", "x"], [kind])], kind, [], [helper.make_tensor_value_info(kind, 1, None)]
        )
        for kind in ("Add", "Sub")
    ]
    nodes = [
        helper.make_node("Add", ["hn", "hn"], ["y"], "last"),
        helper.make_node("If", ["always"], ["hn"], "middle", then_branch=branch[0], else_branch=branch[1]),
        helper.make_node("Mul", ["h", "half"], ["faded"], "first"),
    ]
    path = write(tmp_path / "m.onnx", nodes, *PLAIN, {**HALF, "always": np.array(True)})
    assert [node.name for node in read_onnx(path).graph.node] == ["first", "middle", "last"]
    options = ("-t", "ort", "--num-samples", "2", "--golden-steps", "4", "-o", tmp_path / "m.nsm")
    succeeded(invoke("export", path, *options))
    onnx.checker.check_model(str(tmp_path / "m.nsm" / "graphs" / "step.onnx"))


def test_what_is_in_order_stays_as_it_is(tmp_path: Path) -> None:
    nodes = [helper.make_node("Neg", ["x"], ["unused"], "alone"), *leaky()]
    path = write(tmp_path / "m.onnx", nodes, *PLAIN, HALF)
    assert [node.op_type for node in read_onnx(path).graph.node] == ["Neg", "Mul", "Add", "Add"]


def test_a_circle_is_refused(tmp_path: Path) -> None:
    nodes = [*leaky(), helper.make_node("Add", ["b", "x"], ["a"]), helper.make_node("Neg", ["a"], ["b"])]
    path = write(tmp_path / "m.onnx", nodes, *PLAIN, HALF)
    with pytest.raises(UnsupportedError, match="ONNX Runtime cannot open the graph"):
        load_onnx(path)


# -- training mode -----------------------------------------------------------------------------------------------------


class Normal(nn.Module):
    """Normalised frames that are remembered."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.linear, self.layer = nn.Linear(6, 6), layer

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.tanh(self.layer(self.linear(x)) + 0.5 * h)
        return h * 2, h


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm1d(6), r"layer/BatchNormalization is a BatchNormalization in training mode.*model\.eval\(\)"),
        (nn.Dropout(0.2), "layer/Dropout is a Dropout that is, or may be, in training mode.*in eval mode"),
    ],
)
def test_files_in_training_mode_say_so(layer: nn.Module, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    axes = {name: {0: "batch"} for name in ("x", "h", "y", "hn")}
    names: dict[str, Any] = {"input_names": ["x", "h"], "output_names": ["y", "hn"], "dynamic_axes": axes}
    mode = torch.onnx.TrainingMode
    for training in (mode.TRAINING, mode.EVAL):
        model = Normal(layer).train(training is mode.TRAINING)
        torch.onnx.export(
            model,
            (torch.randn(2, 6), torch.zeros(2, 6)),
            str(path),
            dynamo=False,
            training=training,
            do_constant_folding=False,
            **names,
        )
        if training is mode.TRAINING:
            refused(invoke("export", path, "-t", "ort", "-o", tmp_path / "m.nsm"), 3)
            with pytest.raises(UnsupportedError, match=message):
                load_onnx(path)
        else:
            assert load_onnx(path).lanes is None


def test_old_batch_normalisation_in_training_mode_says_so(tmp_path: Path) -> None:
    """Before operator set 14 it has no attribute, and gives the statistics of the call."""
    constants = {
        **HALF,
        **{name: np.ones(3, np.float32) for name in ("scale", "mean", "var")},
        "bias": np.zeros(3, np.float32),
    }
    statistics = ["mean_out", "var_out", "saved_mean", "saved_var"]
    for outputs in (["normal", *statistics], ["normal"]):
        nodes = [
            helper.make_node("BatchNormalization", ["x", "scale", "bias", "mean", "var"], outputs),
            helper.make_node("Mul", ["h", "half"], ["faded"]),
            helper.make_node("Add", ["faded", "normal"], ["hn"]),
            helper.make_node("Identity", ["hn"], ["y"]),
        ]
        path = write(tmp_path / "m.onnx", nodes, *PLAIN, constants, opset=13)
        if len(outputs) > 1:
            with pytest.raises(UnsupportedError, match="a BatchNormalization in training mode"):
                load_onnx(path)
        else:
            assert load_onnx(path).lanes is None


# -- versions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("opset", "version"), [(18, 8), (19, 9), (20, 9), (21, 10), (22, 10), (23, 11)])
def test_a_graph_has_the_lowest_ir_version_of_its_operator_set(opset: int, version: int, tmp_path: Path) -> None:
    """The table of the ONNX specification; runtimes refuse an IR version that is newer than they are."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    sets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    (path,) = save_shared({"step": helper.make_model(graph, opset_imports=sets)}, tmp_path, "weights.bin")
    assert onnx.load(str(path)).ir_version == version
