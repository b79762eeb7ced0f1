"""Low precision through and through: the artifacts are smaller, are what they say, and their streams are streams."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import nsm
from nsm.bundle import CALIBRATION, Bundle
from nsm.errors import BundleDamagedError, NonFiniteError
from nsm.export.graphs.external_data import load_shared
from nsm.export.graphs.low_precision import Lowered, linear_ops_of_step, write_graphs
from nsm.export.options import ExportOptions
from nsm.export.pipeline import export
from nsm.export.verify.artifact import check_artifact
from nsm.quantization.calibration_data import read_calibration
from nsm.quantization.policy import SMALLEST, find_policy
from nsm.runtimes.opening.artifacts import open_bundle
from nsm.runtimes.parity.budgets import find_budget
from nsm.runtimes.parity.metrics import relative_error
from nsm.runtimes.session.session import Session
from nsm.staging import write_manifest
from nsm.trace import Array
from tests.export.helpers import names, needs_bf16, needs_fp16, p99, quantization_of
from tests.runtimes.fake import assert_same
from tests.small_models import CHUNK, make_model, make_sequences

ON_CPU = [
    ("openvino", "int8"),
    ("openvino", "int8-weights"),
    pytest.param("openvino", "fp16", marks=needs_fp16),
    pytest.param("openvino", "bf16", marks=needs_bf16),
    ("onnxruntime", "int8"),
    ("onnxruntime", "int8-weights"),
]
HALF = [pytest.param("fp16", marks=needs_fp16), pytest.param("bf16", marks=needs_bf16)]
SCHEMES = {
    ("openvino", "int8"): "static",
    ("openvino", "int8-weights"): "weight-only",
    ("openvino", "fp16"): "backend",
    ("openvino", "bf16"): "backend",
    ("onnxruntime", "int8"): "dynamic",
    ("onnxruntime", "int8-weights"): "block-wise",
    ("tensorrt", "int8"): "static",
    ("tensorrt", "int8-weights"): "weight-only",
    ("tensorrt", "fp16"): "fp16",
    ("tensorrt", "bf16"): "bf16",
}
ROUTER = "layers.0.router.product/MatMul"
LARGE = {"layers.0.projection/MatMul", "layers.0.feed_forward.0/MatMul", "layers.0.feed_forward.2/MatMul"}
Built = Callable[[str, str], Bundle]


def error(given: Array, wanted: Array) -> float:
    """Largest relative error of a token's outputs."""
    scale = 0.01 * float(np.sqrt(np.mean(np.square(wanted))))
    pairs = zip(given.reshape(-1, given.shape[-1]), wanted.reshape(-1, wanted.shape[-1]), strict=True)
    return max(relative_error(one, other, scale) for one, other in pairs)


def tokens(calls: int, seed: int = 5) -> Array:
    """Ids of two lanes, [2, T]."""
    return make_sequences(2, calls * CHUNK, seed)


def stepped(session: Session, ids: Array) -> Array:
    """Outputs of whole chunks, [2, T, 5]."""
    starts = range(0, ids.shape[1], CHUNK)
    return np.concatenate([session.step(ids[:, start : start + CHUNK])["outputs"] for start in starts], 1)


# -- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "precision"), ON_CPU)
def test_an_artifact_is_what_it_says_and_within_its_budget(built: Built, target: str, precision: str) -> None:
    bundle = built(target, precision)
    bundle.verify()
    artifact = bundle.artifact(target, precision)
    assert (artifact.precision, artifact.effective_precision) == (precision, precision)
    assert artifact.parity.status == "passed"
    budget, exact = find_budget(precision), find_budget("fp32")
    assert exact.free_run_p99 < p99(artifact.parity.free_run) <= budget.free_run_p99
    assert exact.one_step_p99 < p99(artifact.parity.one_step) <= budget.one_step_p99
    with open_bundle(bundle, target, precision=precision) as session:
        assert session.effective_precision == precision
    results = json.loads((bundle.path / "parity.json").read_text())["results"]
    (report,) = (item for item in results if (item["target"], item["precision"]) == (target, precision))
    assert report["effective_precision"] == precision
    for path in bundle.path.glob("*/*.onnx"):
        model = onnx.load(str(path), load_external_data=False)
        opset = next(item.version for item in model.opset_import if not item.domain)
        assert model.ir_version == {20: 9, 21: 10}[opset], path


