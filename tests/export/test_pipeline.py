from __future__ import annotations

import errno
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nsm
from nsm.bundle import PARITY, Bundle
from nsm.errors import BuildError, CheckpointError, InputError, OutputExistsError, ParityError, UnsupportedError
from nsm.export import pipeline
from nsm.export.options import ExportOptions
from nsm.export.pipeline import export, plan, versions
from nsm.export.sources import torch as torch_source
from nsm.export.verify import acceptance
from nsm.export.verify.another_target import add_target
from nsm.export.verify.artifact import build_target
from nsm.manifest import Artifact
from nsm.models.checkpoint import load_checkpoint
from nsm.models.simple import SimpleNSM
from nsm.runtimes.base import Progress
from nsm.runtimes.targets import Target
from nsm.spec import StepSpec
from nsm.trace import Arrays
from tests.export import helpers
from tests.export.helpers import invoke, p99, scale_weights, the_json

Change = Callable[[Path], None]


@pytest.fixture
def bare(model: SimpleNSM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of the same model, without sequences."""
    path = tmp_path_factory.mktemp("bare") / "bare.pt"
    nsm.save(model, path)
    return path


@pytest.fixture
def ready_graph(exported: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], None]:
    """Spare the ONNX exporter: two lanes of the model get the graph that was exported before. Call it with a function
    that changes the folder of graphs to get a wrong one."""

    def with_change(change: Change) -> None:
        def copied(_model: SimpleNSM, _spec: object, directory: Path, _opset: int) -> None:
            shutil.copytree(exported / "graphs", directory, dirs_exist_ok=True)
            change(directory)

        monkeypatch.setattr(torch_source, "export_onnx", copied)

    with_change(lambda _directory: None)
    return with_change


def short(output: Path, *targets: str, **changes: Any) -> ExportOptions:
    """Two lanes, two streams, three steps."""
    options = ExportOptions(targets=targets or ("onnxruntime",), output=output, batch=2, num_samples=2, golden_steps=3)
    return replace(options, **changes)


def perturb(directory: Path) -> None:
    """A thousandth on every weight."""
    scale_weights(directory / "weights.bin", 1.001)


def ruin(directory: Path) -> None:
    (directory / "step.onnx").write_bytes(b"rubbish")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# -- what comes out --------------------------------------------------------------------------------------------------


def test_one_bundle_holds_several_targets(exported: Path, bundle: Bundle, checkpoint: Path, model: SimpleNSM) -> None:
    manifest = bundle.manifest
    assert [item.target for item in manifest.artifacts] == ["onnx", "onnxruntime", "openvino", "tensorrt"]
    for name in ("onnx", "onnxruntime", "openvino"):
        parity = bundle.artifact(name).parity
        assert parity.status == "passed"
        assert (parity.source, parity.streams, parity.steps) == ("recorded", 8, 64)
        assert 0 < p99(parity.free_run) < 1e-5
        assert 0 < p99(parity.split) < 1e-5
    bundle.verify()
    assert set(names(exported)) == {
        "manifest.json",
        "graphs",
        "openvino",
        "tensorrt",
        "state_init.npz",
        "golden.npz",
        "parity.json",
    }
    assert bundle.artifact("onnx").files == bundle.artifact("onnxruntime").files
    assert manifest.spec == model.spec(2)
    assert manifest.model["class"] == "SimpleNSM"
    assert manifest.model["config"] == model.config
    assert manifest.model["parameters"] == sum(value.numel() for value in model.parameters())
    assert manifest.fingerprint == load_checkpoint(checkpoint).fingerprint
    assert {"python", "nsm", "torch", "onnx", "openvino"} <= set(manifest.versions)
    reports = json.loads((exported / PARITY).read_text())
    assert reports["passed"] is True
    compared = [item.target for item in manifest.artifacts if item.parity.status == "passed"]
    assert [item["target"] for item in reports["results"]] == compared
    assert {item["status"] for item in reports["results"]} == {"passed"}


def test_the_golden_trace_is_of_the_checkpoints_own_sequences(bundle: Bundle, checkpoint: Path) -> None:
    golden = load_checkpoint(checkpoint).golden
    tokens = bundle.trace().inputs["tokens"].reshape(8, -1)
    np.testing.assert_array_equal(tokens, np.stack(golden)[:, : tokens.shape[1]])


def test_no_path_of_this_machine_is_in_the_bundle(exported: Path) -> None:
    readable = [path for path in exported.rglob("*") if path.suffix in (".json", ".onnx", ".xml")]
    assert len(readable) >= 5
    for path in readable:
        for trace in (str(Path.cwd()), str(exported.parent), "site-packages", ".partial"):
            assert trace.encode() not in path.read_bytes(), (path.name, trace)


def test_without_sequences_the_trace_is_synthetic_and_says_so(
    bare: Path, tmp_path: Path, ready_graph: Callable[[Change], None]
) -> None:
    bundle = export(bare, short(tmp_path / "m.nsm"))
    assert bundle.path == tmp_path / "m.nsm"
    assert bundle.trace().source == "synthetic"
    assert bundle.trace().inputs["tokens"].shape == (2, 3, 8)
    assert bundle.artifact("onnxruntime").parity.source == "synthetic"
    (report,) = json.loads((bundle.path / PARITY).read_text())["results"]
    assert report["source"] == "synthetic"
    assert names(tmp_path) == ["m.nsm"]


def test_a_file_of_data_takes_the_place_of_the_checkpoints_sequences(
    checkpoint: Path, tmp_path: Path, ready_graph: Callable[[Change], None]
) -> None:
    ids = np.random.default_rng(3).integers(0, 20, (5, 24))
    np.save(tmp_path / "ids.npy", ids)
    bundle = export(checkpoint, short(tmp_path / "m.nsm", data=tmp_path / "ids.npy"))
    trace = bundle.trace()
    assert trace.source == "recorded"
    np.testing.assert_array_equal(trace.inputs["tokens"].reshape(2, -1), ids[:2])


def test_the_same_target_twice_is_built_once(
    checkpoint: Path, tmp_path: Path, ready_graph: Callable[[Change], None]
) -> None:
    bundle = export(checkpoint, short(tmp_path / "m.nsm", "ort", "onnxruntime", "ORT"))
    assert [item.target for item in bundle.manifest.artifacts] == ["onnxruntime"]


def test_the_name_of_the_model_is_the_default_for_the_bundle(checkpoint: Path) -> None:
    assert plan(checkpoint, ExportOptions(targets=["onnx"])).output == Path("model.nsm")


def test_every_stage_is_shown_and_runs_up_to_its_total(
    checkpoint: Path, tmp_path: Path, ready_graph: Callable[[Change], None]
) -> None:
    seen: dict[str, tuple[int, int]] = {}

    class Recorder:
        @contextmanager
        def stage(self, name: str) -> Iterator[Progress]:
            seen[name] = (0, 0)

            def step(done: int, total: int) -> None:
                seen[name] = (done, total)

            yield step

    export(checkpoint, short(tmp_path / "m.nsm"), Recorder())
    assert list(seen) == ["Recording the reference", "Exporting ONNX", "Building onnxruntime"]
    for name in ("Recording the reference", "Building onnxruntime"):
        assert seen[name][0] == seen[name][1] > 0


def test_versions_leave_out_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_PACKAGES", ("numpy", "a-package-that-nobody-has"))
    assert versions() == {"python": platform.python_version(), "nsm": nsm.__version__, "numpy": np.__version__}


# -- what is refused before any work ---------------------------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if the reference is run or the graph exported."""

    def worked(*_args: Any, **_options: Any) -> None:
        raise AssertionError("work was done before the request was refused")

    monkeypatch.setattr(pipeline, "record", worked)
    monkeypatch.setattr(torch_source, "export_onnx", worked)


@pytest.mark.parametrize("changes", [{"batch": 0}, {"num_samples": 0}, {"golden_steps": 0}, {"batch": -2}])
def test_counts_below_one_are_refused(checkpoint: Path, tmp_path: Path, changes: dict[str, Any], no_work: None) -> None:
    with pytest.raises(InputError, match="--batch, --num-samples and --golden-steps must be at least 1"):
        export(checkpoint, short(tmp_path / "m.nsm", **changes))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"targets": ()}, InputError, "No target was given"),
        ({"targets": ("onnx", "coreml")}, InputError, r"no target 'coreml'. Targets: onnx, onnxruntime \(ort\)"),
        ({"precision": "fp8"}, InputError, "Unknown precision 'fp8'"),
        ({"targets": ("onnx",), "precision": "int8"}, UnsupportedError, r"not built in int8\. It is built in: fp32\."),
        ({"precision": "fp16"}, UnsupportedError, "It is built in: fp32, int8, int8-weights"),
        ({"max_fp32_share": 1.1}, InputError, r"--max-fp32-share must be in 0 \.\. 1; given 1\.1"),
        ({"max_fp32_share": float("nan")}, InputError, r"--max-fp32-share must be in 0 \.\. 1; given nan"),
        ({"device": "sm1"}, InputError, "has the device 'sm1'"),
        ({"tokens_per_call": 12}, InputError, "multiple of the model's chunk of 8 tokens; given 12. Take 16"),
        ({"tokens_per_call": 3}, InputError, "given 3. Take 8"),
        ({"data": Path("absent.npy")}, InputError, r"absent\.npy cannot be read as sequences"),
        ({"data": Path("ids.csv")}, InputError, r"read from \.npy, \.npz and \.txt files; given \.csv"),
    ],
)
def test_a_wrong_request_is_refused(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str, no_work: None
) -> None:
    with pytest.raises(error, match=message):
        export(checkpoint, short(tmp_path / "m.nsm", **changes))
    assert names(tmp_path) == []


