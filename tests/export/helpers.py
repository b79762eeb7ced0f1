"""What several tests of the export share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from click.testing import CliRunner, Result

from nsm.bundle import Bundle
from nsm.export.cli.app import main
from nsm.manifest import Artifact, file_record
from nsm.results import Quantiles, QuantizationResult
from nsm.staging import write_manifest

needs_fp16, needs_bf16 = (
    pytest.mark.skipif(
        kind.upper() not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
        reason=f"this processor does not compute in {kind}",
    )
    for kind in ("fp16", "bf16")
)
# The product that the fixture `rough` spoils.
ROUGH = "layers.0.feed_forward.2/MatMul"


def p99(error: Quantiles | None) -> float:
    """The 99th percentile of an error that was measured."""
    assert error is not None
    return error.p99


def worst(error: Quantiles | None) -> float:
    """The maximum of an error that was measured."""
    assert error is not None
    return error.max


def quantization_of(artifact: Artifact) -> QuantizationResult:
    """The quantization of an artifact in low precision."""
    assert artifact.quantization is not None
    return artifact.quantization


COMMANDS = ("export", "parity", "bench", "build", "inspect", "doctor", "roofline", "run", "score")
PROGRAMS = Path(sys.executable).parent


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def program(name: str, *arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The installed command, as a user starts it, on a machine without a GPU."""
    return subprocess.run(
        [str(PROGRAMS / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )


def refused(result: Result, code: int, *parts: str) -> str:
    """The message of a command that ended with `code`: the last on stderr, no traceback, stdout nothing or JSON."""
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert "Traceback" not in result.output
    assert result.stdout == "" or json.loads(result.stdout)
    lines = result.stderr.strip().splitlines()
    starts = [index for index, line in enumerate(lines) if line.startswith("Error: ")]
    assert starts, result.stderr
    message = "\n".join(lines[starts[-1] :])
    assert message.count("\n") in (0, 2), message  # one line, or with a line of the user's code between
    for part in parts:
        assert part in message
    return message


def succeeded(result: Result) -> str:
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def the_json(result: Result | subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The one object on stdout."""
    assert result.stdout.count("\n") == 1
    data = json.loads(result.stdout)
    assert isinstance(data, dict)
    return data


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def keep_only(path: Path, *targets: str) -> None:
    """Take the other targets out of the bundle."""
    manifest = Bundle(path).manifest
    write_manifest(path, replace(manifest, artifacts=tuple(a for a in manifest.artifacts if a.target in targets)))
    for folder in Bundle(path).others():
        shutil.rmtree(path / folder)


def spoil(path: Path) -> None:
    """Another model under the name of this one, with records that fit."""
    scale_weights(path / "graphs" / "weights.bin", 1.001)
    manifest = Bundle(path).manifest
    artifacts = tuple(
        replace(a, files=tuple(file_record(path, record.path) for record in a.files)) for a in manifest.artifacts
    )
    write_manifest(path, replace(manifest, artifacts=artifacts))
    Bundle(path).verify()


def short(checkpoint: Path, output: Path, *more: str) -> list[str | Path]:
    """Arguments of an export that `ready_graph` serves."""
    sizes = ("--batch", "2", "--num-samples", "2", "--golden-steps", "3")
    return ["export", checkpoint, "-o", output, *sizes, *(more or ("-t", "ort"))]


def scale_weights(path: Path, factor: float) -> None:
    """Multiply the fp32 numbers of a file of weights; integers, masks and zeros beside them stay as they are."""
    content = path.read_bytes()
    weights = np.frombuffer(content[: len(content) // 4 * 4], np.float32).copy()
    magnitude = np.abs(weights)
    weights[(magnitude > 1e-6) & (magnitude < 1e6)] *= np.float32(factor)
    path.write_bytes(weights.tobytes() + content[len(weights) * 4 :])
