from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

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
    "one_step",
    "free_run",
    "split",
    "drift_exponent",
    "state_error",
    "argmax_agreement",
    "unexcused_flips",
    "kl",
    "mask_mismatches",
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
    assert "onnxruntime: 8 streams of 64 steps (recorded)" in text
    assert "drift exponent" in text
    assert "Checking onnxruntime" in result.stderr


@pytest.mark.parametrize("steps", ["0", "-1", "65"])
def test_steps_that_were_not_recorded_are_refused(exported: Path, steps: str) -> None:
    refused(
        invoke("parity", exported, "--steps", steps), 2, "between 1 and the 64 that were recorded", f"given {steps}"
    )


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
    assert "Nothing could be compared on this machine" in result.stderr
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
