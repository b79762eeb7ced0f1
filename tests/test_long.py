"""What takes longest of `make test-long`: training, and streams of 4096 steps. Results: docs/measurements.md."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nsm.bundle import PARITY, Bundle
from nsm.errors import ParityError
from nsm.export.options import ExportOptions
from nsm.export.pipeline import export
from nsm.runtimes.parity.budgets import find_budget
from nsm.runtimes.parity.report import WORST_FLOOR
from nsm.staging import FAILED_SUFFIX

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def _train(folder: Path, example: str) -> float:
    """Run a training example as a user would; the share of right answers that it reports."""
    command = [sys.executable, str(EXAMPLES / example)]
    shown = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    found = re.search(r"(?:accuracy|recall) ([\d.]+)%", shown)
    assert found is not None, shown
    return float(found[1]) / 100


def test_digits_are_learned_and_4096_steps_of_them_are_as_exact_as_the_model_is(tmp_path: Path) -> None:
    """It depends on how training went whether a model amplifies rounding over streams far longer than it has seen.

    Where this one does, its own fp32 is further from its fp64 than any artifact is from its fp32, and the export is
    refused with that reason; where it does not, the artifacts are within their budget.
    """
    assert _train(tmp_path, "train_digits.py") >= 0.95
    options = ExportOptions(["onnxruntime", "openvino"], output=tmp_path / "long.nsm", batch=8, golden_steps=4096)
    try:
        bundle = export(tmp_path / "digits.pt", options)
    except ParityError:
        bundle = Bundle(tmp_path / f"long.nsm{FAILED_SUFFIX}")
    reports = bundle.json(PARITY)["results"]
    assert [(report["streams"], report["steps"]) for report in reports] == [(8, 4096)] * 2
    for report in reports:
        assert report["one_step"]["p99"] <= find_budget("fp32").one_step_p99
        assert report["argmax_agreement"] > 0.999
        if report["status"] == "failed":
            assert report["conditioning_floor"] > WORST_FLOOR


def test_recall_is_learned(tmp_path: Path) -> None:
    assert _train(tmp_path, "train_recall.py") >= 0.95
