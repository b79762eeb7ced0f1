"""A small bundle with made-up graphs, for the tests of what is written and read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nsm.bundle import GOLDEN, STATE_INIT
from nsm.files.writing import write_json
from nsm.manifest import MANIFEST, Artifact, EntryWork, Manifest, file_record
from nsm.results import ParityResult, Quantiles, QuantizationResult, Ratio
from nsm.staging import write_manifest
from tests.runtimes.fake import FINGERPRINT, fake_initial, fake_spec, fake_trace

SHARED = ("graphs/step.onnx", "graphs/weights.bin", "state_init.npz", "golden.npz", "parity.json")
OWN = ("openvino/step.xml", "openvino/step.bin")
FILES = (*SHARED, *OWN)


def fill(stage: Path, command: str = "nsm-export model.pt") -> Manifest:
    """Everything that a bundle holds, with made-up graphs."""
    for name in ("graphs/step.onnx", "graphs/weights.bin", *OWN):
        (stage / name).parent.mkdir(exist_ok=True)
        (stage / name).write_bytes(f"content of {name}".encode() * 50)
    np.savez(stage / STATE_INIT, allow_pickle=False, **fake_initial(fake_spec()))
    fake_trace(streams=2, steps=4).save(stage / GOLDEN)
    write_json(stage / "parity.json", {"passed": True, "results": []})
    shared = tuple(file_record(stage, name) for name in SHARED[:2])
    manifest = Manifest(
        spec=fake_spec(),
        fingerprint=FINGERPRINT,
        model={"class": "Fake", "config": {"d_model": 4, "window": None}, "parameters": 40},
        artifacts=(
            Artifact("tensorrt", "sm86", "fp32", "fp32", (), ParityResult.not_run("no GPU"), ("a note",)),
            Artifact("onnxruntime", "cpu", "fp32", "fp32", shared, ParityResult("passed")),
            Artifact(
                "openvino",
                "cpu",
                "fp32",
                "fp32",
                tuple(file_record(stage, name) for name in OWN),
                ParityResult("failed", one_step=Quantiles(0.2, 0.5, 0.6, "outputs")),
                quantization=QuantizationResult("static", (), {"head": "small"}, speed={"step": Ratio(1.5, 1.5, 1.5)}),
            ),
        ),
        files=(),
        versions={"python": "3.11", "nsm": "0.1.0"},
        command=command,
        created="2025-01-01T00:00:00+00:00",
        work={"step": EntryWork(2e6, 5e5)},
    )
    write_manifest(stage, manifest)
    return manifest


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change the manifest by hand."""
    data = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    change(data)
    (path / MANIFEST).write_text(json.dumps(data), encoding="utf-8")
