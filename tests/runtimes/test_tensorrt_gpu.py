"""TensorRT on a real GPU; run with `pytest -m gpu` on a machine that has one. Nothing in CI depends on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import nsm
from nsm.export.adding import add_target

pytestmark = pytest.mark.gpu


def test_an_engine_built_here_is_the_model(bundle_copy: Path) -> None:
    artifact = add_target(bundle_copy, "tensorrt", "current")
    assert artifact.parity["status"] == "passed"
    assert artifact.effective_precision == "fp32"


def test_a_stream_moves_from_the_cpu_to_the_gpu(bundle_copy: Path) -> None:
    add_target(bundle_copy, "tensorrt", "current")
    ids = np.random.default_rng(0).integers(0, 20, (2, 160))
    with nsm.open(bundle_copy, "onnxruntime") as cpu, nsm.open(bundle_copy, "tensorrt") as gpu:
        cpu.run(ids[:, :80])
        gpu.restore(cpu.snapshot())
        wanted, given = cpu.run(ids[:, 80:])["outputs"], gpu.run(ids[:, 80:])["outputs"]
    assert np.linalg.norm(given - wanted) <= 1e-4 * np.linalg.norm(wanted)
