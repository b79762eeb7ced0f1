"""Modules that know nothing of nsm, on the targets that other tests of foreign models leave out."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nsm
from nsm import Carried
from nsm.adapters import AdaptedModel
from nsm.bundle import Bundle
from nsm.errors import MissingDependencyError
from nsm.export.builders.web import find_package
from nsm.runtimes.targets import find_target
from nsm.trace import Array
from tests.export.helpers import invoke, p99, quantization_of, refused, the_json
from tests.nsm.adapters.models import VoiceActivity

RUN_HERE = ("mobile", "web", "triton")


class Recurrent(nn.Module):
    """Ids [B, T] -> logits [B, T, 9], four layers of LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.memory = nn.LSTM(6, 6, num_layers=4, batch_first=True)
        self.head = nn.Linear(6, 9)

    def forward(self, ids: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        outputs, state = self.memory(self.embed(ids), state)
        return self.head(outputs), state


def voice(width: int = 12) -> AdaptedModel:
    return nsm.as_step(VoiceActivity(width), [Carried("hidden", torch.zeros(1, width))], token_shape=(64,))


def recurrent() -> AdaptedModel:
    states = [(Carried("hidden", torch.zeros(4, 1, 6), 1), Carried("cell", torch.zeros(4, 1, 6), 1))]
    return nsm.as_step(Recurrent(), states, vocab_size=9, timed=True)


@pytest.fixture(scope="module", params=[voice, recurrent], ids=["conv + GRU", "LSTM of 4 layers"])
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle to which targets are added."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    samples: Array = random.integers(0, 9, (4, 40))
    if request.param is voice:
        samples = random.standard_normal((4, 40, 64)).astype(np.float32)
    output = tmp_path_factory.mktemp("foreign") / "model.nsm"
    nsm.export_model(request.param(), "onnx", output, samples, golden_steps=6, num_samples=2)
    return output


@pytest.mark.parametrize("target", ["mobile", "web", "triton"])
def test_it_agrees_with_torch_and_is_measured(target: str, foreign: Path) -> None:
    if target == "web":
        _need_web()
    (built,) = the_json(invoke("build", foreign, "-t", target, "--json"))["artifacts"]
    parity = built["parity"]
    assert (parity["status"], parity["source"], parity["streams"], parity["steps"]) == ("passed", "recorded", 2, 6)
    assert parity["free_run"]["max"] < 1e-5
    (measured,) = the_json(invoke("bench", foreign, "-t", target, "--steps", "10", "--json"))["results"]
    assert measured["target"] == target
    assert measured["latency_us"]["p50"] > 0


def _need_web() -> None:
    if shutil.which("node") is None:
        pytest.skip("needs Node.js 20 or later: apt-get install nodejs npm")
    try:
        find_package()
    except MissingDependencyError as error:
        pytest.skip(f"needs the npm package onnxruntime-web: {error}")


@pytest.mark.parametrize(
    "foreign",
    [
        pytest.param(voice, id="conv + GRU"),
        pytest.param(recurrent, id="LSTM of 4 layers", marks=pytest.mark.slow),  # its engines take minutes
    ],
    indirect=True,
)
def test_an_engine_of_it_is_built_without_a_gpu(foreign: Path, no_gpu: None) -> None:
    if find_target("tensorrt").installed() is None:
        pytest.skip('needs TensorRT: pip install "nsm-toolkit[tensorrt]"')
    (built,) = the_json(invoke("build", foreign, "-t", "tensorrt", "--json"))["artifacts"]
    engines = {f"tensorrt/{entry.name}.engine" for entry in Bundle(foreign).manifest.spec.entries}
    assert engines <= {record["path"] for record in built["files"]}
    assert built["parity"]["status"] == "not_run"
    refused(invoke("bench", foreign, "-t", "tensorrt"), 3, "GPU")


def test_in_int8_it_runs_on_openvino(tmp_path: Path) -> None:
    torch.manual_seed(0)
    samples = np.random.default_rng(0).standard_normal((8, 60, 64)).astype(np.float32)
    bundle = nsm.export_model(
        voice(96),
        "openvino",
        tmp_path / "model.nsm",
        samples,
        precision="int8",
        allow_slower=True,
        golden_steps=20,
        num_samples=2,
    )
    (built,) = bundle.manifest.artifacts
    assert (built.precision, built.effective_precision, built.parity.status) == ("int8", "int8", "passed")
    assert 1e-4 < p99(built.parity.free_run) < 0.1
    assert built.quantization is not None
    assert quantization_of(built).quantized == ("module.memory/MatMul.2",), "the product with the hidden state"
