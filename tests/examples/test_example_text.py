"""examples/text.py and train_text.py: models of one size over bytes, and a training that ends in a checkpoint."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import nsm
from nsm.baselines import RecurrentLM
from nsm.models import SimpleNSM, StepModel, load_checkpoint

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY: dict[str, tuple[type[StepModel], dict[str, Any]]] = {
    "nsm": (SimpleNSM, {"d_model": 8, "num_states": 4, "num_layers": 1, "num_heads": 2, "feed_forward": 1.0}),
    "lstm": (RecurrentLM, {"d_model": 8, "num_layers": 1}),
}
MODELS = ("nsm", "nsm-2", "transformer", "lstm", "gru", "rwkv", "mamba")
SHOWN = re.compile(r"(\w+): ([\d,]+) parameters, held out (\d+\.\d{4}) nats per byte, \d+ s")


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("text")


@pytest.fixture
def train_text(text: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with tiny models and one batch to validate on."""
    module = importlib.import_module("train_text")
    monkeypatch.setattr(text, "MODELS", TINY)
    monkeypatch.setattr(module, "_VALIDATION_BATCHES", 1)
    return module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, " * 300)
    return path


def trained(module: ModuleType, data: Path, *options: str) -> Result:
    return CliRunner().invoke(module.main, ["--data", str(data), "--steps", "2", "--count", "2", *options])


def held_out_loss(result: Result) -> float:
    assert result.exit_code == 0, (result.output, result.exception)
    found = SHOWN.search(result.stdout)
    assert found is not None, result.stdout
    return float(found[3])


def test_the_models_are_those_of_the_study(text: ModuleType) -> None:
    assert tuple(text.SMALL) == MODELS


@pytest.mark.parametrize("name", MODELS)
def test_all_models_have_about_the_same_size(name: str, text: ModuleType) -> None:
    with torch.device("meta"):
        model = text.build(name)
    assert 0.99e6 <= sum(p.numel() for p in model.parameters()) <= 1.2e6
    assert (model.token_spec.maximum, model.output_dim) == (255, 256)


def test_a_file_is_split_into_nine_tenths_and_the_rest(text: ModuleType, tmp_path: Path) -> None:
    content = bytes(range(256)) * 10
    (tmp_path / "data.bin").write_bytes(content)
    train, held_out = text.corpus(tmp_path / "data.bin")
    assert (len(train), len(held_out)) == (2304, 256)
    assert np.concatenate([train, held_out]).astype(np.uint8).tobytes() == content
    assert train.dtype == np.int64


def test_without_a_file_there_is_python_s_own_library(text: ModuleType) -> None:
    train, held_out = text.corpus()
    assert 1_000_000 < len(train) + len(held_out) <= 4_000_000
    assert b"import " in train.astype(np.uint8).tobytes()


def test_windows_come_from_the_text_with_what_follows(text: ModuleType) -> None:
    ids = np.arange(1000) * 3
    given, wanted = text.batch(ids, 50, 64, np.random.default_rng(0))
    assert given.shape == wanted.shape == (50, 64)
    np.testing.assert_array_equal(wanted, given + 3)
    np.testing.assert_array_equal(given[:, 1:], wanted[:, :-1])
    assert len(set(given[:, 0].tolist())) > 25
    again, _ = text.batch(ids, 50, 64, np.random.default_rng(0))
    np.testing.assert_array_equal(again, given)


@pytest.mark.parametrize("name", TINY)
def test_training_ends_in_a_checkpoint(name: str, train_text: ModuleType, data: Path, tmp_path: Path) -> None:
    result = trained(train_text, data, "--model", name, "--output", str(tmp_path / "text.pt"))
    # Two steps from random weights are not far from chance, log(256) = 5.5.
    assert 3.0 < held_out_loss(result) < 7.0
    checkpoint = load_checkpoint(tmp_path / "text.pt")
    found = SHOWN.search(result.stdout)
    assert found is not None
    assert found[1] == name
    assert found[2] == f"{sum(p.numel() for p in checkpoint.model.parameters()):,}"
    assert type(checkpoint.model) is TINY[name][0]
    assert len(checkpoint.golden) == len(checkpoint.calibration) == 8
    assert {len(sample) for sample in checkpoint.golden} == {64 * checkpoint.model.chunk_size}
    sample = checkpoint.golden[0].astype(np.uint8).tobytes()
    assert sample in data.read_bytes()[len(data.read_bytes()) * 9 // 10 :]


def test_training_learns(train_text: ModuleType, data: Path) -> None:
    before = held_out_loss(trained(train_text, data, "--steps", "1", "--learning-rate", "1e-9"))
    after = held_out_loss(trained(train_text, data, "--steps", "25", "--learning-rate", "3e-2"))
    assert after < before - 1.0


def test_how_embeddings_start_can_be_said(train_text: ModuleType, data: Path, tmp_path: Path) -> None:
    options = ("--steps", "1", "--learning-rate", "1e-9", "--output", str(tmp_path / "text.pt"))
    held_out_loss(trained(train_text, data, *options, "--embedding-std", "0.5"))
    assert nsm.load(tmp_path / "text.pt").get_parameter("embed.weight").std().item() == pytest.approx(0.5, rel=1e-3)
    held_out_loss(trained(train_text, data, *options))
    assert nsm.load(tmp_path / "text.pt").get_parameter("embed.weight").std().item() == pytest.approx(0.1, rel=0.05)


def test_the_same_seed_trains_the_same(train_text: ModuleType, data: Path) -> None:
    losses = [held_out_loss(trained(train_text, data, "--seed", seed)) for seed in ("1", "1", "2")]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("steps", [1, 3, 10, 20])
def test_any_number_of_steps_has_a_schedule(steps: int, train_text: ModuleType, data: Path) -> None:
    held_out_loss(trained(train_text, data, "--steps", str(steps)))


def test_no_steps_are_refused(train_text: ModuleType, data: Path) -> None:
    result = trained(train_text, data, "--steps", "0")
    assert result.exit_code == 2
    assert "--steps" in result.stderr


def test_a_text_that_is_too_short_is_refused_before_any_work(train_text: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a" * 5000)
    result = trained(train_text, tmp_path / "short.txt")
    assert result.exit_code == 2
    assert "The held-out tenth of the text has 500 bytes" in " ".join(result.stderr.split())


def test_the_script_runs_by_itself(data: Path, tmp_path: Path) -> None:
    code = (
        "import runpy, sys, text\n"
        "from nsm.models import SimpleNSM\n"
        "text.MODELS = {'nsm': (SimpleNSM, {'d_model': 8, 'num_states': 4, 'num_layers': 1, 'num_heads': 2})}\n"
        "runpy.run_path('train_text.py', run_name='__main__')"
    )
    options = ["--data", str(data), "--steps", "2", "--count", "1", "--output", str(tmp_path / "text.pt")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, *options],
        cwd=EXAMPLES,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert SHOWN.search(result.stdout) is not None
    assert isinstance(load_checkpoint(tmp_path / "text.pt").model, SimpleNSM)
