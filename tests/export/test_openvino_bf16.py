"""OpenVINO's bf16: a fused attention of its that was wrong stays avoided."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from openvino import properties as props

from nsm.export.onnx import export_onnx, initial_arrays
from nsm.models.simple import SimpleNSM


@pytest.mark.parametrize("entry", ["step", "decode"])
@pytest.mark.parametrize("heads", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_one_call_in_bf16_is_the_call_in_fp32(heads: int, entry: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SimpleNSM(
        vocab_size=64, d_model=384, state_dim=384, num_states=32, num_layers=1, num_heads=8, routing_heads=heads
    ).eval()
    spec = model.spec(1)
    export_onnx(model, spec, tmp_path)
    state = initial_arrays(model, 1)
    generator = np.random.default_rng(0)
    state["0.bank"] = generator.standard_normal(state["0.bank"].shape, np.float32)
    tokens = generator.integers(0, 64, spec.entry(entry).inputs[0].shape)
    feeds = {"tokens": tokens, **{item.past: state[item.name] for item in spec.states_of(spec.entry(entry).reads)}}
    core = ov.Core()
    if "BF16" not in core.get_property("CPU", props.device.capabilities()):
        pytest.skip("this processor has no bf16")
    outputs = []
    for kind in (ov.Type.f32, ov.Type.bf16):
        graph = core.read_model(tmp_path / f"{entry}.onnx")
        compiled = core.compile_model(graph, "CPU", {props.hint.inference_precision(): kind})
        outputs.append(compiled(feeds)["outputs"])
    exact, rounded = outputs
    assert np.linalg.norm(rounded - exact) < 0.02 * np.linalg.norm(exact)
