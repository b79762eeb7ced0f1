"""A bundle on arm64, under emulation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("qemu-aarch64-static") is None or shutil.which("dpkg-deb") is None,
    reason="needs Debian and qemu: apt-get install qemu-user-static",
)
def test_a_bundle_passes_parity_on_arm64(exported: Path) -> None:
    command = [str(ROOT / "tests" / "devices" / "arm64.sh"), str(exported), "onnxruntime"]
    environment = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    assert "running on aarch64" in result.stdout
    assert "passed" in result.stdout
