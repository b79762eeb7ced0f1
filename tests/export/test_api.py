"""export_model: what it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nsm
from nsm.errors import ConfigError, InputError
from nsm.export.sources.torch import TorchSource
from nsm.models import base as step
from nsm.models.simple import SimpleNSM
from tests.nsm.adapters.models import Learned


class Sum(nn.Module):
    def forward(self, x: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        return total * 2, total + x


class Ids(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 2)

    def forward(self, x: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.tanh(total + self.embed(x))
        return total * 2, total


SMALL: dict[str, Any] = {"num_samples": 2, "golden_steps": 4}


def test_a_module_that_is_no_step_model_is_told_what_makes_it_one(tmp_path: Path) -> None:
    module: Any = nn.LSTM(8, 8)
    with pytest.raises(InputError, match=r"given LSTM\. .*nsm\.as_step\(module"):
        nsm.export_model(module, "onnx", tmp_path / "m.nsm")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_in_another_precision_is_told_how_to_convert_it(
    model_factory: Callable[..., SimpleNSM], tmp_path: Path, dtype: torch.dtype
) -> None:
    adapted = nsm.as_step(nn.GRU(4, 4))
    for model in (model_factory(num_layers=1), adapted):
        with pytest.raises(ConfigError, match=rf"in float32; its weight \S+ is {dtype}\. .*model\.float\(\)"):
            nsm.export_model(model.to(dtype), "onnx", tmp_path / "m.nsm")
    assert list(tmp_path.iterdir()) == []


def test_the_states_of_a_module_count_as_its_weights_do(tmp_path: Path) -> None:
    """A module without weights: what is in another precision then are the values that its states begin with."""
    model = nsm.as_step(Sum(), [nsm.Carried("sum", torch.ones(1, 3))], token_shape=(3,))
    with pytest.raises(ConfigError, match=r"Sum is to be .* in float32; its state sum is torch\.float64"):
        nsm.export_model(model.double(), "onnx", tmp_path / "m.nsm")


def test_a_model_without_numbers_is_refused(model_factory: Callable[..., SimpleNSM], tmp_path: Path) -> None:
    model = model_factory(num_layers=1).to("meta")
    for refused in (
        lambda: nsm.export_model(model, "onnx", tmp_path / "m.nsm"),
        lambda: nsm.save(model, tmp_path / "m.pt"),
        lambda: nsm.reference(model),
    ):
        with pytest.raises(InputError, match=r"SimpleNSM has shapes and no numbers: \S+ lies on the device meta\."):
            refused()
    assert list(tmp_path.iterdir()) == []


def test_of_a_model_on_another_device_a_copy_on_the_cpu_is_taken(
    model: SimpleNSM, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = np.arange(8)[None]
    with nsm.reference(model) as session:
        wanted = session.step(tokens)["outputs"]
    moved: list[nn.Module] = []
    cpu = nn.Module.cpu
    monkeypatch.setattr(step, "devices", lambda _module: {"cuda"})

    def move(module: nn.Module) -> nn.Module:
        moved.append(module)
        return cpu(module)

    monkeypatch.setattr(nn.Module, "cpu", move)
    source = TorchSource.of(model)
    with nsm.reference(model) as session:
        np.testing.assert_array_equal(session.step(tokens)["outputs"], wanted)
    assert len(moved) == 2
    assert source.model is moved[0]
    assert model not in moved


def test_numbers_of_numpy_are_taken_like_others(tmp_path: Path) -> None:
    torch.manual_seed(0)
    states = [nsm.Carried("sum", torch.ones(1, 3), np.int64(0))]  # type: ignore[arg-type]
    shape, size, timed = np.array([3]), np.int64(4), np.bool_(False)
    model = nsm.as_step(Sum(), states, token_shape=shape, timed=timed, chunk_size=size)  # type: ignore[arg-type]
    options = {"batch": 2, "num_samples": 2, "golden_steps": 4, "opset": 20}
    given: dict[str, Any] = {name: np.int64(value) for name, value in options.items()}
    bundle = nsm.export_model(model, "onnx", tmp_path / "m.nsm", max_fp32_share=np.float32(0.5), **given)
    assert bundle.manifest.spec.batch == 2
    (state,) = bundle.manifest.model["config"]["states"]
    assert state[:3] == ["sum", [1, 3], 0]  # and a hash of its initial value
    ids = nsm.as_step(Ids(), [torch.zeros(1, 2)], vocab_size=np.int64(5))  # type: ignore[arg-type]
    assert nsm.export_model(ids, "onnx", tmp_path / "ids.nsm", **given).manifest.spec.entries[0].inputs[0].maximum == 4


@pytest.mark.parametrize("name", ["batch", "tokens_per_call", "opset", "num_samples", "golden_steps", "vocab_size"])
def test_options_of_another_type_are_named(tmp_path: Path, name: str) -> None:
    model = nsm.as_step(nn.GRU(4, 4))
    given: dict[str, Any] = {name: 2.5}
    with pytest.raises(InputError, match=rf"{name} is a whole number; given 2\.5 of type float"):
        nsm.export_model(model, "onnx", tmp_path / "m.nsm", **given)
    with pytest.raises(InputError, match=r"max_fp32_share is a number; given 'half' of type str"):
        nsm.export_model(model, "onnx", tmp_path / "m.nsm", max_fp32_share="half")


def test_a_learned_initial_value_and_a_file_of_sequences_by_its_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Learned()
    model = nsm.as_step(module, [nsm.Carried("h", module.start[:1])], token_shape=(3,))
    data = np.random.default_rng(0).standard_normal((3, 6, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", data)
    bundle = nsm.export_model(model, "onnxruntime", tmp_path / "m.nsm", data=str(tmp_path / "x.npy"), **SMALL)
    np.testing.assert_array_equal(bundle.trace().inputs["tokens"][:, :, 0], data[:2, :4])
    with nsm.open(bundle) as session:
        np.testing.assert_allclose(session.read_state()["h"], module.start[:1].detach())


def test_a_module_that_was_trained_again_is_exported_in_eval_mode_and_stays_as_it_is() -> None:
    module = Learned()
    model = nsm.as_step(module, [torch.zeros(1, 3)], token_shape=(3,))
    module.train()
    source = TorchSource.of(model)
    assert not any(part.training for part in source.model.modules())
    assert module.drop.training
