from __future__ import annotations

import errno
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import nsm
from nsm.bundle import Bundle, file_record, write_manifest
from nsm.export import pipeline
from nsm.export.cli import main
from nsm.models.simple import SimpleNSM

COMMANDS = ("export", "parity", "bench", "build", "inspect", "doctor", "run")
PROGRAMS = Path(sys.executable).parent


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def program(name: str, *arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The installed command, as a user starts it, on a machine without a GPU."""
    return subprocess.run(
        [str(PROGRAMS / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )


def refused(result: Result, code: int, *parts: str) -> str:
    """The message of a command that ended with `code`: one line on stderr, no traceback, stdout nothing or JSON."""
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert "Traceback" not in result.output
    assert result.stdout == "" or json.loads(result.stdout)
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("Error: "), result.stderr
    for part in parts:
        assert part in message
    return message


def succeeded(result: Result) -> str:
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def the_json(result: Result | subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The one object on stdout."""
    assert result.stdout.count("\n") == 1
    data = json.loads(result.stdout)
    assert isinstance(data, dict)
    return data


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without an NVIDIA GPU, whatever this one has."""
    import cuda.bindings.runtime as cuda

    monkeypatch.setattr(cuda, "cudaGetDeviceCount", lambda: (cuda.cudaError_t.cudaErrorNoDevice, 0))


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make packages look as if they were not installed."""

    def hidden(*packages: str) -> None:
        real = importlib.util.find_spec

        def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
            return None if name.split(".", maxsplit=1)[0] in packages else real(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)

    return hidden


@pytest.fixture
def ready_graph(exported: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Spare the ONNX exporter: two lanes of the model get the graph that was exported before. Call it with a factor
    for the weights to get a wrong one."""

    def with_factor(factor: float) -> None:
        def copied(_model: SimpleNSM, _spec: object, directory: Path, _opset: int) -> Path:
            shutil.copytree(exported / "graphs", directory, dirs_exist_ok=True)
            weights = np.fromfile(directory / "weights.bin", np.float32)
            (weights * np.float32(factor)).tofile(directory / "weights.bin")
            return directory / "step.onnx"

        monkeypatch.setattr(pipeline, "export_onnx", copied)

    with_factor(1.0)
    return with_factor


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if an export gets as far as running the model."""

    def worked(*_args: Any, **_options: Any) -> None:
        raise AssertionError("work was done before the request was refused")

    monkeypatch.setattr(pipeline, "record", worked)
    monkeypatch.setattr(pipeline, "export_onnx", worked)


@pytest.fixture
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sequences of different lengths, neither a whole number of chunks."""
    path = tmp_path_factory.mktemp("data") / "ids.npz"
    generator = np.random.default_rng(8)
    np.savez(path, a=generator.integers(0, 20, 35), b=generator.integers(0, 20, (1, 6)))
    return path


def keep_only(path: Path, *targets: str) -> None:
    """Take the other targets out of the manifest."""
    manifest = Bundle(path).manifest
    write_manifest(path, replace(manifest, artifacts=tuple(a for a in manifest.artifacts if a.target in targets)))


def spoil(path: Path) -> None:
    """Another model under the name of this one, with records that fit."""
    weights = np.fromfile(path / "graphs" / "weights.bin", np.float32)
    (weights * np.float32(1.001)).tofile(path / "graphs" / "weights.bin")
    manifest = Bundle(path).manifest
    artifacts = tuple(
        replace(a, files=tuple(file_record(path, record.path) for record in a.files)) for a in manifest.artifacts
    )
    write_manifest(path, replace(manifest, artifacts=artifacts))
    Bundle(path).verify()


def short(checkpoint: Path, output: Path, *more: str) -> list[str | Path]:
    """Arguments of an export that `ready_graph` serves."""
    sizes = ("--batch", "2", "--num-samples", "2", "--golden-steps", "3")
    return ["export", checkpoint, "-o", output, *sizes, *(more or ("-t", "ort"))]


# -- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "phrases"),
    [
        ("export", ("verified bundle from MODEL", "--target", "--require-parity", "--dry-run", "5 parity failed")),
        ("parity", ("Replay the golden trace of BUNDLE", "Needs no torch", "--steps")),
        ("bench", ("Measure a step of BUNDLE", "--threads")),
        ("build", ("Build a target from the ONNX in BUNDLE", "Needs no torch", "--device")),
        ("inspect", ("inputs, outputs, states, sizes, precision and provenance",)),
        ("doctor", ("what is installed", "what each missing piece needs")),
        ("run", ("Feed sequences to BUNDLE", "--data", "--output")),
    ],
)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_says_what_a_command_does(command: str, phrases: tuple[str, ...], option: str) -> None:
    text = " ".join(succeeded(invoke(command, option)).split())
    for phrase in (*phrases, "--json", "--verbose"):
        assert phrase in text


def test_help_lists_every_command_with_a_line() -> None:
    lines = succeeded(invoke("--help")).splitlines()
    listed = {line.split()[0]: line.split(maxsplit=1)[1:] for line in lines[lines.index("Commands:") + 1 :] if line}
    assert set(listed) == set(COMMANDS)
    assert all(text and not text[0].endswith("...") for text in listed.values())


def test_version() -> None:
    assert succeeded(invoke("--version")) == f"nsm, version {nsm.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["deploy"], ["parity"], ["bench", "a", "b"], ["inspect", "a", "--deep"]])
def test_a_call_that_click_does_not_understand_is_a_usage_error(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


# -- export ----------------------------------------------------------------------------------------------------------


def test_nsm_export_prints_one_json_object(checkpoint: Path, ids: Path, tmp_path: Path) -> None:
    arguments = ["-t", "ov", "--target", "ORT", "--data", str(ids), "--chunk", "16", "--golden-steps", "4", "--json"]
    done = program("nsm-export", checkpoint, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    data = the_json(done)
    assert data["bundle"] == "model.nsm"
    assert names(tmp_path) == ["model.nsm"]
    bundle = Bundle(tmp_path / "model.nsm")
    bundle.verify()
    assert [item["target"] for item in data["artifacts"]] == ["openvino", "onnxruntime"]
    for item, artifact in zip(data["artifacts"], bundle.manifest.artifacts, strict=True):
        assert {"target", "precision", "effective_precision", "files", "parity"} <= set(item)
        assert (item["precision"], item["effective_precision"]) == ("fp32", "fp32")
        assert item["parity"]["status"] == "passed"
        assert item["parity"]["source"] == "recorded"
        assert (item["parity"]["streams"], item["parity"]["steps"]) == (2, 4)
        assert [(f["path"], f["size"], f["sha256"]) for f in item["files"]] == [
            (f.path, f.size, f.sha256) for f in artifact.files
        ]
    assert bundle.manifest.spec.entry("step").inputs[0].shape == (1, 16)
    assert bundle.manifest.command == f"nsm-export {checkpoint} " + " ".join(arguments)


def test_export_ends_with_what_was_found_and_what_comes_next(
    model: SimpleNSM, tmp_path: Path, ready_graph: Callable[[float], None], no_gpu: None
) -> None:
    nsm.save(model, tmp_path / "bare.pt")
    output = tmp_path / "m.nsm"
    result = invoke(*short(tmp_path / "bare.pt", output, "-t", "onnx", "-t", "trt", "--device", "sm86"))
    text = succeeded(result)
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith(("onnx", "tensorrt "))}
    assert rows["onnx"][1:3] == ["cpu", "fp32"]
    assert "passed" in rows["onnx"]
    assert rows["onnx"][-1] == "100.00%"
    assert rows["tensorrt"][1:3] == ["sm86", "fp32"]
    assert "not_run" in rows["tensorrt"]
    assert "tensorrt: NOT RUN. There is no usable NVIDIA GPU" in text
    for following in (
        f"nsm inspect {output}",
        f"nsm bench {output} --target onnx",
        f"nsm parity {output} --target tensorrt",
    ):
        assert following in text
    assert "synthetic" in " ".join(result.stderr.split())
    assert "Checking onnx" in result.stderr


def test_export_json_of_a_synthetic_trace_says_so(
    model: SimpleNSM, tmp_path: Path, ready_graph: Callable[[float], None]
) -> None:
    nsm.save(model, tmp_path / "bare.pt")
    result = invoke(*short(tmp_path / "bare.pt", tmp_path / "m.nsm", "-t", "ort", "--json"))
    succeeded(result)
    assert result.stderr == ""
    (artifact,) = the_json(result)["artifacts"]
    assert artifact["parity"]["source"] == "synthetic"


@pytest.mark.parametrize("as_json", [False, True])
def test_a_dry_run_checks_and_writes_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_work: None, as_json: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("export", checkpoint, "-t", "ort", "--dry-run", *(["--json"] if as_json else []))
    text = succeeded(result)
    if as_json:
        data = the_json(result)
        assert data["dry_run"] is True
        assert (data["bundle"], data["artifacts"]) == (None, [])
        assert (data["output"], data["source"], data["streams"]) == ("model.nsm", "recorded", 8)
    else:
        assert "nothing was written" in text
        assert "model.nsm" in text
    assert names(tmp_path) == []


def test_the_example_in_the_help_is_a_good_request(checkpoint: Path, tmp_path: Path, no_work: None) -> None:
    targets = ["-t", "onnxruntime", "-t", "openvino", "-t", "tensorrt", "--device", "sm86"]
    succeeded(invoke("export", checkpoint, *targets, "-o", tmp_path / "model.nsm", "--dry-run"))


@pytest.mark.parametrize(
    ("options", "code", "parts"),
    [
        (["-t", "coreml"], 2, ["There is no target 'coreml'", "tensorrt (trt)"]),
        (["-t", "ort", "-p", "fp8"], 2, ["There is no precision 'fp8'", "fp32, fp16"]),
        (["-t", "ort", "-p", "int8"], 3, ["builds fp32 only; given int8"]),
        (["-t", "trt", "--device", "sm12"], 2, ["has a device 'sm12'", "sm86"]),
        (["-t", "ort", "--device", "cuda"], 2, ["has a device 'cuda'", "cpu"]),
        (["-t", "ort", "--chunk", "12"], 2, ["multiple of the model's chunk of 8 tokens; given 12", "Take 16."]),
        (["-t", "ort", "--chunk", "0"], 2, ["given 0", "Take 8."]),
        (["-t", "ort", "--batch", "0"], 2, ["--batch", "at least 1"]),
        (["-t", "ort", "--data", "absent.npy"], 2, ["absent.npy cannot be read as sequences"]),
        (["-t", "ort", "--data", "ids.csv"], 2, [".npy, .npz and .txt files; given .csv"]),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_wrong_request_is_refused_before_any_work(
    checkpoint: Path, tmp_path: Path, options: list[str], code: int, parts: list[str], as_json: bool, no_work: None
) -> None:
    result = invoke("export", checkpoint, *options, "-o", tmp_path / "m.nsm", *(["--json"] if as_json else []))
    refused(result, code, *parts)
    assert names(tmp_path) == []


@pytest.mark.parametrize("opset", ["3", "99", "twenty"])
def test_an_opset_that_is_not_written_is_a_usage_error(checkpoint: Path, tmp_path: Path, opset: str) -> None:
    result = invoke("export", checkpoint, "-t", "ort", "-o", tmp_path / "m.nsm", "--opset", opset)
    refused(result, 2, "--opset")
    assert names(tmp_path) == []


def test_export_without_a_target_is_a_usage_error(checkpoint: Path) -> None:
    refused(invoke("export", checkpoint), 2, "--target")


def test_an_existing_output_is_refused_with_the_way_out(checkpoint: Path, bundle_copy: Path, no_work: None) -> None:
    result = invoke("export", checkpoint, "-t", "ort", "-o", bundle_copy)
    refused(result, 2, f"{bundle_copy} exists", "--force", "--output")
    Bundle(bundle_copy).verify()


def test_a_dry_run_refuses_an_existing_output_too(checkpoint: Path, bundle_copy: Path, no_work: None) -> None:
    refused(invoke("export", checkpoint, "-t", "ort", "-o", bundle_copy, "--dry-run"), 2, "exists")
    succeeded(invoke("export", checkpoint, "-t", "ort", "-o", bundle_copy, "--dry-run", "--force"))


def test_a_dry_run_refuses_data_the_model_does_not_take(checkpoint: Path, tmp_path: Path, no_work: None) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 40, 3), np.float32))
    refused(invoke("export", checkpoint, "-t", "ort", "--data", tmp_path / "x.npy", "--dry-run"), 2, "The model takes")


def test_data_outside_the_vocabulary_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("letters are ids above nineteen")
    result = invoke("export", checkpoint, "-t", "ort", "--data", tmp_path / "text.txt", "-o", tmp_path / "m.nsm")
    refused(result, 2, "Token ids must lie in 0 .. 19")
    assert names(tmp_path) == ["text.txt"]


def test_a_missing_package_names_the_extra(
    checkpoint: Path, tmp_path: Path, hide: Callable[..., None], no_work: None
) -> None:
    hide("openvino")
    result = invoke("export", checkpoint, "-t", "ort", "-t", "ov", "-o", tmp_path / "m.nsm")
    refused(result, 3, "target openvino needs the package openvino", 'pip install "nsm-toolkit[openvino]"')


@pytest.mark.parametrize(
    ("hidden", "missing"), [(["torch"], "torch, which is"), (["onnx", "onnxscript"], "onnx, onnxscript, which are")]
)
def test_without_torch_export_names_the_extra(
    checkpoint: Path, hide: Callable[..., None], hidden: list[str], missing: str
) -> None:
    hide(*hidden)
    refused(
        invoke("export", checkpoint, "-t", "ort"), 3, f"Exporting needs {missing} not installed", "nsm-toolkit[export]"
    )


# -- checkpoints that are none ---------------------------------------------------------------------------------------


class Malicious:
    """Pickled, it creates the file `path` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def _text(path: Path, _model: SimpleNSM) -> None:
    path.write_text("not a checkpoint")


def _empty(path: Path, _model: SimpleNSM) -> None:
    path.write_bytes(b"")


def _folder(path: Path, _model: SimpleNSM) -> None:
    path.mkdir()


def _module(path: Path, model: SimpleNSM) -> None:
    torch.save(model, path)


def _state_dict(path: Path, model: SimpleNSM) -> None:
    torch.save(model.state_dict(), path)


def _truncated(path: Path, model: SimpleNSM) -> None:
    nsm.save(model, path)
    path.write_bytes(path.read_bytes()[:20_000])


def _not_finite(path: Path, model: SimpleNSM) -> None:
    import copy

    model = copy.deepcopy(model)
    with torch.no_grad():
        next(model.embed.parameters())[3] = float("nan")
    nsm.save(model, path)


@pytest.mark.parametrize(
    ("write", "parts"),
    [
        (_text, ["was refused", "no PyTorch file"]),
        (_empty, ["cannot be read as a PyTorch file"]),
        (_folder, ["cannot be read as a PyTorch file"]),
        (_module, ["was refused", "whole module", "run code from the file", "nsm.save"]),
        (_state_dict, ["not a checkpoint written by nsm.save", "bare state_dict has no config"]),
        (_truncated, ["cannot be read as a PyTorch file"]),
        (_not_finite, ["16 of the 320 numbers in embed.weight are NaN", "Training diverged"]),
    ],
)
def test_what_is_not_a_checkpoint_is_refused(
    model: SimpleNSM, tmp_path: Path, write: Callable[[Path, SimpleNSM], None], parts: list[str], no_work: None
) -> None:
    write(tmp_path / "model.pt", model)
    result = invoke("export", tmp_path / "model.pt", "-t", "ort", "-o", tmp_path / "m.nsm")
    refused(result, 2, "model.pt", *parts)
    assert names(tmp_path) == ["model.pt"]


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refused(invoke("export", tmp_path / "model.pt", "-t", "ort"), 2, f"There is no file {tmp_path / 'model.pt'}")


@pytest.mark.parametrize("form", ["torch", "inside a checkpoint", "pickle"])
def test_a_malicious_file_is_never_run(tmp_path: Path, form: str) -> None:
    trap, path = tmp_path / "trap", tmp_path / "model.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Malicious(trap)))
    else:
        content = {"format": "nsm-checkpoint", "version": 1, "config": Malicious(trap)}
        torch.save(content if form == "inside a checkpoint" else Malicious(trap), path)
    refused(invoke("export", path, "-t", "ort", "-o", tmp_path / "m.nsm"), 2, "was refused", "run code from the file")
    assert names(tmp_path) == ["model.pt"]
    pickle_of_it = pickle.dumps(Malicious(trap))
    pickle.loads(pickle_of_it).close()
    assert trap.exists(), "the trap works where a file is unpickled"


def test_the_installed_command_refuses_a_malicious_file(tmp_path: Path) -> None:
    torch.save(Malicious(tmp_path / "trap"), tmp_path / "model.pt")
    done = program("nsm-export", "model.pt", "--target", "ort", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: model.pt was refused")
    assert len(done.stderr.splitlines()) == 1
    assert names(tmp_path) == ["model.pt"]


# -- exports that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [False, True])
def test_failed_parity_ends_with_5_and_keeps_the_bundle_aside(
    checkpoint: Path, tmp_path: Path, ready_graph: Callable[[float], None], as_json: bool
) -> None:
    ready_graph(1.001)
    result = invoke(*short(checkpoint, tmp_path / "m.nsm", "-t", "ort", *(["--json"] if as_json else [])))
    if as_json:
        said = json.loads(result.stdout)
        assert said["bundle"] is None
        assert said["kept_as"] == str(tmp_path / "m.nsm.failed")
        assert said["artifacts"][0]["parity"]["status"] == "failed"
    refused(result, 5, "Parity failed on onnxruntime fp32", "one-step error p99", "the budget 1e-05")
    assert names(tmp_path) == ["m.nsm.failed"]
    assert json.loads((tmp_path / "m.nsm.failed" / "parity.json").read_text())["passed"] is False


def test_failed_parity_says_where_the_bundle_is_kept(
    checkpoint: Path, tmp_path: Path, ready_graph: Callable[[float], None]
) -> None:
    ready_graph(1.001)
    result = invoke(*short(checkpoint, tmp_path / "m.nsm"))
    assert result.exit_code == 5
    assert str(tmp_path / "m.nsm.failed") in "".join(result.stderr.splitlines())


def test_required_parity_without_a_gpu_ends_with_5(
    checkpoint: Path, tmp_path: Path, ready_graph: Callable[[float], None], no_gpu: None
) -> None:
    result = invoke(*short(checkpoint, tmp_path / "m.nsm", "-t", "trt", "--require-parity"))
    refused(result, 5, "--require-parity: tensorrt could not be compared", "no usable NVIDIA GPU")
    assert names(tmp_path) == ["m.nsm.failed"]


def test_a_full_disk_is_one_line(
    checkpoint: Path, tmp_path: Path, ready_graph: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez", full)
    refused(invoke(*short(checkpoint, tmp_path / "m.nsm")), 4, "No space left on device")
    assert names(tmp_path) == []


def test_verbose_shows_the_traceback(checkpoint: Path, tmp_path: Path) -> None:
    result = invoke("export", checkpoint, "-t", "coreml", "-v")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("Error: There is no target")


# -- parity ----------------------------------------------------------------------------------------------------------

RESULT_KEYS = {
    "target",
    "precision",
    "status",
    "streams",
    "steps",
    "one_step",
    "free_run",
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


# -- bench -----------------------------------------------------------------------------------------------------------


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


# -- build -----------------------------------------------------------------------------------------------------------


def test_build_adds_a_target(bundle_copy: Path) -> None:
    keep_only(bundle_copy, "onnx")
    result = invoke("build", bundle_copy, "--target", "ov", "--json")
    succeeded(result)
    data = the_json(result)
    assert data["bundle"] == str(bundle_copy)
    (artifact,) = data["artifacts"]
    assert {"target", "precision", "effective_precision", "files", "parity"} <= set(artifact)
    assert (artifact["target"], artifact["parity"]["status"]) == ("openvino", "passed")
    assert [item.target for item in Bundle(bundle_copy).manifest.artifacts] == ["onnx", "openvino"]
    Bundle(bundle_copy).verify()


def test_build_of_an_engine_says_that_it_was_not_run(bundle_copy: Path, no_gpu: None) -> None:
    text = succeeded(invoke("build", bundle_copy, "-t", "trt", "--device", "sm86"))
    assert "tensorrt: NOT RUN. There is no usable NVIDIA GPU" in text
    assert f"nsm parity {bundle_copy} --target tensorrt" in text
    assert Bundle(bundle_copy).artifact("tensorrt").device == "sm86"


def test_a_build_that_fails_ends_with_4_and_names_its_log(bundle_copy: Path) -> None:
    (bundle_copy / "graphs" / "step.onnx").write_bytes(b"rubbish")
    keep_only(bundle_copy)
    result = invoke("build", bundle_copy, "-t", "trt")
    assert result.exit_code == 4
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "Error: TensorRT cannot parse step.onnx" in result.stderr
    log = Path(result.stderr.strip().splitlines()[-1].removeprefix("The builder's log: "))
    assert log.parent == bundle_copy.parent
    assert "ERROR" in log.read_text()
    Bundle(bundle_copy).verify()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["-t", "coreml"], ["There is no target 'coreml'"]),
        (["-t", "ov", "--device", "npu"], ["has a device 'npu'"]),
        ([], ["Missing option '-t' / '--target'"]),
    ],
)
def test_a_wrong_build_is_refused(exported: Path, options: list[str], parts: list[str]) -> None:
    refused(invoke("build", exported, *options), 2, *parts)


def test_build_without_the_package_names_the_extra(exported: Path, hide: Callable[..., None]) -> None:
    hide("tensorrt", "tensorrt_rtx")
    message = refused(invoke("build", exported, "-t", "trt", "--json"), 3, 'pip install "nsm-toolkit[tensorrt]"')
    assert "tensorrt or tensorrt_rtx" in message


# -- inspect and doctor ----------------------------------------------------------------------------------------------


def test_inspect_shows_what_a_client_must_know(exported: Path, bundle: Bundle) -> None:
    lines = [line.split() for line in succeeded(invoke("inspect", exported)).splitlines()]
    text = succeeded(invoke("inspect", exported))
    assert f"{exported}: SimpleNSM, {bundle.manifest.model['parameters']:,} parameters" in text
    assert bundle.manifest.fingerprint[:12] in text
    assert "2 lanes, chunks of 8 tokens; all files verified" in text
    assert f"torch {bundle.manifest.versions['torch']}" in text
    assert ["input", "tokens", "int64", "[2,", "8]", "0", "..", "19"] in lines
    assert ["output", "outputs", "float32", "[2,", "8,", "5]"] in lines
    for state in bundle.manifest.spec.states:
        (line,) = (line for line in lines if line[:1] == [state.name])
        assert line[-3:] == [state.init, state.past, state.present]
    for artifact in bundle.manifest.artifacts:
        assert any(line[:3] == [artifact.target, artifact.device, "fp32"] for line in lines)
        assert all(f"{artifact.target}: {note}" in text for note in artifact.notes)


def test_inspect_prints_one_json_object(exported: Path, bundle: Bundle) -> None:
    result = invoke("inspect", exported, "--json")
    succeeded(result)
    data = the_json(result)
    assert (data["bundle"], data["verified"]) == (str(exported), True)
    assert data["spec"] == json.loads(json.dumps(bundle.manifest.spec.to_json()))
    assert {item["target"] for item in data["artifacts"]} == {"onnx", "onnxruntime", "openvino", "tensorrt"}


def test_brackets_in_a_path_are_shown(exported: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(exported, tmp_path / "model[red].nsm"))
    assert f"{path}: SimpleNSM" in succeeded(invoke("inspect", path))


def test_doctor_says_what_installs_a_missing_piece(hide: Callable[..., None], no_gpu: None) -> None:
    hide("openvino", "torch")
    lines = succeeded(invoke("doctor")).splitlines()
    by_piece = {line.split("  ")[0]: line for line in lines}
    assert "missing" in by_piece["openvino"]
    assert 'pip install "nsm-toolkit[openvino]"' in by_piece["openvino"]
    assert 'pip install "nsm-toolkit[export]"' in by_piece["torch"]
    assert "missing" in by_piece["NVIDIA GPU"]
    assert "missing" not in by_piece["onnxruntime"]
    assert "pip install" not in by_piece["onnxruntime"]


def test_doctor_prints_one_json_object() -> None:
    result = invoke("doctor", "--json")
    succeeded(result)
    data = the_json(result)
    assert set(data) == {"findings", "targets"}
    assert all(set(item) == {"piece", "found", "purpose", "mend"} for item in data["findings"])
    assert data["targets"]["openvino"] == {"installed": True, "extra": "openvino", "packages": ["openvino"]}


# -- run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["onnx", "ort", "ov"])
def test_run_writes_what_the_model_answers(
    exported: Path, ids: Path, tmp_path: Path, model: SimpleNSM, target: str
) -> None:
    result = invoke("run", exported, "-t", target, "--data", ids, "--output", tmp_path / "out.npz", "--json")
    succeeded(result)
    data = the_json(result)
    assert data["output"] == str(tmp_path / "out.npz")
    assert [(item["sequence"], item["tokens"], item["output"]) for item in data["sequences"]] == [
        (0, 35, "outputs"),
        (1, 6, "outputs"),
    ]
    with np.load(ids) as given, np.load(tmp_path / "out.npz", allow_pickle=False) as written, torch.no_grad():
        assert written.files == ["0/outputs", "1/outputs"]
        for key, sequence, item in zip(written.files, (given["a"], given["b"][0]), data["sequences"], strict=True):
            wanted = model(torch.from_numpy(sequence[None]))[0].numpy()
            np.testing.assert_allclose(written[key], wanted, rtol=1e-4, atol=1e-5)
            assert item["last"] == int(wanted[-1].argmax())


def test_run_takes_the_recorded_sequences_and_the_first_target_that_passed(exported: Path, bundle: Bundle) -> None:
    result = invoke("run", exported, "--json")
    succeeded(result)
    data = the_json(result)
    assert (data["target"], data["output"]) == ("onnx", None)
    trace = bundle.trace()
    assert [item["tokens"] for item in data["sequences"]] == [trace.steps * 8] * trace.streams
    assert [item["last"] for item in data["sequences"]] == trace.outputs["outputs"][:, -1, -1].argmax(-1).tolist()


def test_run_for_people(exported: Path, ids: Path, tmp_path: Path) -> None:
    text = succeeded(invoke("run", exported, "--data", ids))
    assert "--output FILE.npz" in text
    assert [line.split()[:2] for line in text.splitlines()[1:3]] == [["0", "35"], ["1", "6"]]
    assert f"Wrote {tmp_path / 'o.npz'}." in succeeded(invoke("run", exported, "--data", ids, "-o", tmp_path / "o.npz"))


def test_run_does_not_overwrite_unless_told(exported: Path, ids: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    output.write_text("precious")
    refused(invoke("run", exported, "--data", ids, "-o", output), 2, f"{output} exists", "--force")
    assert output.read_text() == "precious"
    succeeded(invoke("run", exported, "--data", ids, "-o", output, "--force"))
    with np.load(output) as archive:
        assert archive["0/outputs"].shape == (35, 5)


def test_run_into_a_folder_that_is_not_there_is_one_line(exported: Path, ids: Path, tmp_path: Path) -> None:
    result = invoke("run", exported, "--data", ids, "-o", tmp_path / "absent" / "out.npz", "--json")
    assert result.exit_code in (2, 4)
    refused(result, result.exit_code, "absent")


@pytest.mark.parametrize(
    ("array", "parts"),
    [
        (np.full((1, 9), 20), ["tokens must lie in 0 .. 19"]),
        (np.zeros((1, 9)), ["tokens has the dtype int64; given float64"]),
        (np.zeros((1, 9, 2), np.int64), ["The model takes sequences of shape ['T']; given [9, 2]"]),
    ],
)
def test_run_refuses_what_the_model_does_not_take(
    exported: Path, tmp_path: Path, array: np.ndarray[Any, Any], parts: list[str]
) -> None:
    np.save(tmp_path / "x.npy", array)
    result = invoke("run", exported, "--data", tmp_path / "x.npy", "-o", tmp_path / "out.npz", "--json")
    refused(result, 2, *parts)
    assert names(tmp_path) == ["x.npy"]


def test_run_on_a_target_that_is_not_in_the_bundle_says_how_to_build_it(bundle_copy: Path) -> None:
    keep_only(bundle_copy, "onnx")
    result = invoke("run", bundle_copy, "-t", "ov")
    refused(result, 2, "no artifact for 'openvino'; it holds: onnx", f"nsm build {bundle_copy} --target openvino")


# -- bundles that are none -------------------------------------------------------------------------------------------

ON_A_BUNDLE = [["parity"], ["bench", "--steps", "10"], ["inspect"], ["run"], ["build", "-t", "onnx"]]


@pytest.mark.parametrize("command", ON_A_BUNDLE, ids=lambda command: str(command[0]))
def test_no_bundle_there_ends_with_2(tmp_path: Path, command: list[str]) -> None:
    refused(invoke(command[0], tmp_path / "m.nsm", *command[1:], "--json"), 2, "There is no bundle", "m.nsm")


def _flip(path: Path) -> None:
    content = bytearray((path / "graphs" / "weights.bin").read_bytes())
    content[1000] ^= 1
    (path / "graphs" / "weights.bin").write_bytes(content)


def _cut(path: Path) -> None:
    content = (path / "graphs" / "step.onnx").read_bytes()
    (path / "graphs" / "step.onnx").write_bytes(content[:-1])


def _lose(path: Path) -> None:
    (path / "graphs" / "weights.bin").unlink()


def _no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def _broken_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"format_version": 1')


def _other_version(path: Path) -> None:
    data = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**data, "format_version": 99}))


