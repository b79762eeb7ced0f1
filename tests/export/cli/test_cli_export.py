from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import nsm
from nsm.bundle import Bundle
from nsm.errors import DeviceUnavailableError
from nsm.models.simple import SimpleNSM
from nsm.runtimes.backends import onnxruntime_cuda
from tests.export.foreign_graphs import silero
from tests.export.helpers import (
    invoke,
    names,
    program,
    refused,
    short,
    succeeded,
    the_json,
)

# -- export ----------------------------------------------------------------------------------------------------------


def test_nsm_export_prints_one_json_object(checkpoint: Path, ids: Path, tmp_path: Path) -> None:
    arguments = [
        "-t",
        "ov",
        "--target",
        "ORT",
        "--data",
        str(ids),
        "--tokens-per-call",
        "16",
        "--golden-steps",
        "4",
        "--json",
    ]
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
    assert (
        "Instead, the engines' inputs, outputs and states were checked against the model's.\nBuilt by tensorrt" in text
    )
    for following in (
        f"nsm inspect {output}",
        f"nsm bench {output} --target onnx",
        f"nsm parity {output} --target tensorrt",
    ):
        assert following in text
    assert "synthetic" in " ".join(result.stderr.split())
    assert "Building onnx" in result.stderr


def test_of_graphs_that_were_not_run_nothing_is_said_to_be_checked(
    checkpoint: Path, tmp_path: Path, ready_graph: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_arguments: object) -> None:
        raise DeviceUnavailableError("There is no GPU.")

    monkeypatch.setattr(onnxruntime_cuda, "load", absent)
    text = succeeded(invoke(*short(checkpoint, tmp_path / "m.nsm", "-t", "cuda")))
    said = text[text.index("onnxruntime-cuda: NOT RUN.") :].splitlines()
    assert said[:2] == [
        "onnxruntime-cuda: NOT RUN. There is no GPU.",
        f"To check it, run on a machine with the hardware: nsm parity {tmp_path / 'm.nsm'} --target onnxruntime-cuda",
    ]


def test_an_export_replaces_the_bundle_that_one_is_in(
    checkpoint: Path, bundle_copy: Path, ready_graph: Callable[[float], None]
) -> None:
    with contextlib.chdir(bundle_copy):
        refused(invoke(*short(checkpoint, Path())), 2, f"{bundle_copy} exists", "--force")
        result = invoke(*short(checkpoint, Path(), "-t", "ort", "--force"))
    assert f"Wrote {bundle_copy}. Next:" in succeeded(result)
    assert 'cd "$PWD"' in result.stderr
    assert [item.target for item in Bundle(bundle_copy).manifest.artifacts] == ["onnxruntime"]
    Bundle(bundle_copy).verify()


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
        (["-t", "ort", "-p", "fp8"], 2, ["Unknown precision 'fp8'", "fp32, fp16"]),
        (["-t", "onnx", "-p", "int8"], 3, ["onnx is not built in int8. It is built in: fp32."]),
        (["-t", "ort", "-t", "ov", "-p", "bf16"], 3, ["onnxruntime is not built in bf16", "fp32, int8, int8-weights"]),
        (["-t", "ort", "--max-fp32-share", "-0.1"], 2, ["--max-fp32-share must be in 0 .. 1; given -0.1"]),
        (["-t", "trt", "--device", "sm12"], 2, ["has the device 'sm12'", "sm86"]),
        (["-t", "ort", "--device", "cuda"], 2, ["has the device 'cuda'", "cpu"]),
        (
            ["-t", "ort", "--tokens-per-call", "12"],
            2,
            ["multiple of the model's chunk of 8 tokens; given 12", "Take 16."],
        ),
        (["-t", "ort", "--tokens-per-call", "0"], 2, ["given 0", "Take 8."]),
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


# -- of foreign graphs -----------------------------------------------------------------------------------------------


def _newer(model: onnx.ModelProto) -> None:
    model.opset_import[0].version, model.ir_version = 21, 10


@pytest.mark.parametrize(
    ("options", "code", "parts"),
    [
        (["--debug-outputs"], 3, ["--debug-outputs shows how tokens are routed", "ONNX graph vad.onnx has no bank"]),
        (["--opset", "20"], 2, ["--opset 20 is older than", "ONNX graph vad.onnx, which is 21", "Give --opset 21 or"]),
    ],
)
def test_what_a_foreign_graph_cannot_have_is_refused(
    tmp_path: Path, options: list[str], code: int, parts: list[str], no_work: None
) -> None:
    path = silero(tmp_path / "vad.onnx", _newer)
    refused(invoke("export", path, "-t", "ort", "--constant", "sr=16000", "--dry-run", *options), code, *parts)
    assert names(tmp_path) == ["vad.onnx"]


@pytest.mark.parametrize("options", [[], ["--opset", "21"], ["--opset", "22"]])
def test_a_foreign_graph_stays_in_its_operator_set_or_gets_a_newer_one(tmp_path: Path, options: list[str]) -> None:
    path, output = silero(tmp_path / "vad.onnx", _newer), tmp_path / "vad.nsm"
    succeeded(invoke(*short(path, output, "-t", "ort", "--constant", "sr=16000", *options)))
    found = onnx.load(str(output / "graphs" / "step.onnx"), load_external_data=False).opset_import
    assert [(item.domain, item.version) for item in found] == [("", int((options or ["21"])[-1]))]


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
        (_folder, ["cannot be read", "Expected a .pt written by nsm.save"]),
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
