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
from nsm.bundle import Bundle
from nsm.export import pipeline
from nsm.export.options import ExportOptions
from nsm.export.pipeline import export
from nsm.export.sources import torch as torch_source
from nsm.export.verify import acceptance
from nsm.export.verify.another_target import add_target
from nsm.models.simple import SimpleNSM
from tests.export.helpers import scale_weights
from tests.nsm.adapters.models import VoiceActivity
from tests.small_models import make_model, make_sequences


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without an NVIDIA GPU, whatever this one has."""
    import cuda.bindings.runtime as cuda

    monkeypatch.setattr(cuda, "cudaGetDeviceCount", lambda: (cuda.cudaError_t.cudaErrorNoDevice, 0))


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A voice activity detector as a program of torch.export, for any number of streams. Do not change it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("program") / "voice.pt2"
    batch = torch.export.Dim("batch")
    arguments, shapes = (torch.zeros(2, 64), torch.zeros(2, 12)), ({0: batch}, {0: batch})
    torch.export.save(torch.export.export(VoiceActivity(), arguments, dynamic_shapes=shapes), path)
    return path


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

        monkeypatch.setattr(torch_source, "export_onnx", copied)

    with_factor(1.0)
    return with_factor


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if an export gets as far as running the model."""

    def worked(*_args: Any, **_options: Any) -> None:
        raise AssertionError("work was done before the request was refused")

    monkeypatch.setattr(pipeline, "record", worked)
    monkeypatch.setattr(torch_source, "export_onnx", worked)


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


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Low precision whose speed is measured with as few calls as can be: any will do."""
    monkeypatch.setattr(acceptance, "SPEED_STEPS", 10)


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with sequences, of a model with matrices that are large enough for low precision."""
    path = tmp_path_factory.mktemp("wide") / "wide.pt"
    # An untrained model is near the budget of int8 weights; on these sequences it is within it.
    nsm.save(make_model(d_model=64, num_layers=1), path, samples=make_sequences(12, 240, 1))
    return path


@pytest.fixture(scope="session")
def int8_bundle(wide: Path) -> Path:
    """Two lanes of it in int8, for OpenVINO and ONNX Runtime, with its calibration. Do not change it."""
    options = ExportOptions(
        ["openvino", "onnxruntime"],
        precision="int8",
        output=wide.with_suffix(".nsm"),
        batch=2,
        num_samples=3,
        golden_steps=24,
        allow_slower=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acceptance, "SPEED_STEPS", 10)
        return export(wide, options).path


@pytest.fixture
def int8_copy(int8_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of its own for tests that change one."""
    return Path(shutil.copytree(int8_bundle, tmp_path / "int8.nsm"))


@pytest.fixture
def ready_wide(int8_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the ONNX exporter: two lanes of `wide` get the graphs that were exported before."""

    def copied(_model: SimpleNSM, _spec: object, directory: Path, _opset: int) -> None:
        shutil.copytree(int8_bundle / "graphs", directory, dirs_exist_ok=True)

    monkeypatch.setattr(torch_source, "export_onnx", copied)


@pytest.fixture(scope="session")
def built(int8_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Bundle]:
    """The same model for a target in a precision, built once. Do not change it."""
    made = {("openvino", "int8"): int8_bundle, ("onnxruntime", "int8"): int8_bundle}

    def once(target: str, precision: str) -> Bundle:
        if (target, precision) not in made:
            path = tmp_path_factory.mktemp("built") / "model.nsm"
            shutil.copytree(int8_bundle, path)
            device = "sm86" if target == "tensorrt" else None
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(acceptance, "SPEED_STEPS", 10)
                add_target(path, target, device, precision=precision, limits=acceptance.Limits(0.7, allow_slower=True))
            made[target, precision] = path
        return Bundle(made[target, precision])

    return once


@pytest.fixture(scope="session")
def rough(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in fp32 whose `ROUGH` product cannot be rounded: a row that is large, but is multiplied by zero, sets
    the scale of every column. Do not change it."""
    model = make_model(d_model=64, num_layers=1)
    feed_forward = model.layers[0].feed_forward
    assert isinstance(feed_forward, torch.nn.Sequential)
    first, _, second = feed_forward
    assert isinstance(first, torch.nn.Linear)
    assert isinstance(second, torch.nn.Linear)
    with torch.no_grad():
        second.weight *= 4.0
        first.weight[3] = first.bias[3] = 0.0
        second.weight[:, 3] = 1000.0
    folder = tmp_path_factory.mktemp("rough")
    nsm.save(model, folder / "rough.pt", samples=make_sequences(4, 240))
    options = ExportOptions(["onnxruntime"], output=folder / "rough.nsm", batch=2, num_samples=2, golden_steps=24)
    return export(folder / "rough.pt", options).path


@pytest.fixture
def rough_copy(rough: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(rough, tmp_path / "rough.nsm"))
