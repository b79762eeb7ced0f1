"""OpenVINO's fp16 and bf16: a call is that of fp32. A fused attention of its that was wrong in bf16 stays avoided."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from openvino import properties as props

from nsm.export.graphs.exporter import export_onnx, initial_arrays
from nsm.models.simple import SimpleNSM
from nsm.trace import Arrays
from tests.export.helpers import needs_bf16, needs_fp16


@pytest.mark.parametrize("entry", ["step", "decode"])
@pytest.mark.parametrize("heads", [1, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "most"),
    [pytest.param("f16", 0.003, marks=needs_fp16), pytest.param("bf16", 0.02, marks=needs_bf16)],
)
def test_one_call_is_the_call_in_fp32(kind: str, most: float, heads: int, entry: str, tmp_path: Path) -> None:
    """On a bank of which some slots are masked, and hold anything."""
    torch.manual_seed(0)
    model = SimpleNSM(
        vocab_size=64,
        d_model=384,
        state_dim=384,
        num_states=32,
        initial_states=24,
        num_layers=1,
        num_heads=8,
        routing_heads=heads,
    ).eval()
    spec = model.spec(1)
    export_onnx(model, spec, tmp_path)
    state = initial_arrays(model, 1)
    generator = np.random.default_rng(0)
    state["0.bank"] = generator.standard_normal(state["0.bank"].shape, np.float32)
    tokens = generator.integers(0, 64, spec.entry(entry).inputs[0].shape)
    feeds = {"tokens": tokens, **{item.past: state[item.name] for item in spec.states_of(spec.entry(entry).reads)}}
    exact, rounded = (_called(tmp_path / f"{entry}.onnx", name, feeds) for name in ("f32", kind))
    errors = {
        name: float(np.linalg.norm(rounded[name] - value) / np.linalg.norm(value)) for name, value in exact.items()
    }
    assert max(errors.values()) <= most, errors
    assert max(errors.values()) > 1e-4, "computed in fp32 after all"


def _called(graph: Path, kind: str, feeds: Arrays) -> Arrays:
    """The floating-point results of a graph, computed in a type."""
    core = ov.Core()
    config = {props.hint.inference_precision(): getattr(ov.Type, kind)}
    compiled = core.compile_model(core.read_model(graph), "CPU", config)
    assert compiled.get_property(props.hint.inference_precision()).get_type_name() == kind
    results = {port.get_any_name(): value for port, value in compiled(feeds).items()}
    return {name: np.array(value) for name, value in results.items() if value.dtype.kind == "f"}