def test_data_that_the_model_does_not_take_is_refused_by_the_plan(checkpoint: Path, tmp_path: Path) -> None:
    """So that --dry-run, which says it checks the data, does."""
    np.save(tmp_path / "vectors.npy", np.zeros((2, 40, 3), np.float32))
    with pytest.raises(InputError, match="The model takes"):
        plan(checkpoint, short(tmp_path / "m.nsm", data=tmp_path / "vectors.npy"))


def test_ids_outside_the_vocabulary_are_refused_by_the_plan(checkpoint: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.full((2, 40), 20))
    with pytest.raises(InputError, match=r"0 \.\. 19"):
        plan(checkpoint, short(tmp_path / "m.nsm", data=tmp_path / "ids.npy"))


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no file"):
        plan(tmp_path / "absent.pt", short(tmp_path / "m.nsm"))


def test_an_existing_output_is_refused_before_any_work(
    checkpoint: Path, bundle_copy: Path, tmp_path: Path, no_work: None
) -> None:
    before = (bundle_copy / "manifest.json").read_bytes()
    with pytest.raises(OutputExistsError, match=r"copy\.nsm exists. Give --force"):
        export(checkpoint, short(bundle_copy))
    assert (bundle_copy / "manifest.json").read_bytes() == before
    assert names(tmp_path) == ["copy.nsm"]


