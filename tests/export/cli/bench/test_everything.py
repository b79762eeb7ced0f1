"""`nsm bench --all`: a table over all targets and precisions, whatever cannot be built among them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import nsm
from nsm.bundle import Bundle
from nsm.errors import BuildError, InputError, NsmError, ParityError, SlowerError, UnsupportedError
from nsm.export import options as export_options
from nsm.export import pipeline
from nsm.export.cli.bench import bundle as bench_command
from nsm.export.cli.bench import everything as bench_all
from nsm.export.options import ExportOptions
from nsm.export.pipeline import Stages
from nsm.export.verify import acceptance
from nsm.export.verify.artifact import PRECISIONS
from nsm.results import ParityResult
from nsm.runtimes.base import Progress
from nsm.runtimes.bench.rounds import Latency, Steppable
from nsm.staging import FAILED_SUFFIX, write_manifest
from nsm.trace import Array
from tests.export.helpers import invoke, refused, succeeded, the_json
from tests.small_models import make_model


class OddError(NsmError):
    """One that nobody has thought of."""


TOO_SLOW = SlowerError("int8 takes 1.20x as long as fp32. Give --allow-slower.")
NO_BF16 = UnsupportedError("This CPU has no bf16. Take a newer one.")
Outcome = NsmError | str | None


@pytest.fixture
def exports(exported: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[ExportOptions]]:
    """Let an export give the bundle that there is, as of the precision asked for, or raise what is told by precision.

    "absent": the artifact was not run. The list that is returned fills with the options of the exports.
    """

    def with_outcomes(**outcomes: Outcome) -> list[ExportOptions]:
        asked: list[ExportOptions] = []

        def fake(_model: Path, options: ExportOptions, stages: Stages) -> Bundle:
            asked.append(options)
            with stages.stage("Building") as progress:
                progress(1, 1)
            outcome = outcomes.get(options.precision.replace("-", "_"))
            assert options.output is not None
            kept = isinstance(outcome, ParityError)
            output = options.output.with_name(options.output.name + FAILED_SUFFIX) if kept else options.output
            if outcome is None or isinstance(outcome, str) or kept:
                made = Bundle(shutil.copytree(exported, output))
                (artifact,) = (item for item in made.manifest.artifacts if item.target == options.targets[0])
                changes: dict[str, Any] = {"precision": options.precision}
                if outcome == "absent":
                    changes["parity"] = ParityResult.not_run("There is no GPU. Buy one.")
                manifest = replace(made.manifest, artifacts=(replace(artifact, **changes),))
                write_manifest(output, manifest)
            if isinstance(outcome, NsmError):
                raise outcome
            return Bundle(output)

        monkeypatch.setattr(pipeline, "export", fake)
        monkeypatch.setattr(bench_command, "fresh_peak_mb", lambda _path, _target, _precision, _threads: 123.4)
        return asked

    return with_outcomes


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give the microseconds of a step of each that is measured, in turn; rounds differ by a tenth where `noisy`."""

    def with_times(*micro: float, noisy: bool = False) -> None:
        def fake(sessions: Sequence[Steppable], _steps: int, _tokens: Array, _progress: Progress) -> list[Latency]:
            assert len(sessions) == len(micro)
            found = []
            for index, time in enumerate(micro):
                rounds = (time, time * (1.2 if noisy and index else 1.0), time * (0.8 if noisy and index else 1.0))
                decode = Latency(time / 10, time / 10, time / 10, time / 10, 1.0, rounds)
                found.append(Latency(time, time, time, time, 1e6 / time, rounds, decode))
            return found

        monkeypatch.setattr(bench_all, "bench", fake)

    return with_times


Exports = Callable[..., list[ExportOptions]]
Times = Callable[..., None]
REFUSED: Mapping[str, Outcome] = {"fp16": NO_BF16, "bf16": NO_BF16, "int8": NO_BF16, "int8_weights": NO_BF16}


