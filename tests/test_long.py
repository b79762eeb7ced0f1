"""The checks that CI has no time for: `make test-long`, about ten minutes on 2 cores. Results: docs/measurements.md."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nsm.export.pipeline import ExportOptions, export
from nsm.runtimes.budgets import find_budget
from nsm.runtimes.opening import open_artifact
from nsm.runtimes.parity import compare

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def _train(folder: Path, example: str) -> float:
    """Run a training example as a user would; the share of right answers that it reports."""
    command = [sys.executable, str(EXAMPLES / example)]
    shown = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    found = re.search(r"(?:accuracy|recall) ([\d.]+)%", shown)
    assert found is not None, shown
    return float(found[1]) / 100


def test_digits_are_learned_and_4096_steps_of_them_do_not_drift(tmp_path: Path) -> None:
    """The model was trained on chained digits, so its streams may go on for as long as they like."""
    assert _train(tmp_path, "train_digits.py") >= 0.95
    targets = ["onnxruntime", "openvino"]
    options = ExportOptions(targets=targets, output=tmp_path / "long.nsm", batch=8, golden_steps=4096)
    bundle = export(tmp_path / "digits.pt", options)
    trace = bundle.trace()
    assert (trace.streams, trace.steps) == (8, 4096)
    for artifact in bundle.manifest.artifacts:
        with open_artifact(bundle, artifact) as session:
            report = compare(trace, session, find_budget("fp32"))
        assert report.passed
        assert report.drift is not None
        assert report.drift.high < 0.1


def test_recall_is_learned(tmp_path: Path) -> None:
    assert _train(tmp_path, "train_recall.py") >= 0.95