def test_an_existing_output_is_refused_by_the_plan(checkpoint: Path, bundle_copy: Path) -> None:
    """So that --dry-run does not call a request good that will be refused."""
    with pytest.raises(OutputExistsError, match="exists"):
        plan(checkpoint, short(bundle_copy))


def test_force_does_not_replace_what_is_no_bundle(checkpoint: Path, tmp_path: Path, no_work: None) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match="is not a bundle, so it is not replaced"):
        export(checkpoint, short(tmp_path / "thesis", force=True))
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_force_replaces_a_bundle_when_the_new_one_is_complete(
    checkpoint: Path, bundle_copy: Path, tmp_path: Path, ready_graph: Callable[[Change], None]
) -> None:
    bundle = export(checkpoint, short(bundle_copy, force=True))
    bundle.verify()
    assert [item.target for item in bundle.manifest.artifacts] == ["onnxruntime"]
    assert not (bundle_copy / "tensorrt").exists()
    assert names(tmp_path) == ["copy.nsm"]


def test_an_output_that_cannot_be_written_is_refused(checkpoint: Path, tmp_path: Path, no_work: None) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"The output .* cannot be written"):
        export(checkpoint, short(tmp_path / "file" / "m.nsm"))


# -- failing halfway -------------------------------------------------------------------------------------------------


