"""Low precision: linear ops kept in fp32, the speed against fp32, and nothing left behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest

from nsm.bundle import PARITY, Bundle
from nsm.errors import ParityError, SlowerError, UnsupportedError
from nsm.export.options import ExportOptions
from nsm.export.pipeline import export
from nsm.export.verify import acceptance
from nsm.export.verify.acceptance import Alone, Limits, Maker, Over
from nsm.export.verify.another_target import add_target
from nsm.export.verify.artifact import Acceptance, TargetPlan, check_artifact
from nsm.manifest import Artifact
from nsm.quantization.policy import find_policy
from nsm.results import Ratio
from nsm.runtimes.backends import onnxruntime
from nsm.runtimes.bench.rounds import Latency, Steppable
from nsm.runtimes.opening import cpu_features
from nsm.runtimes.parity.budgets import find_budget
from nsm.runtimes.parity.report import ParityReport
from nsm.runtimes.targets import find_target
from nsm.trace import Array, Trace
from tests.export.helpers import ROUGH, invoke, names, quantization_of, refused, succeeded, the_json

Times = Callable[..., None]
OTHERS = ["layers.0.projection/MatMul", "layers.0.feed_forward.0/MatMul"]
pytestmark = pytest.mark.usefixtures("few_steps")


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    """Let fp32 and low precision take so many microseconds, and a single token in each round so many."""

    def with_times(before: float, after: float, decode: tuple[float, float] = (3.0, 3.0)) -> None:
        def fake(sessions: Sequence[Steppable], steps: int, tokens: Array) -> list[Latency]:
            assert (len(sessions), steps) == (2, 10)
            assert tokens.shape[1:] == (2, 8)
            found = [Latency(t, t, t, t, 1.0, (t, t, 2 * t)) for t in (before, after)]
            singles = [(3.0, 3.0, 3.0), (*decode, decode[-1])]
            return [
                replace(latency, decode=replace(latency, rounds_us=rounds))
                for latency, rounds in zip(found, singles, strict=True)
            ]

        monkeypatch.setattr(acceptance, "bench", fake)

    return with_times


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[Artifact]:
    """The artifacts that were compared."""
    seen: list[Artifact] = []

    def counted(bundle: Bundle, artifact: Artifact, *more: Any) -> Acceptance:
        seen.append(artifact)
        return check_artifact(bundle, artifact, *more)

    monkeypatch.setattr(acceptance, "check_artifact", counted)
    return seen


def operators(path: Path, linear_op: str) -> set[str]:
    """Types of the nodes that a linear op of a graph has become."""
    graph = onnx.load(str(path), load_external_data=False).graph
    return {node.op_type for node in graph.node if node.name.startswith(linear_op)}


# -- linear ops kept in fp32 -----------------------------------------------------------------------------------------


def test_the_product_that_cannot_be_rounded_is_put_back_and_no_other(rough_copy: Path) -> None:
    artifact = add_target(rough_copy, "ort", precision="int8", limits=Limits(0.4, allow_slower=True))
    assert artifact.parity.status == "passed"
    facts = quantization_of(artifact)
    assert sorted(facts.quantized) == sorted(OTHERS)
    assert facts.kept_in_fp32[ROUGH].startswith("alone it causes a one-step error of ")
    assert not [name for name in OTHERS if name in facts.kept_in_fp32]
    for entry in ("step", "decode"):
        graph = rough_copy / "onnxruntime-int8" / f"{entry}.onnx"
        assert "MatMulInteger" not in operators(graph, ROUGH)
        assert all("MatMulInteger" in operators(graph, name) for name in OTHERS)
    bundle = Bundle(rough_copy)
    bundle.verify()
    assert bundle.artifact("onnxruntime", "int8") == artifact
    assert bundle.artifact("onnxruntime").precision == "fp32", "it stays beside"


@pytest.mark.parametrize("share", [0.25, 0.0])
def test_no_more_is_put_back_than_is_allowed_and_the_culprit_is_named(
    rough_copy: Path, checks: list[Artifact], share: float
) -> None:
    """It is more than a quarter of the weights."""
    before = (rough_copy / "manifest.json").read_bytes()
    with pytest.raises(ParityError, match=r"Parity failed on onnxruntime int8: .* the budget"):
        add_target(rough_copy, "ort", precision="int8", limits=Limits(share))
    assert len(checks) == 4, "once as a whole, and each of the three alone"
    assert (rough_copy / "manifest.json").read_bytes() == before
    failed = Bundle(rough_copy.with_name("rough.nsm.failed"))
    failed.verify()
    artifact = failed.artifact("onnxruntime", "int8")
    assert artifact.parity.status == "failed"
    (note,) = (note for note in artifact.notes if " comes from " in note)
    assert re.match(rf"most of the (one-step|free-run) error of \S+ comes from {ROUGH} \(", note)
    assert sorted(quantization_of(artifact).quantized) == sorted([ROUGH, *OTHERS])
    assert all(
        "MatMulInteger" in operators(failed.path / "onnxruntime-int8" / "step.onnx", name) for name in (ROUGH, *OTHERS)
    )
    assert not [name for name in names(failed.path) if name.startswith(".")]
    assert json.loads((failed.path / PARITY).read_text())["passed"] is False


def test_the_command_line_passes_the_share_on(rough_copy: Path) -> None:
    build = ("build", rough_copy, "-t", "ort", "-p", "int8", "--allow-slower")
    refused(
        invoke(*build, "--max-fp32-share", "0.25"),
        5,
        "Parity failed on onnxruntime int8",
        f" comes from {ROUGH} (",
    )
    text = succeeded(invoke(*build))
    artifact = Bundle(rough_copy).artifact("onnxruntime", "int8")
    assert ROUGH in quantization_of(artifact).kept_in_fp32
    assert f"  kept in fp32, because {quantization_of(artifact).kept_in_fp32[ROUGH]}: " in text
    assert "onnxruntime int8: step " in text


def budgeted(**errors: dict[str, float]) -> ParityReport:
    """As much of a report as says what is over the budget of int8."""
    found = {name: {"one_step_p99": 0.0, "free_run_p99": 0.0, **values} for name, values in errors.items()}
    budget = find_budget("int8")
    limits = {
        kind: {
            name: budget.one_step_p99 if kind == "one_step" else budget.free_run_p99
            for name, values in found.items()
            if f"{kind}_p99" in values
        }
        for kind in ("one_step", "free_run", "split")
    }
    return cast(ParityReport, SimpleNamespace(budget=budget, per_tensor=found, limits=limits))


def test_what_is_furthest_over_its_budget_is_what_products_are_ranked_by() -> None:
    limit = find_budget("int8")
    report = budgeted(
        outputs={"free_run_p99": 1.5 * limit.free_run_p99},
        value={"one_step_p99": 2 * limit.one_step_p99, "free_run_p99": limit.free_run_p99},
    )
    over = Over.of(report)
    assert over == Over("one_step", "value")
    assert str(over) == "one-step error of value"
    drifting = Alone(0.9, {"value": {"one_step_p99": 0.1}})
    guilty = Alone(0.1, {"value": {"one_step_p99": 0.4}})
    assert over.share(guilty) > over.share(drifting)
    assert over.share(Alone(0.1, {"value": {"one_step_p99": np.nan}})) == np.inf


def test_a_product_that_drifts_more_stays_low_where_another_is_at_fault(
    rough: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle(rough)
    policy = find_policy("onnxruntime", "int8")
    assert policy is not None
    maker = Maker(bundle, TargetPlan(find_target("onnxruntime"), None, "int8", policy), None)
    assert maker.lowered is not None
    drifting, guilty, _ = keys = [linear_op.key for linear_op in maker.lowered.low]
    errors = dict(zip(keys, [0.1, 9.0, 0.0], strict=True))
    alone = {key: Alone(float(key == drifting), {"value": {"split_p99": error}}) for key, error in errors.items()}
    tried: list[list[str]] = []

    def checked(*_: object) -> Acceptance:
        passed = guilty in tried[-1]
        over = budgeted(value={"split_p99": 0.0 if passed else 9.0})
        report = SimpleNamespace(**vars(over), passed=passed, effective_precision="int8")
        return Acceptance(bundle.artifact("onnxruntime"), cast(ParityReport, report))

    def build(_: Maker, excluded: dict[str, str]) -> Artifact:
        tried.append(list(excluded))
        return bundle.artifact("onnxruntime")

    monkeypatch.setattr(Maker, "build", build)
    monkeypatch.setattr(Maker, "_alone", lambda *_: alone)
    monkeypatch.setattr(acceptance, "check_artifact", checked)
    maker.within_budget(bundle.trace(), Limits(1.0), None)
    assert tried == [[], [guilty]]


def test_where_no_error_is_over_budget_products_are_ranked_by_drift() -> None:
    over = Over.of(budgeted(outputs={}, value={}))
    assert str(over) == "drift"
    assert over.share(Alone(0.2, {})) == 0.2
    assert over.share(Alone(np.nan, {})) == np.inf


# -- what float does not mend ----------------------------------------------------------------------------------------


def test_a_backend_that_computes_in_another_precision_fails_without_a_search(
    rough_copy: Path, checks: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "_OPERATORS", {})
    with pytest.raises(ParityError, match="the backend computes in fp32 instead of int8"):
        add_target(rough_copy, "ort", precision="int8", limits=Limits(1.0))
    assert len(checks) == 1


def test_a_model_without_large_matrices_is_unsupported(
    checkpoint: Path, bundle_copy: Path, tmp_path: Path, ready_graph: Callable[[float], None]
) -> None:
    before = sorted(names(tmp_path))
    message = r"large enough to gain from low precision\. Keep fp32"
    with pytest.raises(UnsupportedError, match=message):
        add_target(bundle_copy, "ort", precision="int8")
    options = ExportOptions(
        ["openvino"], precision="int8", output=tmp_path / "m.nsm", batch=2, num_samples=1, golden_steps=2
    )
    with pytest.raises(UnsupportedError, match=message):
        export(checkpoint, options)
    assert names(tmp_path) == before


def test_what_cannot_run_here_is_neither_ranked_nor_measured(
    rough_copy: Path, checks: list[Artifact], no_gpu: None
) -> None:
    artifact = add_target(rough_copy, "trt", "sm86", precision="int8-weights")
    assert artifact.parity.status == "not_run"
    assert len(checks) == 1
    assert (quantization_of(artifact).speed, quantization_of(artifact).calibration) == ({}, None)
    assert set(quantization_of(artifact).quantized) == {ROUGH, *OTHERS}


# -- speed -----------------------------------------------------------------------------------------------------------


def test_what_is_slower_than_fp32_is_refused_and_leaves_nothing(int8_copy: Path, tmp_path: Path, times: Times) -> None:
    times(100.0, 125.0)
    before = (int8_copy / "manifest.json").read_bytes()
    message = (
        r"onnxruntime in int8 is not faster than in fp32 on this machine: step 0\.80x as fast \[0\.80, 0\.80\]\."
        r" Use fp32.*--allow"
    )
    with pytest.raises(SlowerError, match=message):
        add_target(int8_copy, "ort", precision="int8", force=True)
    assert (int8_copy / "manifest.json").read_bytes() == before
    Bundle(int8_copy).verify()
    assert names(tmp_path) == ["int8.nsm"]
    refused(
        invoke("build", int8_copy, "-t", "ort", "-p", "int8", "--force", "--json"),
        7,
        "not faster than in fp32 on this machine",
    )
    assert names(tmp_path) == ["int8.nsm"]


def test_an_export_that_is_slower_ends_with_7_and_leaves_nothing(
    wide: Path, tmp_path: Path, times: Times, ready_wide: None
) -> None:
    times(100.0, 101.0)
    sizes = ("--batch", "2", "--num-samples", "1", "--golden-steps", "4")
    arguments = ("export", wide, "-t", "ort", "-p", "int8", *sizes, "-o", tmp_path / "m.nsm")
    refused(invoke(*arguments), 7, "step 0.99x as fast")
    said = invoke(*arguments, "--json")
    refused(said, 7, "step 0.99x as fast")
    found = the_json(said)
    assert (found["bundle"], found["kept_as"], len(found["artifacts"])) == (None, None, 1)
    assert found["artifacts"][0]["quantization"]["speed"]["step"]["median"] == pytest.approx(100 / 101)
    assert names(tmp_path) == []
    (artifact,) = the_json(invoke(*arguments, "--allow-slower", "--json"))["artifacts"]
    assert artifact["quantization"]["speed"]["step"]["median"] == pytest.approx(100 / 101)


def test_slower_is_kept_where_that_is_allowed(int8_copy: Path, times: Times) -> None:
    times(100.0, 400.0)
    text = succeeded(invoke("build", int8_copy, "-t", "ort", "-p", "int8", "--allow-slower", "--force"))
    assert "Replaced in" in text
    speed = quantization_of(Bundle(int8_copy).artifact("onnxruntime")).speed
    assert speed == {"step": Ratio(0.25, 0.25, 0.25), "decode": Ratio(1.0, 1.0, 1.0)}


def test_single_tokens_that_are_slower_are_refused_although_whole_calls_are_faster(
    int8_copy: Path, times: Times
) -> None:
    times(200.0, 100.0, (6.0, 6.0))
    message = r"not faster than in fp32 on this machine: decode 0\.50x as fast \[0\.50, 0\.50\]\. Use"
    with pytest.raises(SlowerError, match=message):
        add_target(int8_copy, "ort", precision="int8", force=True)
    times(100.0, 125.0, (6.0, 6.0))
    with pytest.raises(SlowerError, match=r"step 0\.80x as fast .*, decode 0\.50x as fast"):
        add_target(int8_copy, "ort", precision="int8", force=True)
    times(200.0, 100.0, (2.9, 3.5))  # its interval holds 1: no difference was found
    artifact = add_target(int8_copy, "ort", precision="int8", force=True)
    assert quantization_of(artifact).speed["decode"].median < 1.0


@pytest.mark.parametrize("flags", ["flags : avx2 avx512f", "flags : avx2 avx_vnni"])
def test_a_processor_without_a_fast_path_is_named_as_the_cause(
    int8_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: Times, flags: str
) -> None:
    (tmp_path / "cpuinfo").write_text(flags)
    monkeypatch.setattr(cpu_features, "_CPUINFO", tmp_path / "cpuinfo")
    times(100.0, 125.0)
    with pytest.raises(SlowerError) as caught:
        add_target(int8_copy, "ort", precision="int8", force=True)
    assert ("The likely cause: this processor has neither VNNI" in str(caught.value)) == ("vnni" not in flags)
    with pytest.raises(SlowerError) as caught:
        add_target(int8_copy, "ort", precision="int8-weights", limits=Limits(1.0))
    assert "processor" not in str(caught.value), "its linear ops are not of int8"


def test_faster_needs_no_leave(int8_copy: Path, times: Times) -> None:
    times(200.0, 100.0)
    artifact = add_target(int8_copy, "ort", precision="int8", force=True)
    assert quantization_of(artifact).speed["step"].median == 2.0


def test_the_speed_is_of_real_tokens_on_every_lane() -> None:
    tokens = np.arange(3 * 5 * 8).reshape(3, 5, 8)
    empty = np.empty(0, np.int64)
    trace = Trace({"tokens": tokens}, {}, empty, empty, {}, {}, "", "recorded")
    calls = acceptance._calls(trace, 4)
    assert calls.shape == (5, 4, 8)
    for lane, stream in enumerate([0, 1, 2, 0]):
        np.testing.assert_array_equal(calls[:, lane], tokens[stream])


@pytest.mark.parametrize("place", ["bench", "check_artifact", "build_target"])
def test_a_crash_leaves_nothing_behind(
    int8_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def crash(*_args: Any, **_options: Any) -> None:
        raise RuntimeError("a crash in the middle")

    monkeypatch.setattr(acceptance, place, crash)
    with pytest.raises(RuntimeError, match="a crash"):
        add_target(int8_copy, "ov", precision="int8", force=True)
    assert names(tmp_path) == ["int8.nsm"]
    Bundle(int8_copy).verify()
