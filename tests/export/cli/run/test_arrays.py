from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nsm.bundle import Bundle
from nsm.models.simple import SimpleNSM
from tests.export.helpers import (
    invoke,
    keep_only,
    names,
    refused,
    succeeded,
    the_json,
)


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


def test_run_overwrites_its_own_outputs_if_told_and_nothing_else(exported: Path, ids: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    np.savez(output, weights=np.ones(3))
    others = (output.read_bytes(), b"precious", b"PK\x05\x06 half a zip")
    for content in others:
        output.write_bytes(content)
        for options in ([], ["--force"]):
            message = refused(invoke("run", exported, "--data", ids, "-o", output, *options), 2, f"{output} exists")
            assert "is not an .npz of outputs that nsm run wrote, so it is not replaced" in message
        assert output.read_bytes() == content
    output.write_bytes(b"")
    succeeded(invoke("run", exported, "--data", ids, "-o", output))
    before = output.read_bytes()
    refused(invoke("run", exported, "--data", ids, "-o", output), 2, f"{output} exists", "--force")
    assert output.read_bytes() == before
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
        (np.zeros((1, 9, 2), np.int64), ["Expected sequences of shape ['T']; given [9, 2]"]),
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