def test_an_artifact_that_is_not_the_model_is_kept_aside(
    checkpoint: Path, tmp_path: Path, ready_graph: Callable[[Change], None]
) -> None:
    ready_graph(perturb)
    with pytest.raises(
        ParityError, match=r"Parity failed on onnxruntime fp32: one-step error p99 of .* is .*, the budget"
    ):
        export(checkpoint, short(tmp_path / "m.nsm", "onnxruntime", "openvino"))
    assert names(tmp_path) == ["m.nsm.failed"]
    failed = Bundle(tmp_path / "m.nsm.failed")
    failed.verify()
    assert [item.parity.status for item in failed.manifest.artifacts] == ["failed", "failed"]
    report = json.loads((failed.path / PARITY).read_text())
    assert report["passed"] is False
    assert all(item["status"] == "failed" and item["failures"] for item in report["results"])
    assert all(item["first_divergence"]["step"] == 0 for item in report["results"])


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch, ready_graph: Callable[[Change], None]) -> None:
    """The artifact is wrong, not the graph: OpenVINO's weights are changed after they were built."""

    def build_spoilt(directory: Path, spec: StepSpec, target: Target, device: str | None) -> Artifact:
        artifact = build_target(directory, spec, target, device)
        if target.name == "openvino":
            scale_weights(directory / "openvino" / "weights.bin", 1.001)
        return artifact

    monkeypatch.setattr(acceptance, "build_target", build_spoilt)


def test_one_wrong_target_fails_the_bundle_where_all_are_asked_for(
    checkpoint: Path, tmp_path: Path, spoilt: None
) -> None:
    with pytest.raises(ParityError, match="Parity failed on openvino fp32"):
        export(checkpoint, short(tmp_path / "m.nsm", "onnxruntime", "openvino", strict=True))
    assert names(tmp_path) == ["m.nsm.failed"]
    failed = Bundle(tmp_path / "m.nsm.failed").manifest
    assert [item.parity.status for item in failed.artifacts] == ["passed", "failed"]


def test_the_targets_that_passed_are_kept_beside_one_that_is_wrong(
    checkpoint: Path, tmp_path: Path, spoilt: None
) -> None:
    path = tmp_path / "m.nsm"
    with pytest.raises(ParityError) as caught:
        export(checkpoint, short(path, "onnxruntime", "openvino", "onnx"))
    assert names(tmp_path) == ["m.nsm", "m.nsm.failed"]
    bundle, failed = Bundle(path), Bundle(tmp_path / "m.nsm.failed")
    bundle.verify()
    assert [item.target for item in bundle.manifest.artifacts] == ["onnxruntime", "onnx"]
    assert [(item.target, item.exit_code) for item in bundle.manifest.failed] == [("openvino", 5)]
    assert bundle.manifest.failed[0].reason.startswith("Parity failed on openvino fp32")
    assert not (path / "openvino").exists()
    report = json.loads((path / PARITY).read_text())
    assert report["passed"] is True
    assert [item["target"] for item in report["results"]] == ["onnxruntime", "onnx"]
    assert [item.parity.status for item in failed.manifest.artifacts] == ["passed", "failed", "passed"]
    assert json.loads((failed.path / PARITY).read_text())["passed"] is False
    message = str(caught.value)
    assert message.startswith("openvino: Parity failed on openvino fp32")
    assert f"kept in {tmp_path / 'm.nsm.failed'}" in message
    assert message.endswith(
        f"{path} was written with the targets that passed: onnxruntime, onnx. --strict writes all targets or none."
    )


@pytest.mark.parametrize("order", [("openvino", "onnxruntime"), ("onnxruntime", "openvino")])
def test_the_targets_that_passed_are_kept_beside_one_that_cannot_be_built(
    checkpoint: Path,
    tmp_path: Path,
    ready_graph: Callable[[Change], None],
    monkeypatch: pytest.MonkeyPatch,
    order: tuple[str, str],
) -> None:
    path = tmp_path / "m.nsm"

    def lacking(directory: Path, spec: StepSpec, target: Target, device: str | None) -> Artifact:
        if target.name == "openvino":
            (directory / "openvino").mkdir()
            (directory / "openvino" / "half.xml").touch()
            raise UnsupportedError("it has no such operator")
        return build_target(directory, spec, target, device)

    monkeypatch.setattr(acceptance, "build_target", lacking)
    with pytest.raises(
        UnsupportedError, match=r"^openvino: it has no such operator .*m\.nsm was written with .*: onnxr"
    ):
        export(checkpoint, short(path, *order))
    assert names(tmp_path) == ["m.nsm"]
    bundle = Bundle(path)
    bundle.verify()
    assert [item.target for item in bundle.manifest.artifacts] == ["onnxruntime"]
    (failed,) = bundle.manifest.failed
    assert (failed.target, failed.reason, failed.exit_code) == ("openvino", "it has no such operator", 3)
    assert not (path / "openvino").exists()
    result = invoke("inspect", path)
    assert "openvino: not in the bundle. it has no such operator" in result.stdout
    with pytest.raises(UnsupportedError, match=r"^it has no such operator$"):
        export(checkpoint, short(tmp_path / "strict.nsm", *order, strict=True))
    assert names(tmp_path) == ["m.nsm"]
    monkeypatch.undo()
    add_target(path, "openvino")
    assert Bundle(path).manifest.failed == ()