@pytest.mark.parametrize(("target", "precision"), ON_CPU)
def test_the_manifest_says_what_became_of_the_products(built: Built, target: str, precision: str) -> None:
    facts = quantization_of(built(target, precision).artifact(target, precision))
    assert facts.scheme == SCHEMES[target, precision]
    assert set(facts.speed) == {"step", "decode"}
    for ratio in facts.speed.values():
        assert 0 < ratio.low <= ratio.median <= ratio.high
    if SCHEMES[target, precision] == "backend":
        assert facts.kept_in_fp32 == {}
        return
    assert facts.kept_in_fp32[ROUTER] == "router layer: always fp32"
    assert facts.kept_in_fp32["head.1/MatMul"] == "its 64 x 5 numbers are too few to gain"
    assert facts.quantized
    assert set(facts.quantized) <= LARGE
    excluded = LARGE - set(facts.quantized)
    assert all("alone it causes a " in facts.kept_in_fp32[name] for name in excluded)
    assert (facts.calibration is not None) == (facts.scheme == "static")


def test_the_summary_of_the_calibration_is_that_of_the_file(int8_bundle: Path) -> None:
    found = quantization_of(Bundle(int8_bundle).artifact("openvino")).calibration
    kept = json.loads((int8_bundle / CALIBRATION).read_text())
    assert len(kept.pop("scales")) > len(kept.pop("asymmetric")) > 0
    assert found is not None
    assert found == kept
    assert found["streams"] == 6, "those of the checkpoint that do not judge"
    assert found["ages"][0] == 0


@pytest.mark.parametrize(("target", "precision"), ON_CPU)
def test_an_artifact_is_smaller_than_in_fp32(built: Built, target: str, precision: str) -> None:
    small, exact = (built(target, name).artifact(target, name) for name in (precision, "fp32"))
    if SCHEMES[target, precision] == "backend":  # its numbers are rounded when they are used
        # The text of a graph holds numbers that OpenVINO counts up for as long as a process lives.
        assert small.nbytes == pytest.approx(exact.nbytes, rel=0.01)
    else:
        assert small.nbytes < exact.nbytes


@pytest.mark.slow
def test_an_engine_is_smaller_than_in_fp32(tmp_path: Path) -> None:
    # Some megabytes of an engine are its kernels: only with weights that outweigh them does a precision show.
    model = make_model(d_model=384, state_dim=384, num_layers=2, feed_forward=8.6)
    nsm.save(model, tmp_path / "large.pt", samples=make_sequences(12, 240))
    sizes = {}
    for precision in ("fp32", "fp16", "int8", "int8-weights"):
        options = ExportOptions(["tensorrt"], precision=precision, output=tmp_path / f"{precision}.nsm")
        sizes[precision] = Bundle(export(tmp_path / "large.pt", options).path).artifact("tensorrt").nbytes
    shares = {precision: size / sizes["fp32"] for precision, size in sizes.items()}
    assert shares["fp16"] < 0.6
    assert shares["int8"] < 0.55
    assert shares["int8-weights"] < 0.45


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int8-weights"])
def test_engines_are_built_and_not_run(built: Built, precision: str) -> None:
    bundle = built("tensorrt", precision)
    bundle.verify()
    artifact = bundle.artifact("tensorrt", precision)
    assert (artifact.precision, artifact.device) == (precision, "sm86")
    assert artifact.parity.status in ("not_run", "passed")
    facts = quantization_of(artifact)
    assert facts.scheme == SCHEMES["tensorrt", precision]
    assert set(facts.quantized) == LARGE
    assert ROUTER in facts.kept_in_fp32
    layers = json.loads((bundle.path / f"tensorrt-{precision}" / "layers.json").read_text())["step"]
    kind = "QUANTIZE" if precision.startswith("int8") else "CAST"
    assert any(kind in line for line in layers)


def test_nothing_is_left_in_a_bundle_that_does_not_belong_there(built: Built, int8_bundle: Path) -> None:
    shared = {"manifest.json", "graphs", "state_init.npz", "golden.npz", "parity.json", CALIBRATION}
    shared |= {"openvino-int8", "onnxruntime-int8"}
    assert set(names(int8_bundle)) == shared
    assert set(names(built("openvino", "int8-weights").path)) == shared | {"openvino-int8-weights"}
    assert set(names(built("tensorrt", "int8").path)) == shared | {"tensorrt-int8"}
    for bundle in (int8_bundle, built("openvino", "int8-weights").path):
        assert set(names(bundle / "openvino-int8")) == {"step.xml", "decode.xml", "commit.xml", "weights.bin"}
        assert set(names(bundle / "onnxruntime-int8")) == {"step.onnx", "decode.onnx", "commit.onnx", "weights.bin"}


