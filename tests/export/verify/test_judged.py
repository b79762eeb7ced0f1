"""What low precision is judged on: streams that are long enough, of a model whose states do not explode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

import nsm
from nsm.bundle import Bundle
from nsm.export.options import ExportOptions
from tests.export.helpers import invoke, names, refused, succeeded, the_json
from tests.quantization.graphs import make_graph, product_node

WIDTH = 128
pytestmark = pytest.mark.usefixtures("few_steps")


def recurrence(path: Path, keep: float) -> Path:
    """state' = keep * state + x @ IN;  y = state' @ OUT, over vectors, with matrices that are large enough."""
    generator = np.random.default_rng(0)
    inward, outward = (generator.standard_normal((WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5 for _ in range(2))
    nodes = [
        product_node("in/MatMul", "x", "IN", "fed"),
        helper.make_node("Mul", ["past", "keep"], ["kept"]),
        helper.make_node("Add", ["kept", "fed"], ["present"]),
        product_node("out/MatMul", "present", "OUT", "y"),
    ]
    vectors = [1, WIDTH]
    weights = {"IN": inward, "OUT": outward, "keep": np.array(keep, np.float32)}
    model = make_graph(nodes, {"x": vectors, "past": vectors}, {"y": vectors, "present": vectors}, weights)
    onnx.save(model, str(path))
    return path


def command(tmp_path: Path, keep: float, *more: str) -> list[str | Path]:
    model = recurrence(tmp_path / "model.onnx", keep)
    streams = ("--num-samples", "2", "--allow-slower", "-o", tmp_path / "m.nsm")
    return ["export", model, "--state", "past=present", *streams, *more]


# -- states that explode ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "precision"),
    [("ort", "int8"), ("ort", "int8-weights"), ("ov", "int8-weights"), ("ov", "bf16"), ("trt", "fp16")],
)
def test_a_model_whose_states_explode_is_not_built_in_low_precision(
    tmp_path: Path, target: str, precision: str
) -> None:
    arguments = command(tmp_path, 1.1, "-t", target, "-p", precision)
    refused(invoke(*arguments), 3, "states explode", "within 200 calls", "not quantized", "keep fp32")
    assert names(tmp_path) == ["model.onnx"]


def test_a_bundle_of_such_a_model_takes_no_low_precision_either(tmp_path: Path) -> None:
    succeeded(invoke(*command(tmp_path, 1.1, "-t", "ort")))
    before = (tmp_path / "m.nsm" / "manifest.json").read_bytes()
    refused(invoke("build", tmp_path / "m.nsm", "-t", "ort", "-p", "int8"), 3, "states explode", "within 64 calls")
    assert (tmp_path / "m.nsm" / "manifest.json").read_bytes() == before


# -- the length of the streams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "steps"), [("fp32", 64), ("int8", 200)])
def test_low_precision_is_judged_over_200_calls_unless_told_otherwise(
    tmp_path: Path, precision: str, steps: int
) -> None:
    assert ExportOptions(["onnxruntime"], precision).steps == steps
    result = invoke(*command(tmp_path, 0.9, "-t", "ort", "-p", precision))
    assert "calls per stream" not in succeeded(result) + result.stderr
    bundle = Bundle(tmp_path / "m.nsm")
    artifact = bundle.artifact("onnxruntime")
    assert (bundle.trace().steps, artifact.parity.steps) == (steps, steps)
    assert not [note for note in artifact.notes if "checked over" in note]


def test_fewer_calls_are_said_and_recorded(tmp_path: Path) -> None:
    result = invoke(*command(tmp_path, 0.9, "-t", "ort", "-p", "int8", "--golden-steps", "4"))
    succeeded(result)
    assert "Low precision is checked over 4 calls per stream: fewer than 200" in " ".join(result.stderr.split())
    (note,) = (note for note in Bundle(tmp_path / "m.nsm").artifact(None).notes if "checked over" in note)
    assert note.startswith("checked over 4 calls per stream: fewer than 200 do not show")
    assert note in succeeded(invoke("inspect", tmp_path / "m.nsm"))


def test_a_build_says_over_how_few_calls_of_the_bundle_it_was_judged(tmp_path: Path) -> None:
    succeeded(invoke(*command(tmp_path, 0.9, "-t", "ort")))
    build = ("build", tmp_path / "m.nsm", "-t", "ort", "--allow-slower")
    assert "hecked over" not in succeeded(invoke(*build, "--force"))
    assert "Checked over 64 calls per stream: fewer than 200" in succeeded(invoke(*build, "-p", "int8"))
    (artifact,) = the_json(invoke(*build, "-p", "int8", "--json", "--force"))["artifacts"]
    assert [note for note in artifact["notes"] if note.startswith("checked over 64 calls")]
    with nsm.open(tmp_path / "m.nsm", precision="int8") as session:
        assert session.effective_precision == "int8"