def lines(text: str, target: str = "onnxruntime") -> dict[str, list[str]]:
    """The table's lines of a target, by precision."""
    return {line.split()[1]: line.split() for line in text.splitlines() if line.startswith(f"{target} ")}


def test_every_precision_has_a_line_whatever_became_of_it(checkpoint: Path, exports: Exports, times: Times) -> None:
    asked = exports(
        bf16=NO_BF16, int8=ParityError("Parity failed on onnxruntime int8."), int8_weights=BuildError("No.\nReally.")
    )
    times(1000, 500)
    text = succeeded(invoke("bench", "--all", checkpoint, "-t", "ort", "--steps", "50"))
    found = lines(text)
    assert list(found) == list(PRECISIONS)
    size = found["fp32"][3:5]
    agreement = found["fp32"][9]
    assert found["fp32"][2:8] == ["fp32", *size, "1000", "1.00x", "100"]
    assert found["fp32"][-1] == "ok"
    assert float(found["fp32"][8]) < 1e-4
    assert agreement.endswith("%")
    assert found["fp16"][5:9] == ["500", "2.00x", "(2.00-2.00)", "50"]
    assert found["fp16"][-1] == "ok"
    dashes = ["-"] * 7
    assert found["bf16"][2:9] == dashes
    assert " ".join(found["bf16"][9:]) == "not supported: This CPU has no bf16"
    assert found["int8-weights"][2:] == [*dashes, "build", "failed:", "No"]
    assert found["int8"][3:8] == [*size, "-", "-", "-"]
    assert " ".join(found["int8"][10:]) == "parity failed: Parity failed on onnxruntime int8"
    assert "speed: relative to the target's fp32 in the same round" in text
    assert "50 calls of 8 tokens on 2 lanes, 1 thread, in 3 rounds, in turns" in text
    assert f"Fastest with status ok: nsm-export {checkpoint} --target onnxruntime --precision fp16" in text
    assert [(list(item.targets), item.precision) for item in asked] == [(["onnxruntime"], p) for p in PRECISIONS]


def test_json_has_a_result_for_each_with_nulls_where_nothing_was_measured(
    checkpoint: Path, exports: Exports, times: Times
) -> None:
    exports(bf16=NO_BF16, int8=ParityError("Too far off."), int8_weights="absent")
    times(1000, 500)
    result = invoke("bench", checkpoint, "--all", "--target", "ort", "--threads", "1", "--json")
    succeeded(result)
    assert result.stderr == ""
    data = the_json(result)
    assert (data["model"], data["threads"]) == (str(checkpoint), 1)
    rows = {item["precision"]: item for item in data["results"]}
    assert list(rows) == list(PRECISIONS)
    assert rows["fp32"]["ratio"] is None
    assert rows["fp16"]["ratio"] == {"against": "onnxruntime fp32", "median": 2.0, "low": 2.0, "high": 2.0}
    assert rows["fp16"]["latency_us"]["p50"] == 500
    assert rows["fp16"]["decode_us"]["call"] == 50
    assert rows["fp16"]["peak_rss_mb"] == 123.4
    assert rows["fp16"]["parity"]["status"] == "passed"
    assert rows["fp16"]["parity"]["free_run"]["p99"] > 0
    assert set(rows["fp16"]) >= set(rows["bf16"])
    assert (rows["bf16"]["status"], rows["bf16"]["reason"]) == ("not supported", str(NO_BF16))
    for key in ("latency_us", "tokens_per_second", "decode_us", "ratio", "peak_rss_mb", "artifact_mb", "parity"):
        assert rows["bf16"][key] is None
    assert (rows["int8"]["status"], rows["int8"]["latency_us"]) == ("parity failed", None)
    assert rows["int8"]["parity"]["argmax_agreement"] > 0
    assert rows["int8-weights"]["status"] == "not run"
    assert rows["int8-weights"]["reason"] == "There is no GPU. Buy one."


