from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nsm.bundle import Bundle
from tests.export.helpers import (
    invoke,
    keep_only,
    refused,
    succeeded,
    the_json,
)


def test_bench_prints_one_json_object(exported: Path, no_gpu: None) -> None:
    result = invoke("bench", exported, "--steps", "60", "--threads", "1", "--json")
    succeeded(result)
    assert result.stderr == ""
    results = the_json(result)["results"]
    assert [item["target"] for item in results] == ["onnx", "onnxruntime", "openvino"]
    bundle = Bundle(exported)
    for item in results:
        assert {"target", "precision", "steps", "latency_us", "tokens_per_second", "peak_rss_mb", "artifact_mb"} <= set(
            item
        )
        assert (item["precision"], item["effective_precision"], item["steps"]) == ("fp32", "fp32", 60)
        assert 0 < item["latency_us"]["p50"] <= item["latency_us"]["p99"]
        assert item["tokens_per_second"] == pytest.approx(16 / item["latency_us"]["p50"] * 1e6)
        assert item["peak_rss_mb"] > 10
        assert item["artifact_mb"] == pytest.approx(bundle.artifact(item["target"]).nbytes / 1e6)


def test_bench_for_people_says_what_was_left_out(exported: Path, hide: Callable[..., None], no_gpu: None) -> None:
    hide("openvino")
    result = invoke("bench", exported, "--steps", "10")
    text = succeeded(result)
    assert "10 calls of 8 tokens on 2 lanes" in text
    assert "1.00x" in text
    assert "Peak memory of this process" in text
    remarks = " ".join(result.stderr.split())
    assert "openvino: not measured. The target openvino needs" in remarks
    assert "tensorrt: not measured. There is no usable NVIDIA GPU" in remarks


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--steps", "9"], ["at least 10 steps; given 9"]),
        (["--threads", "0"], ["--threads is at least 1; given 0"]),
        (["--target", "coreml"], ["There is no target 'coreml'"]),
    ],
)
def test_a_wrong_benchmark_is_refused(exported: Path, options: list[str], parts: list[str]) -> None:
    result = invoke("bench", exported, *options, "--json")
    refused(result, 2, *parts)


def test_bench_of_a_target_without_its_hardware_ends_with_3(exported: Path, no_gpu: None) -> None:
    refused(invoke("bench", exported, "-t", "trt"), 3, "no usable NVIDIA GPU in this machine")


def test_bench_of_a_bundle_that_runs_nowhere_here_ends_with_3(bundle_copy: Path, no_gpu: None) -> None:
    keep_only(bundle_copy, "tensorrt")
    refused(invoke("bench", bundle_copy, "--json"), 3, "None of the bundle's targets runs on this machine")
