from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest

import nsm
from nsm.bundle import PARITY, Bundle
from nsm.errors import (
    BuildError,
    BundleDamagedError,
    BundleError,
    DeviceUnavailableError,
    InputError,
    MissingDependencyError,
    ParityError,
    UnsupportedError,
)
from nsm.export.verify import another_target
from nsm.export.verify import artifact as build
from nsm.export.verify.another_target import add_target
from nsm.export.verify.artifact import PRECISIONS, Acceptance, plan_targets
from nsm.manifest import MANIFEST
from nsm.results import ParityResult
from nsm.runtimes import targets
from nsm.runtimes.targets import TARGETS, find_target
from nsm.staging import write_manifest


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def changed(before: dict[str, bytes], directory: Path) -> set[str]:
    """Names of the files that are new, gone, or different."""
    after = contents(directory)
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def keep_only(path: Path, *targets: str) -> None:
    """Forget the bundle's other artifacts, files and reports included."""
    bundle = Bundle(path)
    kept = tuple(item for item in bundle.manifest.artifacts if item.target in targets)
    for folder in {TARGETS[a.target].folder for a in bundle.manifest.artifacts if a not in kept} - {"graphs"}:
        shutil.rmtree(path / folder)
    report = json.loads((path / PARITY).read_text())
    report["results"] = [item for item in report["results"] if item["target"] in targets]
    (path / PARITY).write_text(json.dumps(report))
    write_manifest(path, replace(bundle.manifest, artifacts=kept))
    Bundle(path).verify()


def perturbed(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """OpenVINO's conversion, with the largest weights a thousandth off."""

    def converted(path: str) -> Any:
        network = convert(path)
        for op in network.get_ops():
            if op.get_type_name() == "Constant" and op.get_element_type() == openvino.Type.f32 and op.data.size > 200:
                changed = openvino.opset13.constant(op.data * np.float32(1.001))
                for target in op.output(0).get_target_inputs():
                    target.replace_source_output(changed.output(0))
        return network

    return converted


# -- requests --------------------------------------------------------------------------------------------------------


def test_no_target_is_refused() -> None:
    with pytest.raises(InputError, match=r"No target was given\. .*--target"):
        plan_targets([], "fp32", None)


def test_an_unknown_precision_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"Unknown precision 'fp12'.*fp32, fp16, bf16, int8, int8-weights"):
        plan_targets(["onnx"], "fp12", None)


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "fp32"])
def test_a_precision_that_a_target_does_not_have_is_unsupported(precision: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"onnx is not built in {precision}\. It is built in: fp32\."):
        plan_targets(["onnx"], precision, None)


def test_one_target_without_the_precision_is_enough_to_refuse() -> None:
    with pytest.raises(UnsupportedError, match=r"onnxruntime is not built in bf16.*: fp32, int8, int8-weights\."):
        plan_targets(["openvino", "onnxruntime"], "bf16", None)


def test_an_unknown_device_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"No target has the device 'gpu'.* openvino: cpu"):
        plan_targets(["openvino"], "fp32", "gpu")
    with pytest.raises(InputError, match=r"the device 'sm12'.*onnx: cpu; tensorrt: portable, current, .*sm86"):
        plan_targets(["onnx", "tensorrt"], "fp32", "sm12")


def test_a_device_is_for_the_targets_that_have_it(exported: Path, bundle: Bundle, tmp_path: Path) -> None:
    planned = plan_targets(["ort", "openvino", "onnxruntime", "trt"], "fp32", "SM86")
    assert [(item.target.name, item.device) for item in planned] == [
        ("onnxruntime", None),
        ("openvino", None),
        ("tensorrt", "sm86"),
    ]
    shutil.copytree(exported / "graphs", tmp_path / "graphs")
    built = [build.build_target(tmp_path, bundle.manifest.spec, item.target, item.device) for item in planned]
    assert [item.device for item in built] == ["cpu", "cpu", "sm86"]


@pytest.mark.parametrize("name", list(TARGETS))
def test_a_missing_package_is_named_with_the_extra_that_installs_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    target = find_target(name)
    with pytest.raises(
        MissingDependencyError,
        match=rf'needs the package {target.packages[0]}.*pip install "nsm-toolkit\[{target.extra}\]"',
    ):
        plan_targets([name], "fp32", None)


# -- adding and replacing --------------------------------------------------------------------------------------------


