"""A working window is not a working memory: the answers here can only come from the bank.

`tests/data/recall.pt` was trained by `make recall` (examples/train_recall.py) on pairs shown 49 tokens and more before
they are asked for; the model's windows reach 36 tokens back. With the bank reset in between, and everything else left
as it was, the answers must fall to chance.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import nsm
from nsm.export.options import ExportOptions
from nsm.export.pipeline import export
from nsm.models.simple import SimpleNSM
from nsm.modules.layer import NSMLayer
from nsm.trace import Array, Arrays

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "tests" / "data" / "recall.pt"
STREAMS = 250
CHANCE = 1 / 32
LEARNED = 0.99
# Four standard deviations above chance for 1000 questions.
AT_CHANCE = CHANCE + 4 * np.sqrt(CHANCE * (1 - CHANCE) / 1000)


@pytest.fixture(scope="module")
def task() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_recall", ROOT / "examples" / "train_recall.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def streams(task: ModuleType) -> tuple[Array, Array]:
    """New streams, of a seed that training did not use."""
    ids, wanted = task.batch(STREAMS, np.random.default_rng(123))
    return ids, wanted


@pytest.fixture(scope="module")
def recall_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("recall") / "recall.nsm"
    targets = ["onnx", "onnxruntime", "openvino"]
    export(CHECKPOINT, ExportOptions(targets=targets, output=output, batch=STREAMS, num_samples=8, golden_steps=8))
    return output


@pytest.fixture
def session(recall_bundle: Path, target: str) -> Iterator[nsm.Session]:
    with nsm.open(recall_bundle, target) as opened:
        yield opened


@pytest.mark.parametrize(
    ("pairs", "wanted"),
    [(16, [4, 4, 8, 8, 16, 16, 16, 16, 16, 16]), (4, [4] * 10), (6, [4, 4] + [6] * 8), (2, [2] * 10)],
)
def test_pairs_grow_up_to_what_was_asked_for(task: ModuleType, pairs: int, wanted: list[int]) -> None:
    assert [task.pairs_at(update, 10, pairs) for update in range(10)] == wanted


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ("--routing topk --top-k 2", {"routing": "topk", "top_k": 2}),
        ("--routing sparsemax --consolidate-every 2", {"routing": "sparsemax", "consolidate_every": 2}),
        ("--states 18 --hierarchy 2 --hierarchy 4", {"hierarchy": [2, 4], "num_states": 18}),
        ("--routing entmax --gate lstm --communication", {"routing": "entmax", "communication": True}),
        ("--gate lstm --memory-rows 3", {"memory_rows": 3, "gate_type": "lstm"}),
    ],
)
def test_what_is_asked_for_is_trained_and_shown_with_what_it_recalls(
    options: str, changed: dict[str, Any], task: ModuleType, tmp_path: Path
) -> None:
    small = "--steps 2 --width 8 --state-dim 8"
    output = str(tmp_path / "r.pt")
    result = CliRunner().invoke(task.main, [*small.split(), *options.split(), "--streams", "2", "--output", output])
    assert result.exit_code == 0, (result.output, result.exception)
    said = re.search(r"r\.pt: [\d,]+ parameters, recall [\d.]+% of 4000 questions, with (.*)\n", result.stdout)
    assert said is not None, result.stdout
    assert sorted(said[1].split()) == sorted(f"{small} {options} --streams 2".split())
    config = nsm.load(tmp_path / "r.pt").config
    assert {name: config[name] for name in changed} == changed


def _with_fresh_banks(state: Arrays, initial: Arrays) -> Arrays:
    """The state with the banks, and nothing else, as at the start of a stream."""
    banks = [name for name in state if name.endswith((".bank", ".cell"))]
    assert sum(name.endswith(".bank") for name in banks) == 2
    return {**state, **{name: initial[name] for name in banks}}


def _asked_from(wanted: Array, task: ModuleType) -> int:
    """The first token of the questions, at a chunk's beginning, so that nothing of the pairs waits to be written."""
    first = int(np.argwhere(wanted != task.NOT_ASKED)[:, 1].min())
    assert first % task.CHUNK == 0
    return first


def test_the_questions_lie_outside_the_windows(task: ModuleType, streams: tuple[Array, Array]) -> None:
    model = nsm.load(CHECKPOINT)
    assert isinstance(model, SimpleNSM)
    # A token sees the tokens of its window and, through the convolutions, three more in each layer.
    reach = sum(
        layer.attention.local.window - 1 + layer.mixing.width - 1
        for layer in model.layers
        if isinstance(layer, NSMLayer)
    )
    ids, wanted = streams
    last_shown = int(np.argwhere(ids[:, : _asked_from(wanted, task)] >= task.NOISE)[:, 1].max())
    assert 0 < reach < _asked_from(wanted, task) - last_shown


def test_pytorch_remembers(task: ModuleType, streams: tuple[Array, Array]) -> None:
    ids, wanted = streams
    with torch.no_grad():
        logits = nsm.load(CHECKPOINT)(torch.from_numpy(ids))
    assert task.accuracy(logits.numpy(), wanted) >= LEARNED


def test_pytorch_forgets_with_the_bank(task: ModuleType, streams: tuple[Array, Array]) -> None:
    ids, wanted = streams
    model = nsm.load(CHECKPOINT)
    split = _asked_from(wanted, task)
    with torch.no_grad():
        _, state = model(torch.from_numpy(ids[:, :split]), return_state=True)
        arrays = {name: value.numpy() for name, value in state.items()}
        initial = {name: value.numpy() for name, value in model.initial_state(STREAMS).items()}
        fresh = {name: torch.from_numpy(value.copy()) for name, value in _with_fresh_banks(arrays, initial).items()}
        logits = model(torch.from_numpy(ids[:, split:]), fresh)
    assert task.accuracy(logits.numpy(), wanted[:, split:]) <= AT_CHANCE


def test_every_target_remembers(session: nsm.Session, task: ModuleType, streams: tuple[Array, Array]) -> None:
    ids, wanted = streams
    assert task.accuracy(session.run(ids)["outputs"], wanted) >= LEARNED


def test_every_target_forgets_with_the_bank(
    session: nsm.Session, task: ModuleType, streams: tuple[Array, Array]
) -> None:
    ids, wanted = streams
    split = _asked_from(wanted, task)
    initial = session.read_state()
    session.run(ids[:, :split])
    session.load_state(_with_fresh_banks(session.read_state(), initial))
    logits = session.run(ids[:, split:])["outputs"]
    assert task.accuracy(logits, wanted[:, split:]) <= AT_CHANCE
