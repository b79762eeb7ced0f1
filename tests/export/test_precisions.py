"""Several precisions of a target, side by side in a bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import nsm
from nsm.bundle import PARITY, Bundle
from nsm.errors import InputError, OutputExistsError
from nsm.export.verify import acceptance
from nsm.export.verify.another_target import add_target
from nsm.runtimes.opening.artifacts import chosen_artifact
from nsm.runtimes.targets import TARGETS
from tests.export.helpers import invoke, names, refused, succeeded, the_json

OPTIONS = ("-t", "ov", "--allow-slower", "--max-fp32-share", "0.7")


@pytest.fixture(scope="module")
def several(int8_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OpenVINO and ONNX Runtime in int8, then both in fp32, then OpenVINO in int8-weights. Do not change it."""
    path = tmp_path_factory.mktemp("several") / "model.nsm"
    shutil.copytree(int8_bundle, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acceptance, "SPEED_STEPS", 10)
        for target, precision in (("ov", "fp32"), ("ort", "fp32"), ("ov", "int8-weights")):
            text = succeeded(invoke("build", path, *OPTIONS[2:], "-t", target, "-p", precision))
            option = "" if precision == "fp32" else f" --precision {precision}"
            name = "openvino" if target == "ov" else "onnxruntime"
            assert f"Added to {path}. Next:\n  nsm parity {path} --target {name}{option}\n" in text
    return path


def test_each_has_its_own_folder_and_report(several: Path) -> None:
    bundle = Bundle(several)
    bundle.verify()
    labels = [item.label for item in bundle.manifest.artifacts]
    assert labels == ["openvino int8", "onnxruntime int8", "openvino", "onnxruntime", "openvino int8-weights"]
    folders = {"openvino", "openvino-int8", "openvino-int8-weights", "onnxruntime-int8", "graphs"}
    assert folders < set(names(several))
    for item in bundle.manifest.artifacts:
        (own,) = {Path(record.path).parts[0] for record in item.files}
        assert own == TARGETS[item.target].place(item.precision)
    results = json.loads((several / PARITY).read_text())["results"]
    found = [(item["target"], item["precision"]) for item in results]
    assert sorted(found) == sorted((item.target, item.precision) for item in bundle.manifest.artifacts)


def test_places_are_their_own_for_every_target_and_precision() -> None:
    places = [
        target.place(precision)
        for target in TARGETS.values()
        for precision in ("fp32", "fp16", "bf16", "int8", "int8-weights")
    ]
    assert len({place for place in places if place != "graphs"}) == len([p for p in places if p != "graphs"])


def test_each_is_opened_and_computes_in_its_precision(several: Path) -> None:
    ids = np.zeros((2, 8), np.int64)
    outputs = {}
    for precision in (None, "fp32", "int8", "int8-weights"):
        with nsm.open(several, target="ov", precision=precision) as session:
            assert session.effective_precision == (precision or "fp32")
            outputs[precision] = session.step(ids)["outputs"]
    np.testing.assert_array_equal(outputs[None], outputs["fp32"])
    assert not np.array_equal(outputs["fp32"], outputs["int8"])
    with nsm.open(several) as session:
        assert (session.target, session.effective_precision) == ("openvino", "fp32")
    with nsm.open(several, precision="int8") as session:
        assert (session.target, session.effective_precision) == ("openvino", "int8")
    with pytest.raises(InputError, match="no artifact for 'openvino' in bf16; it holds: openvino int8, "):
        nsm.open(several, "ov", precision="bf16")
    assert chosen_artifact(Bundle(several), None, "int8-weights").label == "openvino int8-weights"


