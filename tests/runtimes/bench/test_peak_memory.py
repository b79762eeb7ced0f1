from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nsm.errors import RunError
from nsm.runtimes.bench.peak_memory import fresh_peak_mb, main, peak_rss_mb


def test_peak_memory_is_that_of_this_process_in_megabytes() -> None:
    before = peak_rss_mb()
    held = np.ones(int(before * 1e6 / 8) + 10_000_000)
    assert peak_rss_mb() > before + 70
    assert held.nbytes / 1e6 < peak_rss_mb() < before * 2 + 200


def test_a_fresh_process_does_not_count_what_this_one_holds(exported: Path) -> None:
    held = np.ones(50_000_000)  # 400 MB
    peak = fresh_peak_mb(exported, "onnxruntime", "fp32", threads=1)
    assert 20 < peak < peak_rss_mb() - 100
    assert held[0] == 1


def test_it_opens_this_artifact_only(exported: Path) -> None:
    plain, heavy = (fresh_peak_mb(exported, name, "fp32") for name in ("onnxruntime", "openvino"))
    assert abs(heavy - plain) > 1  # another backend's libraries


def test_a_process_that_fails_says_why(exported: Path) -> None:
    with pytest.raises(RunError, match=r"memory of coreml in .* ended with 1: .*holds no artifact for 'coreml'"):
        fresh_peak_mb(exported, "coreml", "fp32")


@pytest.mark.parametrize("threads", [[], ["1"]])
def test_the_process_prints_its_peak(exported: Path, threads: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([str(exported), "onnxruntime", "fp32", *threads])
    assert json.loads(capsys.readouterr().out)["peak_rss_mb"] == pytest.approx(peak_rss_mb(), rel=0.2)
