"""The presets: named sizes with the stated numbers of parameters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import nsm
from nsm.errors import ConfigError
from nsm.models.hybrid import HybridModel
from nsm.models.presets import PRESETS, VOCABULARY, from_preset
from nsm.models.simple import SimpleNSM
from nsm.models.stream import StreamModel

SLOTS = {"NSM-32": 32, "NSM-64": 64, "NSM-128": 128, "Hybrid": 64}
MILLIONS = {"NSM-32": 12, "NSM-64": 24, "NSM-128": 48, "Hybrid": 37}
TINY = {"d_model": 16, "state_dim": 16, "feed_forward": 1.0}


def shape_of(name: str, **changes: int) -> StreamModel:
    """A preset without memory for its weights."""
    with torch.device("meta"):
        return from_preset(name, **changes)


def parameters(model: StreamModel) -> int:
    return sum(p.numel() for p in model.parameters())


def test_these_are_the_presets() -> None:
    assert {name: millions for name, (_, _, millions) in PRESETS.items()} == MILLIONS
    assert VOCABULARY == 10_000


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_it_states(name: str) -> None:
    model = shape_of(name)
    assert parameters(model) == pytest.approx(MILLIONS[name] * 1e6, rel=0.05)
    assert model.token_spec.maximum == VOCABULARY - 1
    assert model.output_dim == VOCABULARY


def test_the_hybrid_has_at_least_36_million() -> None:
    assert parameters(shape_of("Hybrid")) >= 36_000_000


@pytest.mark.parametrize("name", PRESETS)
def test_the_number_in_a_name_is_that_of_the_slots(name: str) -> None:
    kind, _, _ = PRESETS[name]
    model = shape_of(name)
    assert type(model) is kind is (HybridModel if name == "Hybrid" else SimpleNSM)
    assert model.config["num_states"] == SLOTS[name]
    assert model.config["gate_type"] == "mingru"


def test_the_vocabulary_changes_embedding_and_head_alone() -> None:
    large, small = shape_of("NSM-32"), shape_of("NSM-32", vocab_size=256)
    missing = VOCABULARY - 256
    assert parameters(large) - parameters(small) == missing * (2 * 320 + 1)
    assert small.output_dim == 256


def test_changes_take_the_place_of_the_preset_s_arguments() -> None:
    model = shape_of("NSM-64", num_layers=2, num_states=48, output_dim=7)
    assert len(model.layers) == model.config["num_layers"] == 2
    assert model.config["num_states"] == 48
    assert model.output_dim == 7
    assert model.config["d_model"] == PRESETS["NSM-64"][1]["d_model"]
    assert PRESETS["NSM-64"][1]["num_layers"] == 5


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_made_narrow_runs(name: str) -> None:
    model = from_preset(name, vocab_size=11, **TINY).eval()
    tokens = torch.arange(20).remainder(11).unsqueeze(0)
    with torch.no_grad():
        outputs = model(tokens)
    assert outputs.shape == (1, 20, 11)
    assert bool(torch.isfinite(outputs).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_at_its_full_size_is_exported_and_passes_parity(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    targets = ["onnxruntime", "openvino"]
    model = from_preset(name).eval()
    bundle = nsm.export_model(model, targets, tmp_path / "preset.nsm", num_samples=2, golden_steps=4)
    assert bundle.manifest.model["parameters"] == parameters(model)
    assert [(a.target, a.parity.status) for a in bundle.manifest.artifacts] == [(t, "passed") for t in targets]
    trace = bundle.trace()
    for target in targets:
        with nsm.open(bundle.path, target) as session:
            outputs = session.step(trace.inputs["tokens"][:1, 0])["outputs"]
        assert outputs.shape == (1, 16, VOCABULARY)
        np.testing.assert_allclose(outputs[:, trace.positions], trace.outputs["outputs"][:1, 0], rtol=1e-3, atol=1e-4)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no preset 'NSM-7'\. Presets: NSM-32, NSM-64, NSM-128, Hybrid\."):
        from_preset("NSM-7")


def test_changes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_states >= 1"):
        from_preset("NSM-32", num_states=0)
    with pytest.raises(TypeError, match="slots"):
        from_preset("NSM-32", slots=3)


def test_the_package_offers_it() -> None:
    assert nsm.from_preset is from_preset
