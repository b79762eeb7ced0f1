"""examples/design_choices.py: every choice it names makes a model, and the rows hold what they say."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY: dict[str, Any] = {
    "vocab_size": 256,
    "d_model": 16,
    "state_dim": 16,
    "num_states": 6,
    "num_heads": 2,
    "num_layers": 1,
    "gate_type": "mingru",
}


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example as it is."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield importlib.import_module("design_choices")
    for name in {"design_choices", "compare"} - before:
        sys.modules.pop(name, None)


@pytest.fixture
def design(whole: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example on a tiny model."""
    monkeypatch.setattr(whole.compare, "NSM", TINY)
    return whole


@pytest.mark.slow
def test_every_choice_makes_a_model(design: ModuleType) -> None:
    sizes = {
        name: sum(p.numel() for p in design.build(changes).parameters()) for name, changes in design.CHOICES.items()
    }
    assert sizes["gate gru"] > sizes["as compared"] > 0
    assert design.adaptive().state_manager.num_active_states == TINY["num_states"] // 2


def test_depth_and_width_are_compared_at_equal_parameters(whole: ModuleType) -> None:
    assert {"d=256", "d=512", "3 layers", "4 layers"} <= set(whole.EQUAL_PARAMETERS) <= set(whole.CHOICES)
    with torch.device("meta"):
        models = [whole.build(changes) for changes in ({}, *whole.EQUAL_PARAMETERS.values())]
    sizes = [sum(p.numel() for p in model.parameters()) for model in models]
    assert sizes == [pytest.approx(sizes[0], rel=0.03)] * len(sizes)


@pytest.mark.slow
def test_the_rows_are_ratios_to_the_first(design: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(design, "CHOICES", {"as compared": {}, "never consolidated": {"consolidate_every": 0}})
    output = tmp_path / "rows.json"
    result = CliRunner().invoke(design.main, ["--rounds", "2", "--calls", "5", "--output", str(output)])
    assert result.exit_code == 0, result.output
    first, *others = json.loads(output.read_text())
    assert (first["choice"], first["step"], first["decode"]) == ("as compared", 1.0, 1.0)
    assert [row["choice"] for row in others] == ["never consolidated", "slots that adapt"]
    for row in (first, *others):
        # bf16 has 8 bits: it is off, and not by much. Not every processor has it.
        assert row["bf16_logits"] is None or 0 < row["bf16_logits"] < 0.5
        assert row["parameters"] > 0