def test_a_target_is_added_from_the_bundles_onnx(bundle_copy: Path) -> None:
    keep_only(bundle_copy, "onnx")
    seen: list[tuple[int, int]] = []
    artifact = add_target(bundle_copy, "ov", progress=lambda done, total: seen.append((done, total)))
    assert (artifact.target, artifact.precision, artifact.effective_precision) == ("openvino", "fp32", "fp32")
    assert artifact.parity.status == "passed"
    assert seen[-1][0] == seen[-1][1] > 0
    bundle = Bundle(bundle_copy)
    bundle.verify()
    assert [item.target for item in bundle.manifest.artifacts] == ["onnx", "openvino"]
    assert bundle.artifact("openvino") == artifact
    parity = json.loads((bundle_copy / PARITY).read_text())
    assert parity["passed"] is True
    assert [item["target"] for item in parity["results"]] == ["onnx", "openvino"]
    assert [path.name for path in bundle_copy.parent.iterdir()] == [bundle_copy.name]
    with nsm.open(bundle_copy, target="openvino") as session:
        assert session.run(np.zeros((2, 8), np.int64))["outputs"].shape == (2, 8, 5)


def test_an_artifact_for_the_same_target_and_precision_is_replaced(bundle_copy: Path, no_gpu: None) -> None:
    before = Bundle(bundle_copy)
    artifact = add_target(bundle_copy, "tensorrt", "SM86", force=True)
    bundle = Bundle(bundle_copy)
    bundle.verify()
    assert artifact.device == "sm86"
    assert artifact.parity.status == "not_run"
    assert "no usable NVIDIA GPU" in str(artifact.parity.reason)
    assert [item.target for item in bundle.manifest.artifacts].count("tensorrt") == 1
    assert {a.target for a in bundle.manifest.artifacts} == {a.target for a in before.manifest.artifacts}
    assert bundle.artifact("tensorrt").files != before.artifact("tensorrt").files
    for name in ("onnx", "onnxruntime", "openvino"):
        assert bundle.artifact(name) == before.artifact(name)
    results = json.loads((bundle_copy / PARITY).read_text())["results"]
    assert {"onnx", "onnxruntime", "openvino"} <= {item["target"] for item in results}


def test_building_again_gives_one_report_per_target(bundle_copy: Path) -> None:
    add_target(bundle_copy, "onnxruntime", force=True)
    results = json.loads((bundle_copy / PARITY).read_text())["results"]
    names = [item["target"] for item in results]
    assert sorted(names) == sorted(set(names))
    assert "onnxruntime" in names


# -- failing ---------------------------------------------------------------------------------------------------------


def test_a_build_that_fails_leaves_the_bundle_as_it_was(bundle_copy: Path) -> None:
    bundle = Bundle(bundle_copy)
    (bundle_copy / "graphs" / "step.onnx").write_bytes(b"rubbish")
    write_manifest(bundle_copy, replace(bundle.manifest, artifacts=(bundle.artifact("tensorrt"),)))
    before = contents(bundle_copy)
    with pytest.raises(BuildError, match="TensorRT cannot parse") as caught:
        add_target(bundle_copy, "tensorrt", force=True)
    assert changed(before, bundle_copy) == set()
    assert caught.value.log is not None
    assert sorted(bundle_copy.parent.iterdir()) == sorted([bundle_copy, caught.value.log])


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_a_full_disk_late_in_a_build_leaves_the_bundle_as_it_was(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    before = contents(bundle_copy)

    def full(*_args: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(another_target, "merge_parity", full)
    with pytest.raises(OSError, match="No space left"):
        add_target(bundle_copy, target, "sm86" if target == "tensorrt" else None, force=True)
    assert changed(before, bundle_copy) == set()
    Bundle(bundle_copy).verify()
    assert list(bundle_copy.parent.iterdir()) == [bundle_copy]


def test_an_artifact_that_is_another_model_does_not_replace_the_good_one(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(bundle_copy)
    # In this process, where the converter is another one.
    monkeypatch.setitem(targets._ROWS, "openvino", replace(find_target("openvino"), in_process=True))
    monkeypatch.setattr(openvino, "convert_model", perturbed(openvino.convert_model))
    with pytest.raises(ParityError, match=r"Parity failed on openvino fp32: .*one-step error"):
        add_target(bundle_copy, "openvino", force=True)
    assert changed(before, bundle_copy) == set()
    Bundle(bundle_copy).verify()
    failed = Bundle(bundle_copy.with_name(bundle_copy.name + ".failed"))
    failed.verify()
    assert failed.artifact("openvino").parity.status == "failed"
    report = json.loads((failed.path / PARITY).read_text())
    assert report["passed"] is False
    (result,) = (item for item in report["results"] if item["target"] == "openvino")
    assert result["failures"]


def test_a_damaged_bundle_is_not_built_upon(bundle_copy: Path) -> None:
    weights = bundle_copy / "graphs" / "weights.bin"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    before = contents(bundle_copy)
    with pytest.raises(BundleDamagedError, match=r"graphs/weights\.bin does not have the recorded SHA-256"):
        add_target(bundle_copy, "openvino", force=True)
    assert changed(before, bundle_copy) == set()


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"results": [{"target": [], "status": "passed"}]}',
        "3",
        "{}",
        '{"results": {}}',
        '{"results": [3]}',
        '{"results": [{"target": "onnx"}]}',
        '{"results": [{"target": "onnx", "status": "passed"}]}',
    ],
)
def test_reports_that_are_none_are_damage_and_nothing_is_changed(bundle_copy: Path, text: str) -> None:
    """With a record that fits, so that the hash tells nothing."""
    (bundle_copy / PARITY).write_text(text)
    write_manifest(bundle_copy, Bundle(bundle_copy).manifest)
    before = contents(bundle_copy)
    with pytest.raises(
        BundleDamagedError, match=r"parity\.json: expected an object with the list results.*Export the bundle again"
    ) as caught:
        add_target(bundle_copy, "onnx", force=True)
    assert caught.value.exit_code == 6
    assert changed(before, bundle_copy) == set()
    Bundle(bundle_copy).verify()