def test_what_an_export_would_refuse_as_not_faster_is_called_so(
    checkpoint: Path, exports: Exports, times: Times
) -> None:
    exports(bf16=NO_BF16, int8=NO_BF16, int8_weights=NO_BF16)
    times(1000, 1300)
    text = succeeded(invoke("bench", "--all", checkpoint, "-t", "ort"))
    assert lines(text)["fp16"][6:8] == ["0.77x", "(0.77-0.77)"]
    assert lines(text)["fp16"][-4:] == ["not", "faster", "than", "fp32"]
    assert "--precision fp32" in text
    times(1000, 1050, noisy=True)
    text = succeeded(invoke("bench", "--all", checkpoint, "-t", "ort"))
    assert lines(text)["fp16"][6:8] == ["0.95x", "(0.79-1.19)"]
    assert lines(text)["fp16"][-4:] == ["not", "faster", "than", "fp32"]
    times(1000, 950, noisy=True)
    text = succeeded(invoke("bench", "--all", checkpoint, "-t", "ort"))
    assert lines(text)["fp16"][6:8] == ["1.05x", "(0.88-1.32)"]
    assert lines(text)["fp16"][-1] == "ok"
    assert "--precision fp16" in text


def test_an_export_that_refuses_what_is_slower_is_a_line_too(checkpoint: Path, exports: Exports, times: Times) -> None:
    exports(**{**REFUSED, "int8": TOO_SLOW, "fp16": OddError("Odd."), "bf16": InputError("Give calibration data.")})
    times(1000)
    found = lines(succeeded(invoke("bench", "--all", checkpoint, "-t", "ort")))
    assert " ".join(found["int8"][9:]) == "not faster than fp32: int8 takes 1.20x as long as fp32"
    assert " ".join(found["fp16"][9:]) == "failed: Odd"
    assert " ".join(found["bf16"][9:]) == "refused: Give calibration data"


def test_what_is_slower_is_built_and_measured_too(checkpoint: Path, exports: Exports, times: Times) -> None:
    asked = exports(**REFUSED)
    times(1000)
    succeeded(invoke("bench", "--all", checkpoint, "-t", "ort"))
    assert [item.allow_slower for item in asked] == [True] * len(PRECISIONS)


def test_a_long_reason_is_cut_in_the_table_only(checkpoint: Path, exports: Exports, times: Times) -> None:
    reason = f"It failed at {'a' * 100}. Do something."
    exports(**{**REFUSED, "int8": BuildError(reason)})
    times(1000)
    shown = lines(succeeded(invoke("bench", "--all", checkpoint, "-t", "ort")))["int8"]
    assert " ".join(shown[9:]) == f"build failed: It failed at {'a' * 74}..."
    rows = the_json(invoke("bench", "--all", checkpoint, "-t", "ort", "--json"))["results"]
    assert [item["reason"] for item in rows if item["precision"] == "int8"] == [reason]


def test_without_fp32_there_is_nothing_to_compare_with(checkpoint: Path, exports: Exports, times: Times) -> None:
    exports(fp32=BuildError("No."), bf16=NO_BF16, int8=NO_BF16, int8_weights=NO_BF16)
    times(500)
    found = lines(succeeded(invoke("bench", "--all", checkpoint, "-t", "ort")))
    assert found["fp16"][5:8] == ["500", "-", "50"]
    assert found["fp16"][-1] == "ok"


@pytest.mark.parametrize("as_json", [False, True])
def test_nothing_measured_ends_with_3_after_the_reasons(checkpoint: Path, exports: Exports, as_json: bool) -> None:
    exports(**{**REFUSED, "fp32": NO_BF16})
    result = invoke("bench", "--all", checkpoint, "-t", "ort", *(["--json"] if as_json else []))
    assert result.exit_code == 3
    assert "No combination could be measured on this machine" in result.stderr
    if as_json:
        assert [item["status"] for item in the_json(result)["results"]] == ["not supported"] * 5
    else:
        assert result.stdout.count("not supported: This CPU has no bf16") == 5
        assert "speed:" not in result.stdout


