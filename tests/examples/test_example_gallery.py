"""Model files that others made, streamed beside a loop over the original file."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "gallery.py"


@pytest.fixture(scope="module")
def gallery() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("gallery", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gallery"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gallery"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs speech: apt-get install espeak-ng")
def test_every_model_streams_as_the_loop_over_its_file(gallery: ModuleType, tmp_path: Path) -> None:
    result = CliRunner().invoke(gallery.main, ["--output", str(tmp_path / "found"), "--files", str(tmp_path)])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "found.json").read_text())
    assert len(rows) == len(gallery.CASES) * len(gallery.TARGETS)
    for row in rows:
        assert row["parity"] == "passed", row
        # ONNX Runtime optimizes the graph, and OpenVINO computes in another order.
        assert row["error"] < 1e-4, row
        if row["speech"] is not None:
            assert row["speech"] > 0.5, row
            assert row["noise"] < 0.1, row


def test_a_frame_has_the_context_before_it(gallery: ModuleType) -> None:
    frames = gallery.framed(4, 4, 2)(np.arange(1, 13, dtype=np.float32))
    assert frames.tolist() == [[0, 0, 1, 2, 3, 4], [3, 4, 5, 6, 7, 8], [7, 8, 9, 10, 11, 12]]
