"""Each recurrent baseline goes the way of every model: exported, built, and checked against PyTorch over a stream."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import nsm
from tests.nsm.baselines.makers import MAKERS

TARGETS = ["onnxruntime", "openvino"]
# The transformer's way is tests/runtimes/session/test_streams.py, with all else.
NAMES = ["lstm", "gru", "rwkv", "mamba"]


@pytest.mark.parametrize("name", NAMES)
def test_a_baseline_is_exported_and_passes_parity(name: str, tmp_path: Path) -> None:
    kind, changes = MAKERS[name]
    torch.manual_seed(0)
    model = kind(**{"vocab_size": 20, "d_model": 8, "num_layers": 1, "chunk_size": 4, **changes}).eval()
    bundle = nsm.export_model(model, TARGETS, tmp_path / "baseline.nsm", num_samples=2, golden_steps=8)
    assert bundle.manifest.model["class"] == kind.__name__
    assert [(a.target, a.parity.status) for a in bundle.manifest.artifacts] == [(t, "passed") for t in TARGETS]
    trace = bundle.trace()
    assert trace.outputs["outputs"].shape[:2] == (2, 8)
    for target in TARGETS:
        with nsm.open(bundle.path, target) as session, torch.no_grad():
            tokens = trace.inputs["tokens"][0].reshape(1, -1)
            found = session.run(tokens)["outputs"]
            torch.testing.assert_close(
                torch.from_numpy(found), model(torch.from_numpy(tokens)), rtol=1e-4, atol=1e-5, msg=target
            )