def test_every_target_that_runs_here_is_taken(
    checkpoint: Path, exports: Exports, times: Times, no_gpu: None, hide: Callable[..., None]
) -> None:
    hide("openvino")
    asked = exports(**REFUSED)
    times(1000, 900)
    result = invoke("bench", "--all", checkpoint)
    text = succeeded(result)
    assert {item.targets[0] for item in asked} == {"onnx", "onnxruntime"}
    assert lines(text, "onnx")["fp32"][6] == lines(text, "onnxruntime")["fp32"][6] == "1.00x"
    remarks = " ".join(result.stderr.split())
    assert 'openvino: skipped, not installed. Install it with: pip install "nsm-toolkit[openvino]"' in remarks
    assert "tensorrt: skipped, this machine has no NVIDIA GPU." in remarks
    assert "Building onnxruntime int8-weights" in remarks


def test_made_up_tokens_are_said_to_be(tmp_path: Path, exports: Exports, times: Times) -> None:
    nsm.save(make_model(), tmp_path / "bare.pt")
    exports(**REFUSED)
    times(1000)
    result = invoke("bench", "--all", tmp_path / "bare.pt", "-t", "ort")
    succeeded(result)
    assert "errors are measured on random tokens (synthetic)" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--steps", "9"], ["at least 10 steps; given 9"]),
        (["--threads", "0"], ["--threads must be at least 1; given 0"]),
        (["--target", "coreml"], ["There is no target 'coreml'"]),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_built(
    checkpoint: Path, exports: Exports, options: list[str], parts: list[str]
) -> None:
    asked = exports()
    refused(invoke("bench", "--all", checkpoint, *options, "--json"), 2, *parts)
    assert not asked


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    refused(invoke("bench", "--all", tmp_path / "none.pt"), 2, "There is no file")


def test_without_torch_it_ends_with_3(checkpoint: Path, hide: Callable[..., None]) -> None:
    hide("torch")
    refused(invoke("bench", "--all", checkpoint), 3, "needs torch, which is not installed")


def test_a_model_is_built_and_measured_for_real(checkpoint: Path) -> None:
    options = ("--target", "onnxruntime", "--steps", "20", "--threads", "1", "--json")
    rows = the_json(invoke("bench", "--all", checkpoint, *options))["results"]
    assert [item["precision"] for item in rows] == list(PRECISIONS)
    first = rows[0]
    assert (first["status"], first["effective_precision"], first["parity"]["status"]) == ("ok", "fp32", "passed")
    assert first["latency_us"]["p50"] > 0
    assert first["peak_rss_mb"] > 20
    assert [item["status"] for item in rows[1:]] == ["not supported"] * 4, "its matrices are too small to quantise"


@pytest.mark.slow
def test_every_precision_of_a_target_is_measured_for_real(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "SPEED_STEPS", 10)
    monkeypatch.setattr(export_options, "_GOLDEN_STEPS", 8)
    monkeypatch.setattr(export_options, "DRIFT_STEPS", 8)
    monkeypatch.setattr(bench_command, "fresh_peak_mb", lambda *_: 123.4)
    options = ("--target", "openvino", "--steps", "10", "--threads", "1", "--json")
    rows = {item["precision"]: item for item in the_json(invoke("bench", "--all", wide, *options))["results"]}
    assert list(rows) == list(PRECISIONS)
    assert rows["int8-weights"]["effective_precision"] == "int8-weights"
    for name in ("fp32", "fp16", "bf16", "int8"):
        row = rows[name]
        if row["status"] == "not run":
            assert f"does not compute in {name}" in row["reason"]
            continue
        assert row["status"] in ("ok", "not faster than fp32"), row["reason"]
        assert row["effective_precision"] == name
        assert row["latency_us"]["p50"] > 0
        assert row["parity"]["status"] == "passed"
        assert (row["ratio"] is None) == (name == "fp32")
    assert rows["int8"]["artifact_mb"] < rows["fp32"]["artifact_mb"]