@pytest.mark.parametrize("command", ON_A_BUNDLE, ids=lambda command: str(command[0]))
@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (_flip, "graphs/weights.bin does not have the recorded SHA-256"),
        (_cut, "graphs/step.onnx has"),
        (_lose, "graphs/weights.bin is missing"),
        (_no_manifest, "is not a bundle: manifest.json cannot be read"),
        (_broken_manifest, "is not JSON"),
        (_other_version, "format version 99; this nsm reads version 1"),
    ],
)
def test_a_bundle_that_is_damaged_or_of_another_version_ends_with_6(
    bundle_copy: Path, command: list[str], damage: Callable[[Path], None], part: str
) -> None:
    damage(bundle_copy)
    refused(invoke(command[0], bundle_copy, *command[1:], "--json"), 6, part)


# -- without torch ---------------------------------------------------------------------------------------------------

DRIVER = """
import contextlib, io, json, sys
sys.modules["torch"] = None
from nsm.export.cli import main
results = {}
for name, arguments in json.loads(sys.argv[1]).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments, prog_name="nsm")
        except SystemExit as end:
            results[name] = [end.code, out.getvalue(), err.getvalue()]
assert sys.modules["torch"] is None
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def torchless(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr of every command, in one process that cannot import torch."""
    folder = tmp_path_factory.mktemp("torchless")
    bundle = str(shutil.copytree(exported, folder / "m.nsm"))
    calls = {
        "build": ["build", bundle, "--target", "openvino", "--json"],
        "parity": ["parity", bundle, "--json"],
        "bench": ["bench", bundle, "--steps", "10", "--json"],
        "inspect": ["inspect", bundle, "--json"],
        "run": ["run", bundle, "--output", str(folder / "out.npz"), "--json"],
        "doctor": ["doctor", "--json"],
        "export": ["export", str(folder / "model.pt"), "--target", "onnx"],
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(calls)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return {name: (result[0], result[1], result[2]) for name, result in json.loads(done.stdout).items()}


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "export"])
def test_a_command_on_a_bundle_works_without_torch(torchless: dict[str, tuple[int, str, str]], command: str) -> None:
    code, out, err = torchless[command]
    assert (code, err) == (0, "")
    data = json.loads(out)
    if command == "doctor":
        (finding,) = (item for item in data["findings"] if item["piece"] == "torch")
        assert finding["found"] is None
        assert finding["mend"] == 'pip install "nsm-toolkit[export]"'
    elif command == "inspect":
        assert data["verified"] is True
    elif command == "build":
        assert data["artifacts"][0]["parity"]["status"] == "passed"
    elif command == "parity":
        assert data["passed"] is True
        assert [item["status"] for item in data["results"]].count("passed") == 3
    elif command == "bench":
        assert len(data["results"]) == 3
    else:
        assert len(data["sequences"]) == 8


def test_export_without_torch_ends_with_3(torchless: dict[str, tuple[int, str, str]]) -> None:
    code, out, err = torchless["export"]
    assert (code, out) == (3, "")
    assert "Exporting needs torch, which is not installed" in err
    assert 'pip install "nsm-toolkit[export]"' in err


# -- as a user starts it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_nsm_export_has_help(option: str) -> None:
    done = program("nsm-export", option)
    assert done.returncode == 0
    assert "Usage: nsm-export [OPTIONS] MODEL" in done.stdout


def test_nsm_ends_with_the_exit_code_and_one_line(bundle_copy: Path) -> None:
    _flip(bundle_copy)
    done = program("nsm", "inspect", bundle_copy)
    assert (done.returncode, done.stdout) == (6, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("Error: ")


def test_progress_does_not_get_into_a_pipe(exported: Path) -> None:
    done = program("nsm", "parity", exported, "--target", "ort", "--steps", "2")
    assert done.returncode == 0
    assert "Checking" in done.stderr
    assert "Checking" not in done.stdout
    assert "\x1b" not in done.stdout
