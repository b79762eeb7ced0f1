from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import nsm
from nsm.bundle import Bundle
from nsm.errors import BuildError
from nsm.export.builders.base import Request
from nsm.export.builders.mobile import CONFIGS, build
from nsm.export.verify.another_target import add_target
from tests.export.helpers import invoke, refused, succeeded
from tests.small_models import make_sequences


@pytest.fixture(scope="module")
def mobile(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the target mobile, built from its ONNX."""
    path = Path(shutil.copytree(exported, tmp_path_factory.mktemp("mobile") / "m.nsm"))
    add_target(path, "mobile")
    return path


def test_what_was_checked_is_the_ort_file(mobile: Path) -> None:
    artifact = Bundle(mobile).artifact("mobile")
    assert artifact.parity.status == "passed"
    assert artifact.effective_precision == "fp32"
    names = {Path(record.path).name for record in artifact.files}
    assert names == {"step.ort", "decode.ort", "commit.ort", *CONFIGS}
    assert (mobile / "mobile" / "step.ort").read_bytes()[4:8] == b"ORTM"
    tokens = make_sequences(2, 45)
    with nsm.open(mobile, "mobile") as session, nsm.open(mobile, "onnxruntime") as wanted:
        given = session.feed(tokens, [45, 13])["outputs"]
        np.testing.assert_allclose(given, wanted.feed(tokens, [45, 13])["outputs"], rtol=1e-5, atol=1e-6)


def test_the_operators_of_all_entries_are_listed_with_and_without_types(mobile: Path) -> None:
    plain, typed = ((mobile / "mobile" / name).read_text() for name in CONFIGS)
    for text in (plain, typed):
        lines = text.strip().splitlines()
        assert all(line.count(";") >= 2 for line in lines), "domain;opset;operators"
        assert str(mobile.parent) not in text
    listed = {name for line in plain.splitlines() for name in line.split(";")[2].split(",")}
    assert {"MatMul", "Softmax", "Where"} <= listed
    assert '"float"' in typed
    assert '"float"' not in plain


def test_the_option_adds_the_target(checkpoint: Path, tmp_path: Path) -> None:
    options = ("--num-samples", "2", "--golden-steps", "4", "-o", tmp_path / "m.nsm")
    succeeded(invoke("export", checkpoint, "-t", "ort", "--mobile", *options))
    assert [item.target for item in Bundle(tmp_path / "m.nsm").manifest.artifacts] == ["onnxruntime", "mobile"]
    result = invoke("export", checkpoint, "-t", "openvino", "--mobile", "-o", tmp_path / "n.nsm")
    refused(result, 2, "--mobile", "--target onnxruntime", "--target mobile")


def test_a_graph_that_is_none_fails(mobile: Path, tmp_path: Path) -> None:
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "step.onnx").write_bytes(b"rubbish")
    with pytest.raises(BuildError, match=r"ONNX Runtime cannot convert step\.onnx"):
        build(Request(tmp_path, tmp_path / "mobile", Bundle(mobile).manifest.spec, None))
