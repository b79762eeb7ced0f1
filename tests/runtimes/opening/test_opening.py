from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nsm
from nsm.bundle import Bundle
from nsm.errors import (
    BundleDamagedError,
    BundleError,
    DeviceUnavailableError,
    InputError,
    MissingDependencyError,
    RunError,
    StreamError,
)
from nsm.manifest import MANIFEST
from nsm.runtimes.backends import onnxruntime, onnxruntime_unoptimized, openvino
from nsm.runtimes.base import Runtime, State
from nsm.runtimes.opening import cpu_features
from nsm.runtimes.opening.artifacts import chosen_artifact, open_artifact, open_bundle
from nsm.runtimes.session.session import Session
from nsm.spec import StepSpec
from nsm.trace import Array
from tests.runtimes.fake import FakeRuntime, assert_same


def edit(bundle: Path, change: Callable[[Any], object]) -> None:
    """Change the manifest by hand."""
    path = bundle / MANIFEST
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def test_a_bundle_is_opened_from_a_path_a_string_or_itself(exported: Path, bundle: Bundle) -> None:
    for given in (exported, str(exported), bundle):
        with open_bundle(given, "onnx") as session:
            assert (session.target, session.batch) == ("onnx", 2)
            assert session.fingerprint == bundle.manifest.fingerprint
            assert_same(session.read_state(), bundle.state_init())


def test_the_package_opens_bundles(exported: Path) -> None:
    assert nsm.open is open_bundle
    assert nsm.Session is Session
    with nsm.open(exported, target="ort", threads=1) as session:
        assert session.target == "onnxruntime"
        assert np.isfinite(session.run(np.zeros((2, 20), int))["outputs"]).all()


def test_the_default_is_the_first_target_that_passed(bundle: Bundle, bundle_copy: Path) -> None:
    assert [item.target for item in bundle.manifest.artifacts][:2] == ["onnx", "onnxruntime"]
    with open_bundle(bundle) as session:
        assert session.target == "onnx"

    def fail_the_first(data: Any) -> None:
        data["artifacts"][0]["parity"]["status"] = "failed"

    edit(bundle_copy, fail_the_first)
    with open_bundle(bundle_copy) as session:
        assert session.target == "onnxruntime"


def test_an_alias_opens_its_target(bundle: Bundle, target: str) -> None:
    alias = {"openvino": "OV", "onnxruntime": "ort"}.get(target, target)
    with open_bundle(bundle, alias) as session:
        assert session.target == target


def test_an_unknown_target_is_refused(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="There is no target 'coreml'"):
        open_bundle(bundle, "coreml")


def test_a_target_that_is_not_in_the_bundle_says_how_to_build_it(bundle_copy: Path) -> None:
    def drop(data: Any) -> None:
        data["artifacts"] = [item for item in data["artifacts"] if item["target"] != "openvino"]

    edit(bundle_copy, drop)
    with pytest.raises(InputError, match=r"no artifact for 'openvino'; it holds: onnx, .*nsm build .* openvino"):
        open_bundle(bundle_copy, "ov")


def test_no_bundle_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no bundle"):
        open_bundle(tmp_path / "no.nsm")


def test_a_damaged_file_is_noticed_before_a_backend_sees_it(bundle_copy: Path, target: str) -> None:
    bundle = Bundle(bundle_copy)
    for record in bundle.artifact(target).files:
        path = bundle_copy / record.path
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
        with pytest.raises(BundleDamagedError, match=record.path):
            open_bundle(bundle_copy, target)
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    open_bundle(bundle_copy, target).close()


def test_a_damaged_initial_state_is_noticed(bundle_copy: Path) -> None:
    path = bundle_copy / "state_init.npz"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleDamagedError, match=r"state_init\.npz has \d+ bytes"):
        open_bundle(bundle_copy, "onnx")


def test_an_entry_that_leads_out_of_the_bundle_is_refused(bundle_copy: Path) -> None:
    def lead_out(data: Any) -> None:
        entries = data["spec"]["entries"]
        entries.append({**entries[0], "name": "../../step"})

    edit(bundle_copy, lead_out)
    with pytest.raises(BundleError, match=r"\.\./\.\./step"):
        open_bundle(bundle_copy, "onnx")


