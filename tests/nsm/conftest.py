from __future__ import annotations

from pathlib import Path

import pytest

from nsm.staging import staged
from tests.nsm.bundles import fill


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A small bundle in a folder of its own."""
    path = tmp_path / "out" / "model.nsm"
    with staged(path) as stage:
        fill(stage)
    return path
