"""Requests for int8, which needs sequences to calibrate on: where they come from, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nsm
from nsm.bundle import CALIBRATION, Bundle
from nsm.errors import BundleError, InputError
from nsm.export.options import ExportOptions
from nsm.export.pipeline import Plan, plan
from nsm.export.verify.acceptance import Limits
from nsm.export.verify.another_target import add_target
from nsm.manifest import MANIFEST
from nsm.models.checkpoint import load_checkpoint
from nsm.quantization.preconditions import MIN_CALLS
from nsm.staging import write_manifest
from nsm.trace import Array
from tests.export.helpers import invoke, names, quantization_of, refused, succeeded, the_json
from tests.small_models import CHUNK, make_model, make_sequences


def planned(model: Path, target: str = "openvino", **changes: Any) -> Plan:
    return plan(model, replace(ExportOptions([target], precision="int8", output=Path("absent.nsm")), **changes))


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Without sequences."""
    nsm.save(make_model(), tmp_path / "bare.pt")
    return tmp_path / "bare.pt"


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    """A model over vectors of three numbers, without sequences."""
    nsm.save(make_model(vocab_size=None, input_dim=3), tmp_path / "vectors.pt")
    return tmp_path / "vectors.pt"


def written(path: Path, *sequences: Array) -> Path:
    arrays: dict[str, Any] = {f"{index:02}": sequence for index, sequence in enumerate(sequences)}
    np.savez(path, **arrays)
    return path


# -- where the sequences come from -----------------------------------------------------------------------------------


def test_those_of_the_checkpoint_that_do_not_judge_calibrate(checkpoint: Path) -> None:
    kept = load_checkpoint(checkpoint)
    found = planned(checkpoint)
    assert len(found.calibration) == len(kept.calibration) == 8
    for given, wanted in zip(found.calibration, kept.calibration, strict=True):
        np.testing.assert_array_equal(given, wanted)
    assert not {tuple(one) for one in found.calibration} & {tuple(one) for one in found.sequences}


def test_a_files_first_sequences_judge_and_the_others_calibrate(checkpoint: Path, tmp_path: Path) -> None:
    ids = make_sequences(6, 40, seed=3)
    np.save(tmp_path / "ids.npy", ids)
    found = planned(checkpoint, data=tmp_path / "ids.npy", num_samples=2)
    np.testing.assert_array_equal(found.sequences, ids[:2])
    np.testing.assert_array_equal(found.calibration, ids[2:])


def test_a_texts_first_half_judges_and_its_second_half_calibrates(byte_bundle: Path, tmp_path: Path) -> None:
    text = np.random.default_rng(0).integers(0, 256, 400).astype(np.uint8)
    (tmp_path / "text.txt").write_bytes(text.tobytes())
    found = planned(byte_bundle.with_suffix(".pt"), data=tmp_path / "text.txt", num_samples=5)
    np.testing.assert_array_equal(np.concatenate(found.sequences), text[:200])
    np.testing.assert_array_equal(np.concatenate(found.calibration), text[200:])


@pytest.mark.parametrize(("target", "precision"), [("onnxruntime", "int8"), ("openvino", "int8-weights")])
def test_what_needs_no_calibration_asks_for_none(bare: Path, target: str, precision: str) -> None:
    assert planned(bare, target, precision=precision).calibration == []


# -- what is refused -------------------------------------------------------------------------------------------------


def test_without_sequences_the_ways_out_are_named(bare: Path) -> None:
    with pytest.raises(
        InputError, match=r"int8 calibration needs real sequences of at least one call \(8 tokens\)"
    ) as caught:
        planned(bare)
    for way in ("MODEL has only", "--data", "nsm.save(model, path, samples=...)", "--precision int8-weights"):
        assert way in str(caught.value)


def test_one_target_that_needs_it_is_enough(bare: Path) -> None:
    with pytest.raises(InputError, match="int8 calibration needs real sequences"):
        planned(bare, targets=["onnxruntime", "tensorrt"])


@pytest.mark.parametrize("count", [1, 3])
def test_a_file_with_none_left_is_refused(checkpoint: Path, tmp_path: Path, count: int) -> None:
    np.save(tmp_path / "ids.npy", make_sequences(count, 40))
    with pytest.raises(
        InputError, match=r"ids\.npy has only the 3 sequences of the parity check\..* lower --num-samples"
    ):
        planned(checkpoint, data=tmp_path / "ids.npy", num_samples=3)