def test_several_that_failed_are_all_named_and_the_first_is_raised(
    checkpoint: Path, tmp_path: Path, ready_graph: Callable[[Change], None], monkeypatch: pytest.MonkeyPatch
) -> None:

    def failing(directory: Path, spec: StepSpec, target: Target, device: str | None) -> Artifact:
        if target.name == "openvino":
            raise UnsupportedError("no operator")
        if target.name == "mobile":
            raise BuildError("no file")
        return build_target(directory, spec, target, device)

    monkeypatch.setattr(acceptance, "build_target", failing)
    message = r"^openvino: no operator mobile failed too: no file .*: onnxruntime\."
    with pytest.raises(UnsupportedError, match=message):
        export(checkpoint, short(tmp_path / "m.nsm", "openvino", "onnxruntime", "mobile"))
    assert [item.target for item in Bundle(tmp_path / "m.nsm").manifest.failed] == ["openvino", "mobile"]
    with pytest.raises(UnsupportedError, match=r"^no operator$"):
        export(checkpoint, short(tmp_path / "none.nsm", "openvino", "mobile"))
    assert names(tmp_path) == ["m.nsm"]


def test_the_command_says_what_is_kept_and_ends_with_the_code_of_what_failed(
    checkpoint: Path, tmp_path: Path, spoilt: None
) -> None:
    arguments = helpers.short(checkpoint, tmp_path / "m.nsm", "-t", "onnxruntime", "-t", "openvino")
    result = invoke(*arguments, "--json")
    assert result.exit_code == 5
    data = the_json(result)
    assert data["bundle"] == str(tmp_path / "m.nsm")
    assert [item["target"] for item in data["artifacts"]] == ["onnxruntime"]
    assert [(item["target"], item["exit_code"]) for item in data["failed"]] == [("openvino", 5)]
    assert "was written with the targets that passed: onnxruntime" in result.stderr
    strict = invoke(*arguments, "--strict", "--force", "--json")
    assert strict.exit_code == 5
    assert the_json(strict)["bundle"] is None
    shown = invoke(*arguments, "--force")
    assert shown.exit_code == 5
    assert f"Wrote {tmp_path / 'm.nsm'}" in shown.stdout


def test_a_failure_replaces_an_earlier_one_and_leaves_the_good_bundle(
    checkpoint: Path, bundle_copy: Path, tmp_path: Path, ready_graph: Callable[[Change], None]
) -> None:
    before = (bundle_copy / "manifest.json").read_bytes()
    ready_graph(perturb)
    for steps in (2, 3):
        with pytest.raises(ParityError):
            export(checkpoint, short(bundle_copy, force=True, golden_steps=steps))
    assert names(tmp_path) == ["copy.nsm", "copy.nsm.failed"]
    assert (bundle_copy / "manifest.json").read_bytes() == before
    Bundle(bundle_copy).verify()
    assert Bundle(tmp_path / "copy.nsm.failed").trace().steps == 3


def _crash(*_args: Any, **_options: Any) -> None:
    raise RuntimeError("a crash in the middle")