def test_in_fp32_beside_int8_the_portable_graphs_are_used(built: Built) -> None:
    bundle = built("onnxruntime", "fp32")
    bundle.verify()
    assert {record.path.split("/")[0] for record in bundle.artifact("onnxruntime").files} == {"graphs"}
    assert bundle.artifact("onnxruntime").quantization is None
    assert quantization_of(bundle.artifact("onnxruntime", "int8")).scheme == "dynamic"
    assert {"openvino-int8", "onnxruntime-int8"} < set(names(bundle.path))


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_a_graph_that_does_not_compute_in_the_precision_fails(built: Built, target: str) -> None:
    """An artifact in fp32 under the name of int8."""
    bundle = built(target, "fp32")
    artifact = replace(bundle.artifact(target, "fp32"), precision="int8")
    accepted = check_artifact(bundle, artifact, bundle.trace().first(3))
    checked, report = accepted.artifact, accepted.report
    assert checked.effective_precision == "fp32"
    assert report is not None
    assert report.failures == ("the backend computes in fp32 instead of int8",)


# -- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "precision"), ON_CPU)
def test_a_snapshot_in_fp32_goes_on_in_low_precision(built: Built, target: str, precision: str) -> None:
    ids = tokens(12)
    with (
        open_bundle(built(target, "fp32"), target) as exact,
        open_bundle(built(target, precision), target, precision=precision) as low,
    ):
        assert exact.fingerprint == low.fingerprint
        stepped(exact, ids[:, : 6 * CHUNK])
        low.restore(exact.snapshot())
        assert_same(low.read_state(), exact.read_state())
        rest = ids[:, 6 * CHUNK :]
        assert 0 < error(stepped(low, rest), stepped(exact, rest)) <= find_budget(precision).free_run_p99
        exact.restore(low.snapshot(1), 0)


@pytest.mark.parametrize(("target", "precision"), ON_CPU)
def test_a_reset_is_a_fresh_start(built: Built, target: str, precision: str) -> None:
    ids = tokens(5)
    with open_bundle(built(target, precision), target, precision=precision) as session:
        first = stepped(session, ids)
        session.reset()
        assert session.is_fresh()
        np.testing.assert_array_equal(stepped(session, ids), first)


@pytest.mark.parametrize("precision", ["int8", "int8-weights", *HALF])
def test_lanes_do_not_bleed_on_openvino(built: Built, precision: str) -> None:
    # In fp16 what is 1000 times too large overflows.
    factor = 100.0 if precision == "fp16" else 1000.0
    assert bleeding(built("openvino", precision), "openvino", precision, factor) == 0.0


@needs_fp16
def test_in_fp16_a_state_that_is_out_of_range_is_said_and_its_lane_goes_on_after_a_reset(built: Built) -> None:
    ids = tokens(1)
    with open_bundle(built("openvino", "fp16"), "openvino", precision="fp16") as session:
        fresh = stepped(session, ids)
        state = session.read_state()
        state["0.bank"][1] = 1e5
        session.load_state(state)
        with pytest.raises(NonFiniteError, match=r"NaN or infinite numbers on lanes \[1\]"):
            stepped(session, ids)
        session.reset()
        np.testing.assert_array_equal(stepped(session, ids), fresh)


def test_lanes_do_not_bleed_where_weights_alone_are_int8_on_onnx_runtime(built: Built) -> None:
    assert bleeding(built("onnxruntime", "int8-weights"), "onnxruntime", "int8-weights", 1000.0) == 0.0


def test_lanes_in_int8_agree_within_the_budget_on_onnx_runtime(built: Built) -> None:
    """They share a scale. The states that are multiplied come out of norms, so no stream gets them as large as here."""
    found = bleeding(built("onnxruntime", "int8"), "onnxruntime", "int8", 10.0)
    assert 0 < found <= find_budget("int8").free_run_p99


def bleeding(bundle: Bundle, target: str, precision: str, factor: float) -> float:
    """How far the outputs of lane 0 depend on a neighbour whose states are so many times too large."""
    ids = tokens(6)
    with open_bundle(bundle, target, precision=precision) as session:
        stepped(session, tokens(3, seed=6))
        state = session.read_state()
        alone = stepped(session, ids)
        for value in state.values():
            if value.dtype.kind == "f":
                value[1] *= factor
        assert np.abs(state["0.tail"][1]).max() > factor / 10
        session.load_state(state)
        loud = stepped(session, ids)
        assert error(loud[1], alone[1]) > 0.1, "the neighbour is another one"
        return error(loud[0], alone[0])