def test_what_is_shorter_than_a_call_does_not_calibrate(checkpoint: Path, tmp_path: Path) -> None:
    long, short = np.zeros(MIN_CALLS * CHUNK, int), np.zeros(CHUNK - 1, int)
    data = written(tmp_path / "ids.npz", *make_sequences(2, 40), long, short)
    (found,) = planned(checkpoint, data=data, num_samples=2).calibration
    assert len(found) == len(long)
    with pytest.raises(InputError, match=f"at least one call .{4 * MIN_CALLS * CHUNK} tokens"):
        planned(checkpoint, data=data, num_samples=2, tokens_per_call=4 * MIN_CALLS * CHUNK)


def test_too_few_sequences_are_refused_before_any_work(checkpoint: Path, tmp_path: Path, no_work: None) -> None:
    """One call has seen nothing but the state after a reset."""
    data = written(tmp_path / "ids.npz", *make_sequences(2, 40), np.zeros(CHUNK, int))
    options = ("-t", "ov", "-p", "int8", "--data", data, "--num-samples", "2", "-o", tmp_path / "m.nsm")
    needed, given = "at least 16 calls of 8 tokens in all", "Given sequences: 1, calls: 1, in the longest: 1."
    refused(invoke("export", checkpoint, *options), 2, needed, given, "--precision int8-weights")
    assert names(tmp_path) == ["ids.npz"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.full(40, 20), r"Sequence 2: Token ids must lie in 0 \.\. 19"),
        (np.full(40, -1), r"Sequence 2: Token ids must lie in 0 \.\. 19"),
        (np.zeros(40, np.float32), r"Sequence 2: The model takes sequences of int64 \['T'\]; given float32\[40\]"),
        (np.zeros((1, 40, 2), int), r"Sequence 2: The model takes sequences of int64 \['T'\]; given int64\[40, 2\]"),
    ],
)
def test_bad_ids_among_those_that_calibrate_are_named(
    checkpoint: Path, tmp_path: Path, bad: Array, message: str
) -> None:
    data = written(tmp_path / "ids.npz", *make_sequences(2, 40), bad)
    with pytest.raises(InputError, match=message):
        planned(checkpoint, data=data, num_samples=2)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.full((1, 40, 3), np.nan, np.float32), "Sequence 1 contains NaN or infinity"),
        (np.full((1, 40, 3), np.inf, np.float32), "Sequence 1 contains NaN or infinity"),
        (np.zeros((1, 40, 4), np.float32), r"Sequence 1: The model takes sequences of float32 \['T', 3\]"),
        (np.zeros((1, 40, 3), int), r"Sequence 1: The model takes sequences of float32 \['T', 3\]; given int64"),
    ],
)
def test_bad_vectors_among_those_that_calibrate_are_named(
    vectors: Path, tmp_path: Path, bad: Array, message: str
) -> None:
    data = written(tmp_path / "vectors.npz", np.zeros((1, 40, 3), np.float32), bad)
    with pytest.raises(InputError, match=message):
        planned(vectors, data=data, num_samples=1)


@pytest.mark.parametrize("empty", [np.empty((0, 40), int), np.empty((2, 0), int)])
def test_a_file_without_a_token_is_refused(checkpoint: Path, tmp_path: Path, empty: Array) -> None:
    np.save(tmp_path / "ids.npy", empty)
    with pytest.raises(InputError, match="holds no sequence of at least one token"):
        planned(checkpoint, data=tmp_path / "ids.npy")


# -- the command line ------------------------------------------------------------------------------------------------


def test_a_dry_run_of_int8_checks_the_calibration_too(checkpoint: Path, bare: Path, tmp_path: Path) -> None:
    before = names(tmp_path)
    options = ("-t", "ov", "-p", "int8", "-o", tmp_path / "m.nsm", "--dry-run")
    data = the_json(invoke("export", checkpoint, *options, "--json"))
    assert (data["dry_run"], data["bundle"], data["streams"]) == (True, None, 8)
    refused(invoke("export", bare, *options), 2, "int8 calibration needs real sequences")
    assert names(tmp_path) == before


