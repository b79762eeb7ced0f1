"""Every example runs, as its own docstring says, and the README shows what the repository holds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import nsm

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def _run(folder: Path, *arguments: str) -> str:
    result = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with digits.pt, trained for a moment, and digits.nsm."""
    folder = tmp_path_factory.mktemp("digits")
    shown = _run(folder, str(EXAMPLES / "train_digits.py"), "--steps", "2", "--batch", "4")
    assert re.search(r"digits\.pt: [\d,]+ parameters, test accuracy [\d.]+% on chained digits", shown)
    targets = ["--target", "onnxruntime", "--target", "openvino", "--target", "tensorrt"]
    shown = _run(folder, "-m", "nsm.export", "digits.pt", *targets, "--output", "digits.nsm", "--golden-steps", "9")
    assert "Wrote digits.nsm" in shown
    return folder


@pytest.mark.slow
def test_the_report_compares_every_target(digits: Path) -> None:
    shown = _run(digits, str(EXAMPLES / "report_digits.py"), "digits.pt", "digits.nsm", "--steps", "10")
    assert "pytorch" in shown
    for target in ("onnxruntime", "openvino"):
        (line,) = (line for line in shown.splitlines() if line.strip().startswith(target))
        assert "100.00%" in line
    assert "built, not run: no GPU here" in shown or "tensorrt" in shown


@pytest.mark.slow
def test_plain_onnxruntime_streams_the_graph(digits: Path) -> None:
    shown = _run(digits, str(EXAMPLES / "plain_onnxruntime.py"), "digits.nsm")
    assert [line.split()[0] for line in shown.splitlines()] == [str(step) for step in range(8)]
    assert "import nsm" not in (EXAMPLES / "plain_onnxruntime.py").read_text()


class Filter(torch.nn.Module):
    """Two outputs of a state, from vectors."""

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        h = 0.5 * h + x
        return h.cumsum(-1), h.flip(-1) * 2, h


def test_plain_onnxruntime_streams_vectors_and_several_outputs(tmp_path: Path) -> None:
    step = nsm.as_step(Filter(), [torch.full((1, 4), 0.25)], token_shape=(4,), outputs=("sum", "back"))
    nsm.export_model(step, "onnx", tmp_path / "filter.nsm", batch=2, golden_steps=8)
    shown = _run(tmp_path, str(EXAMPLES / "plain_onnxruntime.py"), "filter.nsm")
    random, h = np.random.default_rng(0), np.full((2, 4), 0.25, np.float32)
    wanted = []
    for index in range(8):
        h = np.float32(0.5) * h + random.standard_normal((2, 1, 4), np.float32)[:, 0]
        wanted.append(f"{index} sum={h[0].cumsum().argmax()} back={h[0, ::-1].argmax()}")
    assert shown.splitlines() == wanted


@pytest.mark.slow
def test_the_recall_example_trains_and_saves(tmp_path: Path) -> None:
    shown = _run(
        tmp_path, str(EXAMPLES / "train_recall.py"), "--steps", "2", "--grow", "--streams", "8", "--output", "recall.pt"
    )
    assert re.search(r"recall\.pt: [\d,]+ parameters, recall [\d.]+% of 4000 questions", shown)


def test_the_documentation_shows_the_plain_example_as_it_is() -> None:
    body = (EXAMPLES / "plain_onnxruntime.py").read_text().split('"""', 2)[2].strip()
    assert f"```python\n{body}\n```" in (ROOT / "docs/plain-onnxruntime.md").read_text()


@pytest.mark.slow
def test_calibrating_on_rollouts_is_compared_with_random_states(tmp_path: Path) -> None:
    model = str(ROOT / "tests" / "data" / "recall.pt")
    shown = _run(tmp_path, str(EXAMPLES / "calibration.py"), model, "--steps", "12")
    lines = [line.strip() for line in shown.splitlines()]
    (real,) = (line for line in lines if line.startswith("rollouts"))
    (made_up,) = (line for line in lines if line.startswith("random states"))
    assert 0 < float(real.split()[1]) < 0.2
    (second,) = (line for line in lines if line.startswith("int8 rollouts"))
    assert real.split()[1:] != made_up.split()[2:]
    assert 0 < float(second.split()[2]) < 0.2


