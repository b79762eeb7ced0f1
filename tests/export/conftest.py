"""What several tests of the export take: a machine that lacks something, spared work, and a model over bytes."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nsm
from nsm.export import pipeline
from nsm.export.pipeline import ExportOptions, export
from nsm.models.simple import SimpleNSM
from tests.conftest import make_model
from tests.export.helpers import scale_weights


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without an NVIDIA GPU, whatever this one has."""
    import cuda.bindings.runtime as cuda

    monkeypatch.setattr(cuda, "cudaGetDeviceCount", lambda: (cuda.cudaError_t.cudaErrorNoDevice, 0))


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make packages look as if they were not installed."""

    def hidden(*packages: str) -> None:
        real = importlib.util.find_spec

        def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
            return None if name.split(".", maxsplit=1)[0] in packages else real(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)

    return hidden


@pytest.fixture
def ready_graph(exported: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Spare the ONNX exporter: two lanes of the model get the graph that was exported before. Call it with a factor
    for the weights to get a wrong one."""

    def with_factor(factor: float) -> None:
        def copied(_model: SimpleNSM, _spec: object, directory: Path, _opset: int) -> None:
            shutil.copytree(exported / "graphs", directory, dirs_exist_ok=True)
            scale_weights(directory / "weights.bin", factor)

        monkeypatch.setattr(pipeline, "export_onnx", copied)

    with_factor(1.0)
    return with_factor


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if an export gets as far as running the model."""

    def worked(*_args: Any, **_options: Any) -> None:
        raise AssertionError("work was done before the request was refused")

    monkeypatch.setattr(pipeline, "record", worked)
    monkeypatch.setattr(pipeline, "export_onnx", worked)


@pytest.fixture
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sequences of different lengths, neither a whole number of chunks."""
    path = tmp_path_factory.mktemp("data") / "ids.npz"
    generator = np.random.default_rng(8)
    np.savez(path, a=generator.integers(0, 20, 35), b=generator.integers(0, 20, (1, 6)))
    return path


@pytest.fixture(scope="session")
def byte_model() -> SimpleNSM:
    """Random weights that write printable ASCII, unless the temperature is very high, and not one letter for ever."""
    model = make_model(seed=1, vocab_size=256, output_dim=256, num_layers=1)
    (*_, head), embed = model.head.children(), model.embed
    assert isinstance(head, torch.nn.Linear)
    assert isinstance(embed, torch.nn.Embedding)
    with torch.no_grad():
        embed.weight *= 3.0
        for parameter in model.layers[0].parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        head.weight *= 8.0
        head.bias[:32] = head.bias[127:] = -100.0
    return model


@pytest.fixture(scope="session")
def byte_bundle(byte_model: SimpleNSM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One lane, one target. Do not change it."""
    folder = tmp_path_factory.mktemp("bytes")
    nsm.save(byte_model, folder / "bytes.pt", samples=np.random.default_rng(0).integers(0, 256, (4, 64)))
    options = ExportOptions(["onnxruntime"], output=folder / "bytes.nsm", num_samples=2, golden_steps=4)
    return export(folder / "bytes.pt", options).path


@pytest.fixture(scope="session")
def wide_byte_bundle(byte_bundle: Path) -> Path:
    """The same model with three lanes."""
    options = ExportOptions(
        ["onnxruntime"], output=byte_bundle.with_name("wide.nsm"), batch=3, num_samples=2, golden_steps=4
    )
    return export(byte_bundle.with_suffix(".pt"), options).path
