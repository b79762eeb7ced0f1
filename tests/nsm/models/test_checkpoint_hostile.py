"""Checkpoints that ask for far more than they hold: refused in little time and memory, and with a reason."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nsm.baselines import RWKVLM, MambaLM, RecurrentLM, TransformerLM
from nsm.errors import CheckpointError, ConfigError
from nsm.models import checkpoint_limits
from nsm.models.adaptive import AdaptiveNSM
from nsm.models.base import StepModel
from nsm.models.checkpoint import load_checkpoint, save
from nsm.models.checkpoint_limits import DEEPEST, check_content
from nsm.models.hybrid import HybridModel
from nsm.models.simple import SimpleNSM

KINDS: dict[str, Callable[[], StepModel]] = {
    "SimpleNSM": lambda: SimpleNSM(vocab_size=9, d_model=8, num_states=3, num_layers=2, num_heads=2, chunk_size=4),
    "AdaptiveNSM": lambda: AdaptiveNSM(input_dim=5, state_dim=8, max_states=6, initial_states=3, num_layers=2),
    "HybridModel": lambda: HybridModel(vocab_size=9, d_model=8, state_dim=16, num_states=3, num_heads=2, chunk_size=4),
    "TransformerLM": lambda: TransformerLM(9, 8, 2, 2, context=8, chunk_size=4),
    "RecurrentLM": lambda: RecurrentLM(9, 8, 2),
    "RWKVLM": lambda: RWKVLM(9, 8, 2),
    "MambaLM": lambda: MambaLM(9, 8, 2),
}
SMALL = 300 << 20
"""Bytes of memory, more than the process has after its imports, within which everything here is refused."""

_LOAD = """
import resource, sys, time
import torch
from nsm.errors import CheckpointError
from nsm.models.checkpoint import load_checkpoint
torch.set_num_threads(1)
load_checkpoint(sys.argv[1])
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(sys.argv[2]),) * 2)
for path in sys.argv[3:]:
    began = time.process_time()
    try:
        load_checkpoint(path)
    except CheckpointError as error:
        print(f"refused in {time.process_time() - began:.1f} s: {error}".replace(chr(10), " ")[:2000], flush=True)
    else:
        print("loaded", flush=True)