def test_openvino_never_runs_a_graph_with_an_input_that_nobody_fills(bundle_copy: Path) -> None:
    def forget(data: Any) -> None:
        for entry in data["spec"]["entries"]:
            if entry["name"] != "commit":
                entry["reads"] = [name for name in entry["reads"] if name != "0.bank"]

    edit(bundle_copy, forget)
    with pytest.raises(BundleDamagedError, match=r"step\.xml has the input past_state\.0\.bank.*edited by hand"):
        open_bundle(bundle_copy, "openvino")


def test_nor_one_that_is_opened_later(bundle_copy: Path) -> None:
    def forget(data: Any) -> None:
        (commit,) = [entry for entry in data["spec"]["entries"] if entry["name"] == "commit"]
        commit["reads"].remove("0.bank")

    edit(bundle_copy, forget)
    with open_bundle(bundle_copy, "openvino") as session:
        tokens = np.ones((session.batch, session.spec.chunk_size), np.int64)
        session.feed(tokens[:, :1])
        with pytest.raises(BundleDamagedError, match=r"commit\.xml has the input past_state\.0\.bank"):
            session.feed(tokens[:, 1:])


def test_a_file_that_is_run_but_was_not_recorded_is_refused(bundle_copy: Path) -> None:
    def forget(data: Any) -> None:
        for artifact in data["artifacts"]:
            artifact["files"] = [item for item in artifact["files"] if not item["path"].endswith("step.onnx")]

    edit(bundle_copy, forget)
    with pytest.raises(BundleError, match=r"the manifest lists no step\.onnx for onnx\. Export the bundle again"):
        open_bundle(bundle_copy, "onnx")


@pytest.mark.parametrize("device", ["gpu", "cuda:0", "sm86", "cpu:7"])
def test_a_device_the_target_does_not_have_is_refused(bundle: Bundle, target: str, device: str) -> None:
    with pytest.raises(InputError, match=rf"{target} has no device '{device}'.*cpu"):
        open_bundle(bundle, target, device=device)


def test_a_device_may_be_named(bundle: Bundle, target: str) -> None:
    for device in ("cpu", "CPU"):
        with open_bundle(bundle, target, device=device) as session:
            assert session.target == target


@pytest.mark.parametrize("threads", [0, -1])
def test_less_than_one_thread_is_refused(bundle: Bundle, target: str, threads: int) -> None:
    with pytest.raises(InputError, match=f"threads.*{threads}"):
        open_bundle(bundle, target, threads=threads)


def test_tensorrt_without_a_gpu_is_unavailable(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(DeviceUnavailableError, match="no usable NVIDIA GPU in this machine") as caught:
        open_bundle(bundle, "trt")
    assert caught.value.exit_code == 3


def test_a_backend_that_is_not_installed_names_its_extra(
    bundle: Bundle, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(MissingDependencyError, match=r'pip install "nsm-toolkit\['):
        open_bundle(bundle, target)


def test_the_default_is_one_whose_backend_is_installed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device has one backend; the first target that passed where the bundle was made may be another's."""
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else real(name))
    with open_bundle(bundle) as session:
        assert session.target == "openvino"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"target onnx needs .* pip install"):
        open_bundle(bundle)