@pytest.mark.usefixtures("few_steps")
def test_int8_is_built_from_the_calibration_of_the_bundle(int8_copy: Path) -> None:
    before = Bundle(int8_copy)
    text = succeeded(invoke("build", int8_copy, "-t", "ov", "-p", "int8", "--allow-slower", "--force"))
    assert "passed" in text
    after = Bundle(int8_copy)
    after.verify()
    old, new = before.artifact("openvino"), after.artifact("openvino")
    assert quantization_of(new).calibration == quantization_of(old).calibration
    assert new.parity == old.parity
    assert (int8_copy / CALIBRATION).is_file()


def test_without_onnx_the_extra_is_named(bundle_copy: Path, hide: Callable[..., None]) -> None:
    hide("onnx")
    refused(invoke("build", bundle_copy, "-t", "ov", "-p", "int8-weights"), 3, 'pip install "nsm-toolkit[quantize]"')


def test_without_a_calibration_in_the_bundle_int8_is_refused(bundle_copy: Path) -> None:
    before = (bundle_copy / MANIFEST).read_bytes()
    build = ("build", bundle_copy, "-p", "int8", "-t")
    refused(invoke(*build, "ov"), 2, "holds no calibration", "--precision int8 where torch is", "int8-weights")
    refused(invoke(*build, "trt"), 2, "holds no calibration")
    assert (bundle_copy / MANIFEST).read_bytes() == before


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        (
            ("-t", "ov", "-p", "int9"),
            2,
            "Unknown precision 'int9'. Expected one of: fp32, fp16, bf16, int8, int8-weights",
        ),
        (
            ("-t", "ort", "-p", "bf16"),
            3,
            "no linear ops in bf16 on a CPU. Use int8. It is built in: fp32, int8, int8-weights.",
        ),
        (("-t", "onnx", "-p", "int8"), 3, "onnx is not built in int8. It is built in: fp32."),
        (("-t", "ort", "-p", "int8", "--max-fp32-share", "2"), 2, "--max-fp32-share must be in 0 .. 1; given 2.0"),
    ],
)
def test_a_wrong_request_to_build_is_refused(int8_bundle: Path, options: tuple[str, ...], code: int, part: str) -> None:
    before = names(int8_bundle.parent)
    refused(invoke("build", int8_bundle, *options), code, part)
    assert names(int8_bundle.parent) == before


def _flip(content: bytes) -> bytes:
    return content[:100] + bytes([content[100] ^ 1]) + content[101:]


def _edited(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def edit(content: bytes) -> bytes:
        data = json.loads(content)
        change(data)
        return json.dumps(data).encode()

    return edit


@pytest.mark.parametrize(
    ("change", "recorded", "part"),
    [
        (_flip, False, "calibration.json does not have the recorded SHA-256"),
        (lambda content: content[:-9], False, "calibration.json has"),
        (lambda _content: b"rubbish", True, "calibration.json is not JSON"),
        (_edited(lambda data: data.pop("ages")), True, "an object with the keys"),
        (
            _edited(lambda data: data["scales"].update(x=float("nan"))),
            True,
            "A scale is a number above 0; that of x is nan",
        ),
        (_edited(lambda data: data["scales"].update(x=0.0)), True, "A scale is a number above 0; that of x is 0"),
        (_edited(lambda data: data["scales"].clear()), True, "has no scale for layers.0."),
    ],
)
def test_a_damaged_calibration_ends_with_6(
    int8_copy: Path, change: Callable[[bytes], bytes], recorded: bool, part: str
) -> None:
    path = int8_copy / CALIBRATION
    path.write_bytes(change(path.read_bytes()))
    if recorded:
        write_manifest(int8_copy, Bundle(int8_copy).manifest)
    before = (int8_copy / MANIFEST).read_bytes()
    refused(invoke("build", int8_copy, "-t", "ov", "-p", "int8", "--force"), 6, part)
    with pytest.raises(BundleError):
        add_target(int8_copy, "openvino", precision="int8", force=True, limits=Limits(allow_slower=True))
    assert (int8_copy / MANIFEST).read_bytes() == before
    assert names(int8_copy.parent) == ["int8.nsm"]
