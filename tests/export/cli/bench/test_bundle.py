from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import nsm
from nsm.bundle import Bundle
from nsm.export.cli.bench import bundle as bench_command
from nsm.export.cli.bench import overhead as overhead_command
from nsm.runtimes.base import Progress
from nsm.runtimes.bench.rounds import Latency, Steppable
from nsm.runtimes.bench.session_overhead import Overhead
from nsm.trace import Array
from tests.export.helpers import (
    invoke,
    keep_only,
    refused,
    succeeded,
    the_json,
)
from tests.nsm.bundles import edit
from tests.small_models import make_model, make_sequences


@pytest.fixture
def fake_times(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give the microseconds of a step of each that is measured, in turn; a single token takes a tenth. A second round
    is slower by the share `spread` for those after the first.
    """

    def with_times(*micro: float, spread: float = 0.0) -> None:
        def latency(index: int, scale: float, decode: Latency | None) -> Latency:
            time = micro[index] * scale
            rounds = (time, time * (1 + spread * (index > 0)))
            return Latency(time, 2 * time, 3 * time, time, 1e6 / time, rounds, decode)

        def fake(sessions: Sequence[Steppable], _steps: int, _tokens: Array, _progress: Progress) -> list[Latency]:
            assert len(sessions) == len(micro)
            return [latency(index, 1.0, latency(index, 0.1, None)) for index in range(len(sessions))]

        monkeypatch.setattr(bench_command, "bench", fake)
        monkeypatch.setattr(bench_command, "fresh_peak_mb", lambda _path, _target, _precision, _threads: 123.4)

    return with_times


Times = Callable[..., None]


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


# -- a bundle --------------------------------------------------------------------------------------------------------


def test_bench_prints_one_json_object(exported: Path, no_gpu: None) -> None:
    result = invoke("bench", exported, "--steps", "60", "--threads", "1", "--json")
    succeeded(result)
    assert result.stderr == ""
    data = the_json(result)
    assert set(data) == {"threads", "results"}
    assert data["threads"] == 1
    results = data["results"]
    assert [item["target"] for item in results] == ["onnx", "onnxruntime", "openvino"]
    bundle = Bundle(exported)
    for item in results:
        assert {"target", "precision", "steps", "latency_us", "tokens_per_second", "peak_rss_mb", "artifact_mb"} <= set(
            item
        )
        assert (item["precision"], item["effective_precision"], item["steps"]) == ("fp32", "fp32", 60)
        assert (item["batch"], item["tokens_per_call"]) == (2, 8)
        assert 0 < item["latency_us"]["p50"] <= item["latency_us"]["p90"] <= item["latency_us"]["p99"]
        assert item["tokens_per_second"] == pytest.approx(16 / item["latency_us"]["p50"] * 1e6)
        assert 0 < item["decode_us"]["p50"] <= item["decode_us"]["p99"]
        assert item["decode_us"]["call"] > 0
        assert item["threads"] == 1
        assert item["state_bytes"] == bundle.manifest.spec.state_nbytes
        assert item["peak_rss_mb"] > 10
        assert item["artifact_mb"] == pytest.approx(bundle.artifact(item["target"]).nbytes / 1e6)
    assert results[0]["ratio"] is results[0]["decode_ratio"] is None
    for item in results[1:]:
        for key in ("ratio", "decode_ratio"):
            assert item[key]["against"] == "onnx"
            assert 0 < item[key]["low"] <= item[key]["median"] <= item[key]["high"]
    assert len({item["peak_rss_mb"] for item in results}) == 3


def test_speed_is_how_many_times_as_fast_as_the_first(exported: Path, no_gpu: None, fake_times: Times) -> None:
    fake_times(1000, 500, 2000, spread=0.25)
    text = succeeded(invoke("bench", exported))
    rows = {line[0]: line for line in words(text) if line}
    assert " ".join(rows["onnx"]).startswith("onnx fp32 1000 2000 3000 1,000 1.00x 100 123 MB ")
    assert rows["onnxruntime"][6:8] == ["1.80x", "(1.60-2.00)"]
    assert rows["openvino"][6:8] == ["0.45x", "(0.40-0.50)"]
    assert "speed: relative to onnx in the same round, median and 95 % interval over rounds;" in text
    assert "decode: microseconds per single token, commits included." in text
    results = the_json(invoke("bench", exported, "--json"))["results"]
    assert results[1]["ratio"] == {"against": "onnx", "median": 1.8, "low": 1.6, "high": 2.0}


def test_bench_for_people_says_what_was_left_out(exported: Path, hide: Callable[..., None], no_gpu: None) -> None:
    hide("openvino")
    result = invoke("bench", exported, "--steps", "10", "--threads", "1")
    text = succeeded(result)
    assert "10 calls of 8 tokens on 2 lanes, 1 thread, in 5 rounds, in turns" in text
    assert "1.00x" in text
    remarks = " ".join(result.stderr.split())
    assert "Measuring in turns" in remarks
    assert "openvino: not measured. The target openvino needs" in remarks
    assert "tensorrt: not measured. There is no usable NVIDIA GPU" in remarks


def test_a_small_model_has_one_thread_where_nobody_says_it(
    exported: Path, bundle_copy: Path, no_gpu: None, fake_times: Times
) -> None:
    fake_times(100, 100, 100)
    assert "of 8 tokens on 2 lanes, 1 thread, in" in succeeded(invoke("bench", exported))
    fake_times(100, 100, 100)
    found = the_json(invoke("bench", exported, "--json"))
    assert found["threads"] is None
    assert [item["threads"] for item in found["results"]] == [1, 1, 1]
    edit(bundle_copy, lambda data: data["work"]["step"].update(flops=1e9))
    fake_times(100, 100, 100)
    assert "of 8 tokens on 2 lanes, in" in succeeded(invoke("bench", bundle_copy))


def test_several_targets_can_be_named(exported: Path, fake_times: Times) -> None:
    fake_times(100, 100)
    arguments = ("--target", "ov", "--targets", "ort", "-t", "openvino", "--threads", "2")
    text = succeeded(invoke("bench", exported, *arguments))
    assert [line[0] for line in words(text) if line and line[0] in ("openvino", "onnxruntime", "onnx")] == [
        "openvino",
        "onnxruntime",
    ]
    assert "2 threads" in text


def test_one_target_stands_alone(exported: Path, fake_times: Times) -> None:
    fake_times(100)
    text = succeeded(invoke("bench", exported, "-t", "ort"))
    assert "speed:" not in text
    (result,) = the_json(invoke("bench", exported, "-t", "ort", "--json"))["results"]
    assert result["ratio"] is None


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--steps", "9"], ["at least 10 steps; given 9"]),
        (["--threads", "0"], ["--threads must be at least 1; given 0"]),
        (["--target", "coreml"], ["There is no target 'coreml'"]),
        (["--against", "eager"], ["--against eager runs the model in PyTorch", "--against eager --model model.pt"]),
        (["--against", "compile"], ["--against compile --model model.pt"]),
        (["--model", "model.pt"], ["--model", "--against eager or compile"]),
        (["--against", "b.nsm", "--model", "model.pt"], ["--model", "--against eager or compile"]),
        (["--against", "b.nsm"], ["There is no bundle b.nsm"]),
        (
            ["--overhead", "--steps", "-3"],
            ["at least 5 rounds of 100 calls; given --steps -3. Give --steps 500 or more"],
        ),
        (["--overhead", "--steps", "499"], ["given --steps 499", "--steps 500 or more", "2500"]),
        (["--overhead", "--threads", "0"], ["--threads must be at least 1; given 0"]),
        (["--overhead", "--all"], ["--overhead measures a bundle by itself. Leave out --all"]),
        (["--all"], ["--all takes a checkpoint", "is a folder. For a bundle: nsm bench"]),
        (["--all", "--against", "eager"], ["--against and --model"]),
        (["--all", "--model", "model.pt"], ["--against and --model"]),
    ],
)
def test_a_wrong_benchmark_is_refused(exported: Path, options: list[str], parts: list[str]) -> None:
    result = invoke("bench", exported, "-t", "ort", *options, "--json")
    refused(result, 2, *parts)


def test_a_checkpoint_is_no_bundle(checkpoint: Path) -> None:
    refused(invoke("bench", checkpoint), 2, "is a file; a bundle is a directory", f"nsm bench --all {checkpoint}")


def test_bench_of_a_target_without_its_hardware_ends_with_3(exported: Path, no_gpu: None) -> None:
    refused(invoke("bench", exported, "-t", "trt"), 3, "no usable NVIDIA GPU in this machine")


def test_bench_of_a_bundle_that_runs_nowhere_here_ends_with_3(bundle_copy: Path, no_gpu: None) -> None:
    keep_only(bundle_copy, "tensorrt")
    refused(invoke("bench", bundle_copy, "--json"), 3, "None of the bundle's targets runs on this machine")


# -- what a session adds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "rounds"), [([], 25), (["--steps", "500"], 5), (["--steps", "601"], 7)])
def test_the_overhead_is_measured_over_as_many_calls_as_were_asked_for(
    exported: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], rounds: int
) -> None:
    asked: list[int] = []

    def fake(_session: object, _runtime: object, _tokens: Array, count: int, _progress: Progress) -> Overhead:
        asked.append(count)
        return Overhead(12.0, 10.0, 2.0, 1.5, 2.5)

    monkeypatch.setattr(overhead_command, "overhead", fake)
    text = succeeded(invoke("bench", exported, "-t", "ort", "--overhead", *options))
    assert f"A call of step, {rounds} rounds of 100 calls of each in turn" in text
    assert ["onnxruntime", "fp32", "12", "10", "2.0", "1.5-2.5"] in words(text)
    (result,) = the_json(invoke("bench", exported, "-t", "ort", "--overhead", *options, "--json"))["results"]
    assert (result["steps"], result["step_us"], result["median"]) == (100 * rounds, 12.0, 2.0)
    assert asked == [rounds, rounds]


# -- against another bundle ------------------------------------------------------------------------------------------


def test_each_target_is_compared_with_the_same_of_the_other_bundle(
    exported: Path, bundle_copy: Path, fake_times: Times
) -> None:
    keep_only(bundle_copy, "onnxruntime", "openvino")
    fake_times(100, 100, 300, 200)
    arguments = ("bench", exported, "-t", "openvino", "-t", "ort", "--against", bundle_copy)
    data = the_json(invoke(*arguments, "--json"))
    assert [item["target"] for item in data["results"]] == ["openvino", "onnxruntime"]
    assert [item["ratio"]["against"] for item in data["results"]] == ["copy.nsm: openvino", "copy.nsm: onnxruntime"]
    assert [item["ratio"]["median"] for item in data["results"]] == pytest.approx([3, 2])
    assert [item["decode_ratio"]["median"] for item in data["results"]] == pytest.approx([3, 2])
    assert [(item["target"], item["ratio"]) for item in data["against"]] == [("openvino", None), ("onnxruntime", None)]
    text = succeeded(invoke(*arguments))
    assert "relative to copy.nsm: openvino or copy.nsm: onnxruntime in the same round" in text


def test_a_target_that_the_other_has_not_is_compared_with_its_first(
    exported: Path, bundle_copy: Path, fake_times: Times
) -> None:
    keep_only(bundle_copy, "onnxruntime", "tensorrt")
    fake_times(100, 100, 250)
    data = the_json(invoke("bench", exported, "-t", "ov", "-t", "ort", "--against", bundle_copy, "--json"))
    assert [item["ratio"]["against"] for item in data["results"]] == ["copy.nsm: onnxruntime"] * 2
    assert len(data["against"]) == 1


def test_a_bundle_is_about_as_fast_as_itself(exported: Path, bundle_copy: Path) -> None:
    arguments = ("-t", "ort", "--threads", "1", "--steps", "100", "--against", bundle_copy, "--json")
    (item,) = the_json(invoke("bench", exported, *arguments))["results"]
    assert 0.5 < item["ratio"]["median"] < 2


def test_a_bundle_that_takes_other_inputs_is_refused(byte_bundle: Path, exported: Path) -> None:
    parts = (
        "takes inputs",
        "int64[1, 8] of 0 .. 255; expected int64[2, 8] of 0 .. 19",
        "--batch and --tokens-per-call",
    )
    refused(invoke("bench", exported, "-t", "ort", "--against", byte_bundle), 2, *parts)


def test_vectors_have_no_range(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_model(vocab_size=None, input_dim=3, d_model=None, state_dim=32).spec(2)
    other = Bundle(shutil.copytree(exported, tmp_path / "vectors.nsm"))

    def opened(path: Path) -> Bundle:
        bundle = Bundle(path)
        if path == other.path:
            object.__setattr__(bundle.manifest, "spec", spec)
        return bundle

    monkeypatch.setattr(bench_command, "Bundle", opened)
    message = refused(
        invoke("bench", exported, "-t", "ort", "--against", other.path), 2, "float32[2, 8, 3]; expected int64"
    )
    assert "None" not in message


# -- against PyTorch -------------------------------------------------------------------------------------------------


def test_against_pytorch_as_it_is(exported: Path, checkpoint: Path) -> None:
    options = ("-t", "ort", "--steps", "20", "--threads", "1", "--against", "eager", "--model", checkpoint)
    data = the_json(invoke("bench", exported, *options, "--json"))
    (item,), (eager,) = data["results"], data["against"]
    assert item["ratio"]["against"] == item["decode_ratio"]["against"] == "eager"
    assert item["ratio"]["median"] > 1
    assert (eager["target"], eager["precision"], eager["ratio"]) == ("eager", "fp32", None)
    assert eager["latency_us"]["p50"] > item["latency_us"]["p50"]
    assert eager["decode_us"]["p50"] > 0
    assert eager["peak_rss_mb"] is eager["artifact_mb"] is None
    assert eager["state_bytes"] == item["state_bytes"]


def test_pytorch_has_a_line_in_the_table(exported: Path, checkpoint: Path, fake_times: Times) -> None:
    fake_times(100, 550)
    result = invoke("bench", exported, "-t", "ort", "--against", "eager", "--model", checkpoint)
    lines = words(succeeded(result))
    assert ["eager", "fp32", "550", "1100", "1650", "1,818", "1.00x", "55", "-", "-"] in lines
    assert "Loading into torch" in result.stderr
    assert "relative to eager in the same round" in result.stdout


def test_another_model_is_refused(exported: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    nsm.save(make_model(seed=1), other, samples=make_sequences(2, 40))
    options = ("-t", "ort", "--against", "eager", "--model", other)
    refused(invoke("bench", exported, *options), 2, "other.pt is not the model in", "its fingerprint is", "--compact")


def test_pytorch_without_torch_ends_with_3(exported: Path, checkpoint: Path, hide: Callable[..., None]) -> None:
    hide("torch")
    options = ("-t", "ort", "--against", "eager", "--model", checkpoint)
    message = refused(invoke("bench", exported, *options), 3, "--against eager needs torch, which is not installed")
    assert 'pip install "nsm-toolkit[torch]"' in message


def test_a_compiler_that_fails_ends_with_3(
    exported: Path, checkpoint: Path, fake_times: Times, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def broken(*_args: object, **_options: object) -> None:
        raise RuntimeError("backend='inductor' raised:\n\nInvalidCxxCompiler: no compiler\nmore\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    options = ("-t", "ort", "--against", "compile", "--model", checkpoint, "--json")
    fake_times(1, 1)
    cause = "(RuntimeError: backend='inductor' raised: InvalidCxxCompiler: no compiler)"
    refused(invoke("bench", exported, *options), 3, "torch.compile cannot compile this model here", cause)


def test_against_the_compiler(
    exported: Path, checkpoint: Path, fake_times: Times, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    compiled: list[dict[str, bool]] = []

    def compile_(call: Callable[..., object], **options: bool) -> Callable[..., object]:
        compiled.append(options)
        return call

    monkeypatch.setattr(torch, "compile", compile_)
    fake_times(100, 200)
    options = ("-t", "ort", "--against", "compile", "--model", checkpoint, "--json")
    (item,) = the_json(invoke("bench", exported, *options))["results"]
    assert item["ratio"] == {"against": "compile", "median": 2.0, "low": 2.0, "high": 2.0}
    assert compiled == [{"dynamic": False, "fullgraph": True}] * 3


def test_lanes_get_the_recorded_streams_in_turn(bundle: Bundle) -> None:
    tokens = bench_command.lane_tokens(bundle)
    recorded = bundle.trace().inputs["tokens"]
    assert tokens.shape == (64, 2, 8)
    np.testing.assert_array_equal(tokens[:, 1], recorded[1])