def test_the_commands_take_the_precision(several: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.zeros((1, 20), np.int64))
    made = {}
    for precision in ("fp32", "int8"):
        output = tmp_path / f"{precision}.npz"
        options = ("-t", "ov", "-p", precision, "--data", tmp_path / "ids.npy", "-o", output)
        succeeded(invoke("run", several, *options))
        with np.load(output) as archive:
            made[precision] = archive["0/outputs"]
    assert not np.array_equal(made["fp32"], made["int8"])
    found = the_json(invoke("parity", several, "-t", "ov", "--steps", "3", "--json"))["results"]
    assert [item["precision"] for item in found] == ["int8", "fp32", "int8-weights"]
    page = tmp_path / "parity.html"
    succeeded(invoke("parity", several, "-p", "int8", "--steps", "3", "--html", page))
    assert ">openvino int8: <" in page.read_text()
    assert "✓ onnxruntime int8 passed" in page.read_text()
    shown = the_json(invoke("inspect", several, "-t", "ov", "-p", "int8", "-p", "fp32", "--json"))["artifacts"]
    assert [(item["target"], item["precision"]) for item in shown] == [("openvino", "int8"), ("openvino", "fp32")]
    assert len(the_json(invoke("inspect", several, "--json"))["artifacts"]) == 5
    refused(invoke("inspect", several, "-p", "bf16"), 2, "holds no artifact in bf16; it holds: openvino int8, ")
    refused(invoke("roofline", several, "-t", "ov", "-p", "bf16"), 2, "for 'openvino' in bf16")
    refused(invoke("run", several, "-p", "bf16", "--prompt", "a"), 2, "holds no artifact in bf16")


def test_scores_are_of_the_precision(several: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "a.npy", np.zeros(20, np.int64))
    output = tmp_path / "scores.jsonl"
    succeeded(invoke("score", several, tmp_path / "data", "-o", output, "-t", "ov", "-p", "int8"))
    assert json.loads(output.read_text().splitlines()[0])["precision"] == "int8"
    refused(invoke("score", several, tmp_path / "data", "-o", output, "-t", "ov"), 2, "'precision': 'int8'")


def test_they_are_measured_side_by_side(several: Path) -> None:
    found = the_json(invoke("bench", several, "-t", "ov", "--steps", "250", "--json"))["results"]
    assert [(item["precision"], item["effective_precision"]) for item in found] == [
        ("int8", "int8"),
        ("fp32", "fp32"),
        ("int8-weights", "int8-weights"),
    ]
    assert [item["ratio"] and item["ratio"]["against"] for item in found] == [None, "openvino int8", "openvino int8"]
    found = the_json(invoke("bench", several, "-p", "int8", "--overhead", "--steps", "1000", "--json"))["results"]
    assert [(item["target"], item["precision"]) for item in found] == [("openvino", "int8"), ("onnxruntime", "int8")]
    both = the_json(
        invoke("bench", several, "-t", "ov", "-p", "int8", "--against", several, "--steps", "250", "--json")
    )
    assert [item["precision"] for item in both["against"]] == ["int8"]


def test_one_that_is_there_is_replaced_with_force_alone(several: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(several, tmp_path / "model.nsm"))
    before = (path / "manifest.json").read_bytes()
    message = "already has an artifact for openvino in fp32. Give --force to replace it."
    refused(invoke("build", path, *OPTIONS), 2, message)
    with pytest.raises(OutputExistsError, match="Give --force"):
        add_target(path, "ov")
    assert (path / "manifest.json").read_bytes() == before
    assert f"Replaced in {path}. Next:\n" in succeeded(invoke("build", path, *OPTIONS, "--force"))
    labels = [item.label for item in Bundle(path).manifest.artifacts]
    assert labels == [item.label for item in Bundle(several).manifest.artifacts], "it keeps its place"
    Bundle(path).verify()
    assert Bundle(path).others() == []


def test_what_is_built_of_the_portable_graphs_is_in_fp32_still(several: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(several, tmp_path / "model.nsm"))
    artifact = add_target(path, "triton")
    assert artifact.parity.status == "passed"
    assert {record.path.split("/")[0] for record in artifact.files} == {"triton"}
    assert add_target(path, "onnx").parity.status == "passed"
    assert Bundle(path).others() == []
