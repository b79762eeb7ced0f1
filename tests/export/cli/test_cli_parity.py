from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nsm.bundle import Bundle
from nsm.export.cli import parity as parity_command
from nsm.manifest import Artifact
from nsm.results import AcceptedBudget
from nsm.runtimes.opening.artifacts import open_artifact
from nsm.runtimes.parity.comparison import compare
from nsm.runtimes.parity.report import ArgmaxChange, ParityReport
from nsm.runtimes.session.session import Session
from tests.export.helpers import (
    invoke,
    refused,
    spoil,
    succeeded,
    the_json,
)

RESULT_KEYS = {
    "target",
    "precision",
    "status",
    "streams",
    "steps",
    "state_streams",
    "sampled_steps",
    "one_step",
    "free_run",
    "split",
    "staggered",
    "drift_exponent",
    "free_run_mean",
    "gain",
    "argmax_changes",
    "argmax_changes_left_off",
    "state_error",
    "state_error_by_layer",
    "state_error_by_age",
    "argmax_agreement",
    "unexcused_argmax_changes",
    "kl",
    "mask_mismatches",
    "mask_decisions",
    "mask_decisions_per_1000_steps",
    "first_divergence",
    "budget",
}


def test_parity_prints_one_json_object(exported: Path, no_gpu: None) -> None:
    result = invoke("parity", exported, "--json")
    succeeded(result)
    assert result.stderr == ""
    data = the_json(result)
    assert data["passed"] is True
    by_target = {item["target"]: item for item in data["results"]}
    assert list(by_target) == ["onnx", "onnxruntime", "openvino", "tensorrt"]
    assert by_target["tensorrt"]["status"] == "not_run"
    assert "no usable NVIDIA GPU" in by_target["tensorrt"]["reason"]
    for name in ("onnx", "onnxruntime", "openvino"):
        item = by_target[name]
        assert set(item) >= RESULT_KEYS
        assert {"p50", "p99", "max"} <= set(item["one_step"])
        assert {"p50", "p99", "max"} <= set(item["free_run"])
        assert {"p50", "p99", "max"} <= set(item["split"])
        assert set(item["state_error"]) == {"p99", "max"}
        assert set(item["kl"]) == {"mean", "p999"}
        assert set(item["state_error_by_layer"]) == {"0.bank", "1.bank"}
        assert set(item["state_error_by_layer"]["0.bank"]) == {"p50", "p99", "max"}
        assert item["state_error_by_age"][0]["from"] == 1
        assert set(item["state_error_by_age"][0]) == {"from", "to", "p50", "p99"}
        assert 0 < item["free_run_mean"] < item["free_run"]["max"]
        assert set(item["gain"]) == {"ratio", "tensor"}
        assert (item["argmax_changes"], item["argmax_changes_left_off"]) == ([], 0)
        assert "quantization" not in item
        assert (item["mask_decisions"], item["mask_decisions_per_1000_steps"]) == (0, 0.0)
        assert "bisect" not in item
        assert (item["status"], item["streams"], item["steps"]) == ("passed", 8, 64)
        assert 0 < item["free_run"]["p99"] < item["budget"]["free_run_p99"]


def test_parity_of_one_target_over_fewer_steps(exported: Path) -> None:
    result = invoke("parity", exported, "--target", "ov", "--steps", "5", "--json")
    succeeded(result)
    ((item,),) = (the_json(result)["results"],)
    assert (item["target"], item["steps"], item["status"]) == ("openvino", 5, "passed")


def test_parity_for_people(exported: Path) -> None:
    result = invoke("parity", exported, "-t", "ort")
    text = succeeded(result)
    assert "passed" in text
    trace = Bundle(exported).trace()
    assert (
        f"onnxruntime: 8 streams of 64 steps (recorded), states of {trace.state_streams} at {len(trace.sampled)} of "
        "the steps"
    ) in text
    assert "drift exponent" in text
    assert re.search(r", gain \d+\.\d\d of \S+\n", text)
    assert "Checking onnxruntime" in result.stderr


@pytest.mark.parametrize("steps", ["0", "-1", "65"])
def test_steps_that_were_not_recorded_are_refused(exported: Path, steps: str) -> None:
    refused(invoke("parity", exported, "--steps", steps), 2, "between 1 and 64", f"given {steps}")


def test_a_bundle_that_is_another_model_ends_with_5(bundle_copy: Path) -> None:
    spoil(bundle_copy)
    result = invoke("parity", bundle_copy, "--target", "onnxruntime", "--json")
    assert result.exit_code == 5
    assert "Parity failed on onnxruntime fp32: " in result.stderr
    data = the_json(result)
    assert data["passed"] is False
    (item,) = data["results"]
    assert item["status"] == "failed"
    assert item["failures"]
    assert item["first_divergence"]["step"] == 0
    text = invoke("parity", bundle_copy, "--target", "onnxruntime").stdout
    assert "first over budget: stream 0, step 0" in text
    assert "failed" in text


