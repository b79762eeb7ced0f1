"""On a real GPU; run with `pytest -m gpu` on a machine that has one. Nothing in CI depends on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import nsm
from nsm.export.verify.another_target import add_target
from tests.small_models import make_model, make_sequences

pytestmark = pytest.mark.gpu

TARGETS = {"tensorrt": "current", "onnxruntime-cuda": "cuda"}


@pytest.mark.parametrize("target", TARGETS)
def test_an_artifact_built_here_is_the_model(bundle_copy: Path, target: str) -> None:
    artifact = add_target(bundle_copy, target, TARGETS[target], force=True)
    assert artifact.parity.status == "passed"
    assert artifact.effective_precision == "fp32"


@pytest.mark.parametrize("target", TARGETS)
def test_a_stream_moves_from_the_cpu_to_the_gpu(bundle_copy: Path, target: str) -> None:
    add_target(bundle_copy, target, TARGETS[target], force=True)
    ids = np.random.default_rng(0).integers(0, 20, (2, 163))
    with nsm.open(bundle_copy, "onnxruntime") as cpu, nsm.open(bundle_copy, target) as gpu:
        cpu.run(ids[:, :83])
        gpu.restore(cpu.snapshot())
        wanted, given = cpu.run(ids[:, 83:])["outputs"], gpu.run(ids[:, 83:])["outputs"]
    assert np.linalg.norm(given - wanted) <= 1e-4 * np.linalg.norm(wanted)


@pytest.mark.parametrize("target", TARGETS)
def test_a_reset_stream_is_a_fresh_one(bundle_copy: Path, target: str) -> None:
    """Also after graphs were captured, which run a call several times."""
    add_target(bundle_copy, target, TARGETS[target], force=True)
    ids = np.random.default_rng(1).integers(0, 20, (2, 70))
    with nsm.open(bundle_copy, target) as session:
        first = session.run(ids)["outputs"]
        session.reset()
        np.testing.assert_array_equal(session.run(ids)["outputs"], first)


def test_a_model_on_the_gpu_is_exported_as_it_is_on_the_cpu(tmp_path: Path) -> None:
    model, ids = make_model(), make_sequences(1, 40)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)).numpy()
    model.cuda()
    samples = list(torch.from_numpy(make_sequences(2, 40)).cuda())
    bundle = nsm.export_model(model, "onnxruntime", tmp_path / "m.nsm", samples)
    with nsm.open(bundle) as session, nsm.reference(model) as reference:
        for one in (session, reference):
            np.testing.assert_allclose(one.run(ids)["outputs"], wanted, rtol=1e-4, atol=1e-5)
    assert next(model.parameters()).is_cuda