def _full(*_args: Any, **_options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _interrupt(*_args: Any, **_options: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "place",
    [
        "pipeline.record",
        "verify.acceptance.build_target",
        "verify.keeping.write_parity",
        "pipeline.write_manifest",
        "pipeline.np.savez",
        "verify.keeping.Outcome.of",
    ],
)
@pytest.mark.parametrize(("fail", "error"), [(_crash, RuntimeError), (_full, OSError), (_interrupt, KeyboardInterrupt)])
def test_what_breaks_in_the_middle_leaves_nothing(
    checkpoint: Path,
    tmp_path: Path,
    ready_graph: Callable[[Change], None],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    fail: Callable[..., None],
    error: type[BaseException],
) -> None:
    monkeypatch.setattr(f"nsm.export.{place}", fail)
    with pytest.raises(error):
        export(checkpoint, short(tmp_path / "m.nsm", num_samples=1, golden_steps=1))
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_leaves_the_earlier_bundle(
    checkpoint: Path, bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is stubbed but the write itself."""
    monkeypatch.setattr(np, "savez", _full)
    with pytest.raises(OSError, match="No space left"):
        export(checkpoint, short(bundle_copy, force=True))
    assert names(tmp_path) == ["copy.nsm"]
    Bundle(bundle_copy).verify()


def test_a_graph_that_tensorrt_cannot_parse_leaves_its_log_alone(
    checkpoint: Path, tmp_path: Path, ready_graph: Callable[[Change], None]
) -> None:
    ready_graph(ruin)
    with pytest.raises(BuildError, match=r"TensorRT cannot parse step\.onnx") as caught:
        export(checkpoint, short(tmp_path / "m.nsm", "tensorrt"))
    assert caught.value.log is not None
    assert str(caught.value.log) in str(caught.value)
    assert [tmp_path / name for name in names(tmp_path)] == [caught.value.log]


def test_tensorrt_without_a_gpu_is_marked_not_run(
    checkpoint: Path, tmp_path: Path, ready_graph: Callable[[Change], None], no_gpu: None
) -> None:
    bundle = export(checkpoint, short(tmp_path / "m.nsm", "onnxruntime", "tensorrt", device="sm86"))
    assert bundle.artifact("onnxruntime").parity.status == "passed"
    artifact = bundle.artifact("tensorrt")
    assert (artifact.device, artifact.parity.status) == ("sm86", "not_run")
    assert "no usable NVIDIA GPU in this machine" in str(artifact.parity.reason)


def test_required_parity_without_a_gpu_fails_and_keeps_the_bundle_aside(
    checkpoint: Path, tmp_path: Path, ready_graph: Callable[[Change], None], no_gpu: None
) -> None:
    with pytest.raises(
        ParityError, match=r"--require-parity: tensorrt could not be compared\. There is no usable NVIDIA"
    ):
        export(checkpoint, short(tmp_path / "m.nsm", "onnxruntime", "tensorrt", require_parity=True))
    assert names(tmp_path) == ["m.nsm", "m.nsm.failed"]
    assert [item.target for item in Bundle(tmp_path / "m.nsm").manifest.artifacts] == ["onnxruntime"]
    failed = Bundle(tmp_path / "m.nsm.failed")
    for bundle in (failed, Bundle(tmp_path / "m.nsm")):
        bundle.verify()
    assert failed.artifact("tensorrt").parity.status == "not_run"


# -- another form of model, for real ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stream_of_vectors_with_two_chunks_a_call(model_factory: Callable[..., SimpleNSM], tmp_path: Path) -> None:
    """The whole path once more: vectors, an LSTM gate, consolidation now and then, a larger chunk, a newer opset."""
    model = model_factory(
        vocab_size=None, input_dim=3, gate_type="lstm", consolidate_every=2, communication=True, num_layers=1
    )
    vectors = np.random.default_rng(0).standard_normal((3, 70, 3)).astype(np.float32)
    nsm.save(model, tmp_path / "vectors.pt", samples=list(vectors))
    options = ExportOptions(
        targets=["ov", "ort"],
        output=tmp_path / "deep" / "v.nsm",
        tokens_per_call=16,
        opset=21,
        golden_steps=4,
        force=True,
    )
    bundle = export(tmp_path / "vectors.pt", options)
    assert [item.parity.status for item in bundle.manifest.artifacts] == ["passed", "passed"]
    assert bundle.manifest.spec.entry("step").inputs[0].shape == (1, 16, 3)
    with torch.no_grad():
        wanted = model(torch.from_numpy(vectors[:1]))[0].numpy()
    given: list[Arrays] = []
    for target in ("openvino", "onnxruntime"):
        with nsm.open(bundle.path, target=target) as session:
            given.append(session.run(vectors[0]))
    for outputs in given:
        np.testing.assert_allclose(outputs["outputs"], wanted, rtol=1e-4, atol=1e-5)