@pytest.mark.parametrize(("target", "precision"), ON_CPU)
def test_a_stream_in_pieces_is_the_stream(built: Built, target: str, precision: str) -> None:
    ids = tokens(4)
    with open_bundle(built(target, precision), target, precision=precision) as session:
        whole = stepped(session, ids)
        session.reset()
        single = [session.decode(ids[:, [index]])["outputs"] for index in range(2 * CHUNK)]
        budget = find_budget(precision).free_run_p99
        assert error(np.concatenate(single, 1), whole[:, : 2 * CHUNK]) <= budget
        session.reset()
        parts = [session.feed(part)["outputs"] for part in np.split(ids, [3, 4, 19], 1)]
        assert error(np.concatenate(parts, 1), whole) <= budget


# -- the graphs ------------------------------------------------------------------------------------------------------


def test_a_graph_is_read_with_all_its_numbers_even_where_a_link_leads_to_them(
    int8_bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(int8_bundle / "graphs", tmp_path / "copy")
    (tmp_path / "link").hardlink_to(tmp_path / "copy" / "weights.bin")
    wanted = onnx.load(str(int8_bundle / "graphs" / "step.onnx")).graph.initializer
    given = load_shared(tmp_path / "copy" / "step.onnx").graph.initializer
    assert [tensor.name for tensor in given] == [tensor.name for tensor in wanted]
    for one, other in zip(given, wanted, strict=True):
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(one), onnx.numpy_helper.to_array(other))


def test_only_large_products_are_chosen_and_shares_are_of_their_numbers(int8_bundle: Path) -> None:
    policy = find_policy("openvino", "int8")
    assert policy is not None
    lowered = linear_ops_of_step(int8_bundle, policy)
    assert {linear_op.node for linear_op in lowered.low} == LARGE
    assert min(linear_op.size for linear_op in lowered.low) >= SMALLEST
    sizes = {linear_op.key: linear_op.size for linear_op in lowered.low}
    assert lowered.fp32_share() == 0.0
    assert lowered.fp32_share(sizes) == 1.0
    first = next(iter(sizes))
    assert Lowered(lowered.low, {}).fp32_share([first, "another"]) == sizes[first] / sum(sizes.values())


def test_activations_are_unsigned_where_the_calibration_says_so_and_the_target_takes_it(
    int8_bundle: Path, tmp_path: Path
) -> None:
    bundle = Bundle(int8_bundle)
    calibration, spec = read_calibration(bundle), bundle.manifest.spec
    assert calibration.asymmetric  # what a GELU gives
    kinds = {}
    for target in ("openvino", "tensorrt"):
        policy = find_policy(target, "int8")
        assert policy is not None
        write_graphs(int8_bundle, tmp_path / target, spec, policy, calibration)
        model = load_shared(tmp_path / target / "step.onnx")
        types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        kinds[target] = {types[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert TensorProto.UINT8 in kinds["openvino"]
    assert kinds["tensorrt"] == {TensorProto.INT8}


def test_a_calibration_of_before_it_knew_unsigned_levels_is_read(int8_bundle: Path, tmp_path: Path) -> None:
    """What an earlier version wrote, in a bundle whose list of files was written then too."""
    shutil.copytree(int8_bundle, tmp_path / "b.nsm")
    path = tmp_path / "b.nsm" / "calibration.json"
    data = json.loads(path.read_text())
    del data["asymmetric"]
    path.write_text(json.dumps(data))
    write_manifest(tmp_path / "b.nsm", Bundle(int8_bundle).manifest)
    found = read_calibration(Bundle(tmp_path / "b.nsm"))
    assert found == replace(read_calibration(Bundle(int8_bundle)), asymmetric={})


def test_a_calibration_of_another_model_is_refused(int8_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle(int8_bundle)
    policy = find_policy("openvino", "int8")
    assert policy is not None
    calibration = read_calibration(bundle)
    other = replace(calibration, scales={key[::-1]: scale for key, scale in calibration.scales.items()})
    with pytest.raises(BundleDamagedError, match=r"calibration\.json has no scale for layers\.0\.\S+: it was found on"):
        write_graphs(int8_bundle, tmp_path / "low", bundle.manifest.spec, policy, other)
    assert not (tmp_path / "low" / "step.onnx").exists()