"""


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return written(KINDS["SimpleNSM"]())


def written(model: StepModel) -> dict[str, Any]:
    """What `save` puts into a file."""
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder, "model.pt"))
        data = torch.load(Path(folder, "model.pt"), weights_only=True)
    assert isinstance(data, dict)
    return data


def refusals(folder: Path, good: Mapping[str, Any], contents: list[dict[str, Any]]) -> list[str]:
    """What a process with little memory left says of each; it first loads a good one."""
    files = [folder / f"{index}.pt" for index in range(len(contents) + 1)]
    for path, item in zip(files, [dict(good), *contents], strict=True):
        torch.save(item, path)
        assert path.stat().st_size < 1 << 20
    command = [sys.executable, "-c", textwrap.dedent(_LOAD), str(files[0]), str(SMALL), *map(str, files[1:])]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def doubled(levels: int) -> list[Any]:
    """A list that is written out in 2 ** levels items, and takes a few bytes."""
    item: list[Any] = ["x"]
    for _ in range(levels):
        item = [item, item]
    return item


def deep(levels: int) -> list[Any]:
    item: list[Any] = []
    for _ in range(levels):
        item = [item]
    return item


def endless() -> list[Any]:
    item: list[Any] = []
    item.append(item)
    return item


def view(*shape: int) -> torch.Tensor:
    """One number that is there any number of times."""
    return torch.zeros(1, dtype=torch.int64).expand(shape)


ASKED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "a config of lists that double": (lambda c: config_with(c, hierarchy=doubled(90)), "more than 1,000,000 items"),
    "a config with a key that doubles": (
        lambda c: config_with(c, more={"a": doubled(40)}),
        "more than 1,000,000 items",
    ),
    "a version of lists that double": (lambda c: {**c, "version": doubled(90)}, "more than 1,000,000 items"),
    "a part that nobody reads": (lambda c: {**c, "more": doubled(90)}, "more than 1,000,000 items"),
    "a list that holds itself": (lambda c: {**c, "version": endless()}, "more than 1,000,000 items"),
    "lists that nest": (lambda c: {**c, "version": deep(200)}, f"nest more than {DEEPEST} deep"),
    "a number without end": (lambda c: config_with(c, feed_forward=10**400), "a number in it has 1,329 bits"),
    "many layers": (lambda c: config_with(c, num_layers=16_777_216), "num_layers=16,777,216, and the file"),
    "more layers than memory": (lambda c: config_with(c, num_layers=1 << 62), "num_layers=4,611,686,018,427,387,904"),
    "many layers of a list": (
        lambda c: config_with(c, num_layers=30, num_states=[3] * 30),
        r"more parameters than the \d+ weights in the file",
    ),
    "many states": (
        lambda c: config_with(c, num_states=1 << 28),
        r"by its config the weight layers\.0\.\S+ is \[\d{9}",
    ),
    "a wide model": (lambda c: config_with(c, d_model=1 << 20), "by its config the weight"),
    "a large vocabulary": (lambda c: config_with(c, vocab_size=1 << 40), "by its config the weight"),
    "more than there are numbers for": (lambda c: config_with(c, vocab_size=1 << 62), "do not make a model"),
    "a chunk of a whole day": (lambda c: config_with(c, chunk_size=1 << 26), "do not make a model: "),
    "calibration that is a view": (
        lambda c: {**c, "calibration": [view(1 << 34)]},
        r"a tensor in it, .17179869184. of torch.int64, has 137,438,953,472 bytes over 8 that are there",
    ),
    "golden that is a view": (lambda c: {**c, "golden": [view(1 << 20, 1 << 14)]}, "over 8 that are there"),
    "the same sequence many times": (
        lambda c: {**c, "calibration": [torch.zeros(10_000, dtype=torch.int64)] * 9_000},
        "its calibration sequences have 720,000,000 bytes, and the whole file",
    ),
    "weights that are views": (
        lambda c: {**c, "weights": {**c["weights"], "embed.weight": view(1 << 40)}},
        "over 8 that are there",
    ),
    "a weight on no device": (
        lambda c: {**c, "weights": {**c["weights"], "embed.weight": torch.zeros(1 << 40, device="meta")}},
        "on meta; expected plain ones on the CPU",
    ),
    "a sparse weight": (
        lambda c: {
            **c,
            "golden": [torch.sparse_coo_tensor(torch.zeros(1, 1), torch.ones(1), (1 << 40,), check_invariants=True)],
        },
        "torch.sparse_coo on cpu; expected plain ones",
    ),
}


def config_with(content: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**content, "config": {**content["config"], **changes}}


def test_what_a_small_checkpoint_may_not_ask_for(content: dict[str, Any], tmp_path: Path) -> None:
    """All in one process, whose imports take longer than the work."""
    said = refusals(tmp_path, content, [make(content) for make, _ in ASKED.values()])
    assert len(said) == len(ASKED)
    for (name, (_, message)), line in zip(ASKED.items(), said, strict=True):
        assert line.startswith("refused in "), (name, line)
        assert float(line.split()[2]) < 5.0, (name, line)
        assert re.search(message, line), (name, line)


def test_states_and_constants_that_no_weight_bounds_have_a_limit(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_limits, "MOST_BYTES", 16)
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"has [\d,]+ bytes of states, and the model [\d,]+ bytes of constants"):
        load_checkpoint(tmp_path / "model.pt")


def test_weights_that_are_made_without_end_are_stopped(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a class whose config has another name for it."""

    class Endless(SimpleNSM):
        def __init__(self, **config: Any) -> None:
            super().__init__(**config)
            while True:
                self.register_buffer(f"b{len(self._buffers)}", torch.zeros(1))

    with pytest.raises(ConfigError, match=r"has more buffers than the \d+ weights"):
        checkpoint_limits.build_within(Endless, content["config"], content["weights"])
    checkpoint_limits.build_within(SimpleNSM, content["config"], content["weights"])  # nothing of it is left


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_loaded_as_it_was_saved(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = KINDS[kind]().eval()
    assert type(model).__name__ == kind
    save(model, tmp_path / "model.pt")
    loaded = load_checkpoint(tmp_path / "model.pt").model
    for (name, value), (other, read) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
        assert name == other
        torch.testing.assert_close(read, value, rtol=0, atol=0)
    assert all(value.device.type == "cpu" for value in (*loaded.parameters(), *loaded.buffers()))


def test_any_size_of_any_model_is_refused_or_right_in_little_time_and_memory(tmp_path: Path) -> None:
    """Every whole number of every config, made large."""
    random.seed(5)
    contents = [written(make()) for make in KINDS.values()]
    changed = [
        config_with(content, **{name: size})
        for content in contents
        for name, value in content["config"].items()
        if isinstance(value, int) and not isinstance(value, bool)
        for size in (random.randrange(1 << 10, 1 << 20), 1 << random.randrange(24, 62))
    ]
    said = refusals(tmp_path, contents[0], changed)
    assert len(said) == len(changed) > 50
    for item, line in zip(changed, said, strict=True):
        assert line == "loaded" or (line.startswith("refused") and float(line.split()[2]) < 5.0), (item["config"], line)
    assert sum(line == "loaded" for line in said) < len(said) / 2


def test_plain_contents_of_any_kind_pass() -> None:
    shared = torch.ones(3)
    check_content({"a": [1, 2.5, None, True, "text", b"bytes", {"b": (shared, shared)}], "golden": [shared]}, 100)
    check_content(np.float64(3), 0)
    check_content({"golden": 3, "calibration": ["text"]}, 0)
    assert json.dumps(doubled(2)) == '[[["x"], ["x"]], [["x"], ["x"]]]'
