"""Artifacts that failed their parity check, or were never compared: what opens them, and what does not."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nsm
from nsm.bundle import Bundle
from nsm.errors import ParityError, StreamError, UncheckedWarning
from nsm.results import ParityResult, Quantiles
from nsm.runtimes.backends import openvino
from nsm.runtimes.base import Runtime
from nsm.staging import write_manifest
from tests.export.helpers import invoke, keep_only, refused, spoil, succeeded, the_json


def mark(path: Path, target: str, parity: ParityResult) -> None:
    """Give an artifact another status."""
    manifest = Bundle(path).manifest
    artifacts = tuple(replace(item, parity=parity) if item.target == target else item for item in manifest.artifacts)
    write_manifest(path, replace(manifest, artifacts=artifacts))


FAILED = ParityResult("failed", free_run=Quantiles(0.4, 0.47, 0.5, "outputs"))
NOT_RUN = ParityResult.not_run("There was no such processor.")


@pytest.fixture
def failed(bundle_copy: Path) -> Path:
    """What a failed build leaves: onnxruntime passed once, openvino did not."""
    keep_only(bundle_copy, "onnxruntime")
    spoil(bundle_copy)
    result = invoke("build", bundle_copy, "--target", "openvino")
    assert result.exit_code == 5, result.output
    return bundle_copy.with_name("copy.nsm.failed")


def test_a_failed_build_does_not_open_also_after_a_rename(failed: Path, tmp_path: Path) -> None:
    check_refused(failed)
    shutil.move(failed, tmp_path / "good.nsm")
    check_refused(tmp_path / "good.nsm")


def check_refused(path: Path) -> None:
    with pytest.raises(ParityError, match=r"openvino in .* failed its parity check \(free-run error .*allow_failed"):
        nsm.open(path, "openvino")
    with nsm.open(path, "openvino", allow_failed=True) as session:
        assert session.target == "openvino"
    with nsm.open(path) as session:
        assert session.target == "onnxruntime", "the one that passed"


COMMANDS = {
    "run": ("run",),
    "run --prompt": ("run", "--prompt", "a"),
    "bench": ("bench",),
    "bench --overhead": ("bench", "--overhead"),
    "roofline": ("roofline",),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("named", [True, False])
def test_commands_refuse_it(command: tuple[str, ...], named: bool, bundle_copy: Path) -> None:
    keep_only(bundle_copy, "openvino")
    mark(bundle_copy, "openvino", FAILED)
    name, *options = command
    target = ("--target", "openvino") if named else ()
    refused(invoke(name, bundle_copy, *options, *target, "--json"), 5, "failed its parity check (free-run error 0.47)")


def test_score_refuses_it_before_anything_is_written(bundle_copy: Path, tmp_path: Path) -> None:
    mark(bundle_copy, "openvino", FAILED)
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "ids.npy", np.arange(20) % 20)
    log = tmp_path / "scores.jsonl"
    refused(invoke("score", bundle_copy, tmp_path / "data", "-o", log, "-t", "openvino"), 5, "failed its parity check")
    assert not log.exists()


@pytest.mark.parametrize("options", [(), ("--overhead",)], ids=["bench", "overhead"])
def test_a_benchmark_of_all_artifacts_leaves_it_out(options: tuple[str, ...], bundle_copy: Path) -> None:
    keep_only(bundle_copy, "onnxruntime", "openvino")
    mark(bundle_copy, "openvino", FAILED)
    steps = "1000" if options else "40"
    result = invoke("bench", bundle_copy, *options, "--steps", steps, "--threads", "1")
    succeeded(result)
    assert "openvino: not measured. The artifact openvino in" in " ".join(result.output.split())
    assert [line.split()[0] for line in result.stdout.splitlines() if " fp32 " in line] == ["onnxruntime"]


def test_a_benchmark_does_not_compare_with_it(bundle_copy: Path, exported: Path) -> None:
    mark(bundle_copy, "onnxruntime", FAILED)
    result = invoke("bench", exported, "-t", "onnxruntime", "--against", bundle_copy, "--steps", "40", "--json")
    refused(result, 5, "The artifact onnxruntime in", "failed its parity check")


def test_it_runs_where_that_is_allowed(bundle_copy: Path) -> None:
    mark(bundle_copy, "openvino", FAILED)
    result = invoke("run", bundle_copy, "-t", "openvino", "--allow-failed", "--json")
    succeeded(result)
    assert the_json(result)["target"] == "openvino"


def test_parity_and_inspect_take_it_as_it_is(bundle_copy: Path) -> None:
    keep_only(bundle_copy, "openvino")
    mark(bundle_copy, "openvino", FAILED)
    succeeded(invoke("parity", bundle_copy))
    assert "failed" in succeeded(invoke("inspect", bundle_copy))


# -- never compared --------------------------------------------------------------------------------------------------


def test_what_was_never_compared_is_warned_of_once(bundle_copy: Path) -> None:
    mark(bundle_copy, "openvino", NOT_RUN)
    message = (
        r"openvino in .* was never compared with its reference: There was no such processor\. Compare it here: nsm"
    )
    with pytest.warns(UncheckedWarning, match=message) as caught, nsm.open(bundle_copy, "openvino") as session:
        session.run(np.zeros((2, 9), int))
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_a_session_is_closed_where_the_warning_is_an_error(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark(bundle_copy, "openvino", NOT_RUN)
    opened: list[Runtime] = []
    load = openvino.load

    def noted(*given: Any) -> Runtime:
        opened.append(load(*given))
        return opened[-1]

    monkeypatch.setattr(openvino, "load", noted)
    with pytest.raises(UncheckedWarning):  # the tests' own filter
        nsm.open(bundle_copy, "openvino")
    (runtime,) = opened
    with pytest.raises(StreamError, match="closed"):
        runtime.load_state({})


def test_the_command_line_warns_in_a_line(bundle_copy: Path) -> None:
    mark(bundle_copy, "openvino", NOT_RUN)
    result = invoke("run", bundle_copy, "-t", "openvino", "--json")
    succeeded(result)
    (line,) = (line for line in result.stderr.splitlines() if "never compared" in line)
    assert line.startswith("Warning: The artifact openvino in")


def test_of_a_bundle_where_nothing_passed_what_was_not_compared_is_preferred_to_what_failed(bundle_copy: Path) -> None:
    keep_only(bundle_copy, "onnxruntime", "openvino")
    mark(bundle_copy, "onnxruntime", FAILED)
    mark(bundle_copy, "openvino", NOT_RUN)
    with pytest.warns(UncheckedWarning), nsm.open(bundle_copy) as session:
        assert session.target == "openvino"
    mark(bundle_copy, "openvino", FAILED)
    with pytest.raises(ParityError, match="failed its parity check"):
        nsm.open(bundle_copy)