@pytest.mark.parametrize("error", [DeviceUnavailableError, MissingDependencyError])
def test_the_default_is_one_that_can_be_opened_here(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """A bundle comes from another machine, and the first that passed there may need what is not here."""

    def refuse(name: str) -> Callable[..., Runtime]:
        def load(*arguments: object) -> Runtime:
            raise error(f"{name} is not here")

        return load

    monkeypatch.setattr(onnxruntime_unoptimized, "load", refuse("onnx"))
    monkeypatch.setattr(onnxruntime, "load", refuse("onnxruntime"))
    with open_bundle(bundle) as session:
        assert session.target == "openvino"
    with pytest.raises(error, match="onnxruntime is not here"):
        open_bundle(bundle, "onnxruntime")
    monkeypatch.setattr(openvino, "load", refuse("openvino"))
    with pytest.raises(error, match="onnx is not here"):
        open_bundle(bundle)


def test_the_default_is_not_one_for_other_processors(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_features, "int8_dot_products", lambda: False)
    first, *others = bundle.manifest.artifacts
    elsewhere = replace(first, device="cpu-dot", precision="int8")
    bundle.manifest = replace(bundle.manifest, artifacts=(elsewhere, *others))
    assert chosen_artifact(bundle, None).target == "onnxruntime"
    with open_bundle(bundle) as session:
        assert session.target == "onnxruntime"
    bundle.manifest = replace(bundle.manifest, artifacts=(elsewhere,))
    assert chosen_artifact(bundle, None) is elsewhere
    with pytest.raises(DeviceUnavailableError, match="for processors with VNNI"):
        open_bundle(bundle)


def test_the_default_is_not_one_for_a_gpu_that_is_not_here(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a bundle that was made where there is one: its engine passed there."""
    first, *others = bundle.manifest.artifacts
    engine = replace(first, device="sm86")
    bundle.manifest = replace(bundle.manifest, artifacts=(engine, *others))
    assert chosen_artifact(bundle, None) is engine  # the device is all there

    def refuse(*_: object) -> Runtime:
        raise DeviceUnavailableError("no GPU here")

    monkeypatch.setattr(onnxruntime_unoptimized, "load", refuse)
    assert chosen_artifact(bundle, None).target == "onnxruntime"
    assert chosen_artifact(bundle, "onnx") is engine


def test_the_default_is_not_one_that_is_built_only_when_asked_for(bundle: Bundle) -> None:
    first, *others = bundle.manifest.artifacts
    mobile = replace(first, target="mobile")
    for artifacts, wanted in (((mobile, first, *others), "onnx"), ((mobile,), "mobile")):
        bundle.manifest = replace(bundle.manifest, artifacts=artifacts)
        assert chosen_artifact(bundle, None).target == wanted


def test_an_artifact_is_opened_by_itself(bundle: Bundle) -> None:
    with open_artifact(bundle, bundle.artifact("openvino"), threads=1) as session:
        assert (session.target, session.effective_precision) == ("openvino", "fp32")


def test_a_backend_is_told_the_precision_of_the_artifact(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it computes in is for it to say."""
    told: list[str] = []
    real = onnxruntime.load

    def load(files: Mapping[str, Path], spec: StepSpec, device: str, threads: int | None, precision: str) -> Runtime:
        told.append(precision)
        return real(files, spec, device, threads, precision)

    monkeypatch.setattr(onnxruntime, "load", load)
    for precision in ("fp32", "int8"):
        with open_artifact(bundle, replace(bundle.artifact("onnxruntime"), precision=precision)) as session:
            assert session.effective_precision == "fp32"
    assert told == ["fp32", "int8"]


@pytest.mark.parametrize("closes", [True, False])
def test_a_runtime_whose_session_cannot_start_is_closed(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, closes: bool
) -> None:
    closed: list[bool] = []

    class Broken(FakeRuntime):
        def load_state(self, arrays: Mapping[str, Array]) -> State:
            raise RunError("out of memory")

        def close(self) -> None:
            closed.append(True)
            if not closes:
                raise RunError("cannot be freed either")

    def load(files: Mapping[str, Path], spec: StepSpec, *_: object) -> Runtime:
        return Broken(spec)

    monkeypatch.setattr(onnxruntime, "load", load)
    with pytest.raises(RunError, match="out of memory"):
        open_bundle(bundle, "onnxruntime")
    assert closed == [True]


def test_two_sessions_of_one_bundle_are_two_streams(bundle: Bundle, target: str) -> None:
    tokens = np.arange(16).reshape(2, 8)
    with open_bundle(bundle, target) as one, open_bundle(bundle, target) as other:
        one.step(tokens, [3, 3])
        assert_same(other.read_state(), bundle.state_init())
        other.step(tokens)
        assert (one.offsets.tolist(), other.offsets.tolist()) == ([3, 3], [0, 0])
        with pytest.raises(StreamError, match="inside a chunk"):
            one.step(tokens)