def test_one_good_target_does_not_excuse_a_wrong_one(bundle_copy: Path) -> None:
    spoil(bundle_copy)
    result = invoke("parity", bundle_copy, "--json")
    assert result.exit_code == 5
    statuses = {item["target"]: item["status"] for item in the_json(result)["results"]}
    assert (statuses["openvino"], statuses["onnx"]) == ("passed", "failed")


@pytest.mark.parametrize("as_json", [False, True])
def test_nothing_compared_ends_with_5(bundle_copy: Path, no_gpu: None, as_json: bool) -> None:
    result = invoke("parity", bundle_copy, "--target", "trt", *(["--json"] if as_json else []))
    assert result.exit_code == 5
    assert "No target could be compared on this machine" in result.stderr
    if as_json:
        data = the_json(result)
        assert data["passed"] is False
        assert [item["status"] for item in data["results"]] == ["not_run"]
    else:
        assert "tensorrt: not run. There is no usable NVIDIA GPU" in result.stdout


def test_parity_without_a_backend_says_what_installs_it(exported: Path, hide: Callable[..., None]) -> None:
    hide("openvino")
    text = succeeded(invoke("parity", exported, "--steps", "2"))
    assert "openvino: not run." in text
    assert 'pip install "nsm-toolkit[openvino]"' in text


# -- bisecting ----------------------------------------------------------------------------------------------------


def test_bisecting_what_is_right_says_so(exported: Path, no_gpu: None) -> None:
    result = invoke("parity", exported, "--bisect", "--steps", "8")
    text = succeeded(result)
    assert text.count("bisected: Nothing is over budget") == 3
    assert "Bisecting openvino" in result.stderr


def test_bisecting_what_is_wrong_names_it_and_still_ends_with_5(bundle_copy: Path) -> None:
    spoil(bundle_copy)
    result = invoke("parity", bundle_copy, "-t", "ort", "--steps", "4", "--bisect", "--json")
    assert result.exit_code == 5
    (item,) = the_json(result)["results"]
    found = item["bisect"]
    assert {"kind", "name", "op", "error"} <= set(found)
    assert found["kind"] == "operation"
    assert found["error"] > item["budget"]["one_step_p99"]
    assert "The portable graph itself" in found["explanation"]


@pytest.mark.parametrize("target", ["tensorrt", "trt"])
def test_an_engine_cannot_be_bisected(exported: Path, target: str) -> None:
    refused(
        invoke("parity", exported, "-t", target, "--bisect"), 3, "shows no intermediate results", "--target onnxruntime"
    )