def test_reports_that_are_not_there_are_begun(bundle_copy: Path) -> None:
    (bundle_copy / PARITY).unlink()
    write_manifest(bundle_copy, Bundle(bundle_copy).manifest)
    add_target(bundle_copy, "onnx", force=True)
    report = json.loads((bundle_copy / PARITY).read_text())
    assert (report["passed"], [item["target"] for item in report["results"]]) == (True, ["onnx"])


@pytest.mark.parametrize("target", list(TARGETS))
def test_an_entry_that_is_called_like_a_path_is_refused_and_nothing_is_written(bundle_copy: Path, target: str) -> None:
    """A graph lies where the name leads, so that a builder would find it, and write its own file beside it."""
    graph = bundle_copy / "graphs" / "decode.onnx"
    (bundle_copy.parent / "evil.onnx").write_bytes(graph.read_bytes())
    data = json.loads((bundle_copy / MANIFEST).read_text())
    next(entry for entry in data["spec"]["entries"] if entry["name"] == "decode")["name"] = "../../evil"
    (bundle_copy / MANIFEST).write_text(json.dumps(data))
    before = contents(bundle_copy.parent)
    for use in (add_target, nsm.open):
        with pytest.raises(BundleError, match=r"called '\.\./\.\./evil'.*Was it edited by hand\?") as caught:
            use(bundle_copy, target)
        assert caught.value.exit_code == 6
    assert changed(before, bundle_copy.parent) == set()


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [("coreml", None, "There is no target 'coreml'"), ("openvino", "npu", "has the device 'npu'")],
)
def test_a_wrong_request_is_refused_before_the_bundle_is_touched(
    tmp_path: Path, name: str, device: str | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        add_target(tmp_path / "there is none.nsm", name, device)


# -- the gate --------------------------------------------------------------------------------------------------------


def test_an_artifact_that_could_not_run_passes_unless_parity_is_required(bundle: Bundle) -> None:
    not_run = Acceptance(
        replace(bundle.artifact("tensorrt"), parity=ParityResult.not_run("There is no GPU here.")), None
    )
    not_run.require()
    with pytest.raises(ParityError, match=r"--require-parity: tensorrt could not be compared\. There is no GPU"):
        not_run.require(require_parity=True)


def test_an_artifact_whose_hardware_is_absent_is_marked_not_run_with_the_reason(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_args: Any) -> None:
        raise DeviceUnavailableError("There is no such accelerator in this machine.")

    monkeypatch.setattr(build, "open_artifact", absent)
    found = build.check_artifact(bundle, bundle.artifact("openvino"), bundle.trace())
    assert found.report is None
    assert found.artifact.parity == ParityResult.not_run("There is no such accelerator in this machine.")


# -- without torch ---------------------------------------------------------------------------------------------------


def test_targets_are_built_where_torch_cannot_be_imported(bundle_copy: Path) -> None:
    keep_only(bundle_copy, "onnx")
    script = """
import sys
sys.modules["torch"] = None
from pathlib import Path
from nsm.export.verify.another_target import add_target
for target in ("openvino", "tensorrt", "onnxruntime"):
    print(target, add_target(Path(sys.argv[1]), target).parity.status)
"""
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", script, str(bundle_copy)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == ["openvino passed", "tensorrt not_run", "onnxruntime passed"]
    Bundle(bundle_copy).verify()
