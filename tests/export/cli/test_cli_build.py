from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from nsm.bundle import Bundle
from tests.export.helpers import (
    invoke,
    keep_only,
    names,
    refused,
    succeeded,
    the_json,
)


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


@pytest.mark.parametrize(("inside", "given"), [(".", "."), ("graphs", ".."), (".", "graphs/.."), (".", "../copy.nsm")])
def test_build_adds_to_the_bundle_that_one_is_in(bundle_copy: Path, inside: str, given: str) -> None:
    keep_only(bundle_copy, "onnx")
    before = names(bundle_copy.parent)
    with contextlib.chdir(bundle_copy / inside):
        result = invoke("build", given, "-t", "ort")
        again = invoke("build", bundle_copy, "-t", "ort", "--force", "--json")
    text = succeeded(result)
    assert f"Added to {bundle_copy}. Next:\n  nsm parity {bundle_copy} --target onnxruntime" in text
    assert 'cd "$PWD"' in result.stderr
    assert (the_json(again)["bundle"], the_json(again)["replaced"], again.stderr) == (str(bundle_copy), True, "")
    assert [item.target for item in Bundle(bundle_copy).manifest.artifacts] == ["onnx", "onnxruntime"]
    Bundle(bundle_copy).verify()
    assert names(bundle_copy.parent) == before


def test_build_of_an_engine_says_that_it_was_not_run(bundle_copy: Path, no_gpu: None) -> None:
    text = succeeded(invoke("build", bundle_copy, "-t", "trt", "--device", "sm86", "--force"))
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
        (["-t", "ov", "--device", "npu"], ["has the device 'npu'"]),
        ([], ["Missing option '-t' / '--target'"]),
    ],
)
def test_a_wrong_build_is_refused(exported: Path, options: list[str], parts: list[str]) -> None:
    refused(invoke("build", exported, *options), 2, *parts)


def test_build_without_the_package_names_the_extra(exported: Path, hide: Callable[..., None]) -> None:
    hide("tensorrt", "tensorrt_rtx")
    message = refused(invoke("build", exported, "-t", "trt", "--json"), 3, 'pip install "nsm-toolkit[tensorrt]"')
    assert "tensorrt or tensorrt_rtx" in message
