"""The documentation builds: each link leads somewhere, and each name in the reference exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    python = (tmp_path / "site/reference/python/index.html").read_text("utf-8")
    assert "export_model" in python
    assert "--target" in (tmp_path / "site/reference/cli/index.html").read_text("utf-8")


def test_troubleshooting_quotes_errors_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = [
        row.split("|")[1].strip() for row in page.splitlines() if row.startswith("| ") and "the error says" not in row
    ]
    assert len(quoted) > 25
    code = "".join(
        path.read_text()
        for room in ("nsm", "export", "runtimes", "quantization")
        for path in (ROOT / room).rglob("*.py")
    )
    joined = re.sub(r'"\s*\n\s*f?"', "", code)  # messages are written over several lines
    missing = [text for text in quoted if text not in joined]
    assert not missing
