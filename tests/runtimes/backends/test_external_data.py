"""A graph whose weights lie outside of the bundle: a file of the machine is not read because a bundle names it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

import nsm
from nsm.bundle import Bundle
from nsm.errors import BuildError
from nsm.manifest import file_record
from nsm.staging import write_manifest


def point_to(bundle: Path, location: str) -> None:
    """Let the graph of `step` take its weights from there, in records that fit."""
    path = bundle / "graphs" / "step.onnx"
    model = onnx.load(str(path), load_external_data=False)
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"]
    assert entries
    for entry in entries:
        entry.value = location
    path.write_bytes(model.SerializeToString())
    manifest = Bundle(bundle).manifest
    artifacts = tuple(
        replace(item, files=tuple(file_record(bundle, record.path) for record in item.files))
        for item in manifest.artifacts
    )
    write_manifest(bundle, replace(manifest, artifacts=artifacts))
    Bundle(bundle).verify()


@pytest.mark.parametrize("target", ["onnx", "onnxruntime"])
@pytest.mark.parametrize("kind", ["above", "absolute", "link"])
def test_weights_outside_of_the_bundle_are_not_read(kind: str, target: str, bundle_copy: Path) -> None:
    """They would fit: it is the place that is refused. ONNX Runtime does so since the version that nsm asks for."""
    secret = bundle_copy.parent / "secret.bin"
    shutil.copy(bundle_copy / "graphs" / "weights.bin", secret)
    if kind == "link":
        (bundle_copy / "graphs" / "link.bin").symlink_to(secret)
    point_to(bundle_copy, {"above": "../../secret.bin", "absolute": str(secret), "link": "link.bin"}[kind])
    with pytest.raises(BuildError, match="ONNX Runtime cannot open"), nsm.open(bundle_copy, target):
        pass


def test_weights_under_another_name_are_read_where_they_are_the_bundles(bundle_copy: Path) -> None:
    """So what is refused above is not the change of the name."""
    shutil.copy(bundle_copy / "graphs" / "weights.bin", bundle_copy / "graphs" / "other.bin")
    point_to(bundle_copy, "other.bin")
    with nsm.open(bundle_copy, "onnxruntime"):
        pass