@pytest.mark.slow
def test_quantizers_are_compared_on_a_trained_model(tmp_path: Path) -> None:
    _run(tmp_path, str(EXAMPLES / "train_digits.py"), "--width", "128", "--steps", "20", "--output", "digits.pt")
    shown = _run(tmp_path, str(EXAMPLES / "quantizers.py"), "digits.pt", "--output", "quantizers.json")
    assert "nsm int8 (dynamic)" in shown
    found = json.loads((tmp_path / "quantizers.json").read_text())["results"]
    assert found[0]["quantizer"] == "fp32"
    assert len(found) >= 4
    assert all(row["free_run_p99"] > 0 for row in found[1:])


@pytest.mark.slow
def test_the_compared_model_is_saved_with_sequences(tmp_path: Path) -> None:
    _run(tmp_path, str(EXAMPLES / "compared_model.py"), "--output", "compared.pt")
    _run(tmp_path, "-m", "nsm.export", "compared.pt", "-t", "openvino", "-p", "int8", "--dry-run")


@pytest.mark.slow
def test_openvinos_own_cache_gives_the_same_answers(tmp_path: Path) -> None:
    # The script compares outputs before it measures.
    shown = _run(tmp_path, str(EXAMPLES / "stateful_cache.py"), "--contexts", "512", "--rounds", "1")
    assert re.search(r"512 +\d+ +\d+ +[\d.]+x", shown)


def test_one_thread_is_compared_with_two(exported: Path, tmp_path: Path) -> None:
    shown = _run(tmp_path, str(EXAMPLES / "threads.py"), str(exported), "--steps", "50", "--target", "onnxruntime")
    assert re.search(r"[\d.]+ MFLOP and [\d.]+ MB per call", shown)
    assert re.search(r"onnxruntime +\d+ +\d+ +[\d.]+x \([\d.]+-[\d.]+\) +[\d.]+x", shown)


@pytest.mark.slow
def test_foreign_models_are_exported_in_fp32_and_int8(tmp_path: Path) -> None:
    shown = _run(tmp_path, str(EXAMPLES / "foreign_models.py"), "--steps", "64")  # fewer: states near zero
    assert len(re.findall(r"(?:fp32|int8) +(?:onnxruntime|openvino) +\d\.\de-\d\d +\d+", shown)) == 5 * 4


@pytest.mark.slow
def test_what_low_precision_does_to_recall_is_measured(tmp_path: Path) -> None:
    model = str(ROOT / "tests" / "data" / "recall.pt")
    options = ("--steps", "64", "--only", "onnxruntime", "--output", "rows.json")
    shown = _run(tmp_path, str(EXAMPLES / "low_precision.py"), "recall", model, *options)
    assert "onnxruntime" in shown
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["precision"] for row in rows] == ["fp32", "int8", "int8-weights"]
    assert all(row["score"] > 0.95 for row in rows if row["status"] == "ok")


@pytest.mark.slow
def test_no_publicly_reported_fault_is_silently_wrong(tmp_path: Path) -> None:
    shown = _run(tmp_path, str(EXAMPLES / "public_reports.py"), "--output", "reports.json")  # 0: as expected
    assert ": 0 silently wrong, 0 not as expected" in shown
    outcomes = json.loads((tmp_path / "reports.json").read_text())
    verdicts = [one["verdict"] for one in outcomes]
    assert min(verdicts.count(verdict) for verdict in ("equal", "refused", "stops")) >= 2
    assert all(one["tokens"] >= 500 for one in outcomes if one["verdict"] == "equal")
    assert "| lane 0's position for all |" in (tmp_path / "reports.md").read_text()


def test_no_example_is_left_out() -> None:
    run_here = {"digits", "train_digits", "report_digits", "plain_onnxruntime", "train_recall"}
    run_here |= {"calibration", "compared_model", "foreign_models", "low_precision", "stateful_cache", "threads"}
    run_here |= {"public_reports", "quantizers", "reported_models", "reported_files"}
    run_elsewhere = {
        "text",
        "train_text",
        "compare",
        "design_choices",
        "gallery",
        "visualize",
    }  # test_example_*.py, nsm/utils
    assert {path.stem for path in EXAMPLES.glob("*.py")} == run_here | run_elsewhere
