from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from nsm.bundle import Bundle
from nsm.files.writing import write_json
from nsm.manifest import MANIFEST
from tests.export.helpers import (
    invoke,
    refused,
    succeeded,
    the_json,
)


def test_inspect_shows_what_a_client_must_know(exported: Path, bundle: Bundle) -> None:
    lines = [line.split() for line in succeeded(invoke("inspect", exported)).splitlines()]
    text = succeeded(invoke("inspect", exported))
    assert f"{exported}: SimpleNSM, {bundle.manifest.model['parameters']:,} parameters" in text
    assert bundle.manifest.fingerprint[:12] in text
    assert "2 lanes, chunk of 8 tokens; all files verified" in text
    assert f"torch {bundle.manifest.versions['torch']}" in text
    assert ["input", "tokens", "int64", "[2,", "8]", "0", "..", "19"] in lines
    assert ["output", "outputs", "float32", "[2,", "8,", "5]"] in lines
    for state in bundle.manifest.spec.states:
        (line,) = (line for line in lines if line[:1] == [state.name])
        writers = [entry.name for entry in bundle.manifest.spec.entries if state.name in entry.writes]
        assert " ".join(line).endswith(f"{state.init} {', '.join(writers) or '-'}")
    for entry in bundle.manifest.spec.entries:
        flops = bundle.manifest.work[entry.name].flops / 1e6
        assert f"Entry {entry.name}: {flops:.1f} MFLOP, " in text
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


def test_a_parity_that_lost_its_errors_is_shown_without_them(exported: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(exported, tmp_path / "model.nsm"))
    manifest = json.loads((path / MANIFEST).read_text())
    for artifact in manifest["artifacts"]:
        for name in ("one_step", "argmax_agreement"):
            artifact["parity"][name] = None
    write_json(path / MANIFEST, manifest)
    lines = [line.split() for line in succeeded(invoke("inspect", path)).splitlines()]
    (line,) = (line for line in lines if line[:3] == ["openvino", "cpu", "fp32"])
    assert (line[5:7], line[-1]) == (["passed", "-"], "-")
    manifest["artifacts"][0]["parity"]["free_run"] = 3
    write_json(path / MANIFEST, manifest)
    refused(invoke("inspect", path), 6, "edited by hand")


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
    assert all(set(item) == {"name", "found", "purpose", "fix"} for item in data["findings"])
    assert data["targets"]["openvino"] == {"installed": True, "extra": "openvino", "packages": ["openvino"]}