def test_an_engine_beside_others_is_left_out(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_gpu(bundle: Bundle, artifact: Artifact) -> Session:
        """What an engine would do, done by ONNX Runtime."""
        session = open_artifact(bundle, bundle.artifact("onnxruntime"))
        session.target = artifact.target
        return session

    monkeypatch.setattr(parity_command, "open_artifact", with_gpu)
    result = invoke("parity", exported, "--bisect", "--steps", "2")
    succeeded(result)
    assert "tensorrt: not bisected" in result.stderr
    assert result.stdout.count("bisected:") == 3


def test_bisecting_needs_onnx_only_to_name_an_operation(bundle_copy: Path, hide: Callable[..., None]) -> None:
    hide("onnx")
    succeeded(invoke("parity", bundle_copy, "-t", "ort", "--steps", "2", "--bisect"))
    spoil(bundle_copy)
    refused(invoke("parity", bundle_copy, "-t", "ort", "--steps", "2", "--bisect"), 3, "needs the package onnx")


# -- the page -----------------------------------------------------------------------------------------------------


def test_the_page_shows_every_target(exported: Path, no_gpu: None, tmp_path: Path) -> None:
    page = tmp_path / "parity.html"
    text = succeeded(invoke("parity", exported, "--html", page))
    assert f"Wrote {page}: open it in a browser." in text
    written = page.read_text(encoding="utf-8")
    for name in ("onnx", "onnxruntime", "openvino"):
        assert f"✓ {name} passed" in written
    assert "? tensorrt not run" in written
    assert "There is no usable NVIDIA GPU" in written
    assert "Parity of model.nsm" in written


def test_the_page_of_the_folder_one_is_in_has_its_name(
    bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle_copy)
    page = tmp_path / "parity.html"
    succeeded(invoke("parity", ".", "-t", "ort", "--steps", "4", "--html", page))
    assert f"<title>Parity of {bundle_copy.name}</title>" in page.read_text(encoding="utf-8")


def test_a_failure_gets_its_page_too(bundle_copy: Path, tmp_path: Path) -> None:
    spoil(bundle_copy)
    page = tmp_path / "parity.html"
    result = invoke("parity", bundle_copy, "-t", "ort", "--steps", "4", "--html", page, "--bisect", "--json")
    assert result.exit_code == 5
    assert the_json(result)["passed"] is False
    written = page.read_text(encoding="utf-8")
    assert "✗ onnxruntime failed" in written
    assert "<b>Bisected:</b> The portable graph itself" in written


def test_a_page_without_a_folder_is_refused_before_any_work(exported: Path, tmp_path: Path) -> None:
    result = invoke("parity", exported, "--html", tmp_path / "none" / "parity.html")
    refused(result, 2, "The folder", "of --html does not exist.")
    assert "Checking" not in result.stderr


def test_a_page_replaces_a_page_and_nothing_else(exported: Path, tmp_path: Path) -> None:
    page = tmp_path / "thesis.html"
    page.write_text("<!doctype html>\nyears of work")
    result = invoke("parity", exported, "-t", "ort", "--steps", "2", "--html", page)
    refused(result, 2, "thesis.html exists and is not a parity page, so it is not replaced")
    assert page.read_text() == "<!doctype html>\nyears of work"
    page.unlink()
    for _ in range(2):
        succeeded(invoke("parity", exported, "-t", "ort", "--steps", "2", "--html", page))


def test_the_decisions_of_an_adaptive_model_are_checked_with_its_thresholds(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []

    def watched(*arguments: Any) -> ParityReport:
        seen.append(arguments[4])
        return compare(*arguments)

    monkeypatch.setattr(parity_command, "compare", watched)
    monkeypatch.setattr(parity_command, "thresholds_of", lambda config: (config["d_model"], 0.35))
    succeeded(invoke("parity", exported, "-t", "ort", "--steps", "1"))
    assert seen == [(16, 0.35)]


def test_flips_without_excuse_are_named(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argmax_changes = (
        *(ArgmaxChange(1, 5, token, 0, 3, 7, 0.25, False) for token in range(5)),
        ArgmaxChange(0, 0, 0, 0, 1, 2, 1e-5, True),
    )

    def flipped(*arguments: Any) -> ParityReport:
        return replace(
            compare(*arguments), argmax_changes=argmax_changes, unexcused_argmax_changes=5, excused_argmax_changes=1
        )

    monkeypatch.setattr(parity_command, "compare", flipped)
    text = succeeded(invoke("parity", exported, "-t", "ort", "--steps", "1"))
    assert "argmax changes 5 + 1 excused" in text
    assert "  argmax change, not excused: stream 1, step 5, token 0: 7 instead of 3 (margin 2.50e-01)" in text
    assert text.count("argmax change, not excused") == 3
    assert "and 2 more; --json and --html list the first 100" in text
    monkeypatch.undo()


def test_excused_decisions_are_printed(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity_command, "compare", lambda *arguments: replace(compare(*arguments), mask_decisions=2))
    assert "mask decisions excused 2" in succeeded(invoke("parity", exported, "-t", "ort", "--steps", "1"))
    monkeypatch.undo()
    assert "mask decisions excused" not in succeeded(invoke("parity", exported, "-t", "ort", "--steps", "1"))


def test_an_accepted_budget_is_recorded_and_shown(bundle_copy: Path) -> None:
    refused(
        invoke("build", bundle_copy, "-t", "ort", "--force", "--budget", "output=1"), 2, "names 'output'", "outputs"
    )
    refused(invoke("build", bundle_copy, "-t", "ort", "--force", "--budget", "outputs"), 2, "expects NAME=VALUE")
    budgets = ("--budget", "outputs=5e-4", "--budget", "0.bank=abs:0.5")
    succeeded(invoke("build", bundle_copy, "-t", "ort", "--force", *budgets))
    accepted = Bundle(bundle_copy).artifact("onnxruntime").accepted
    assert accepted == (AcceptedBudget("outputs", 5e-4), AcceptedBudget("0.bank", 0.5, absolute=True))
    text = succeeded(invoke("parity", bundle_copy, "-t", "ort", "--steps", "4"))
    assert "accepted by --budget outputs=0.0005: free-run error " in text
    assert "accepted by --budget 0.bank=abs:0.5: free-run error " in text
    (result,) = the_json(invoke("parity", bundle_copy, "-t", "ort", "--steps", "4", "--json"))["results"]
    assert result["accepted"][0] == {"tensor": "outputs", "limit": 5e-4, "absolute": False}
