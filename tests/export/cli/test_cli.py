from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import nsm
from nsm.runtimes.targets import TARGETS
from tests.export.helpers import (
    COMMANDS,
    invoke,
    program,
    refused,
    succeeded,
)
from tests.small_models import make_sequences

# -- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "phrases"),
    [
        ("export", ("verified bundle from MODEL", "--target", "--require-parity", "--dry-run", "5 parity failed")),
        ("parity", ("Replay the golden trace of BUNDLE", "not need torch", "--steps")),
        (
            "bench",
            ("Measure latency", "--threads", "nsm bench --all model.pt", "--against eager --model model.pt"),
        ),
        ("roofline", ("roofline", "--threads")),
        ("build", ("ONNX graphs in BUNDLE", "torch", "--device")),
        ("inspect", ("inputs, outputs, states, sizes, precision and provenance",)),
        ("doctor", ("installed packages", "missing")),
        ("run", ("sequences", "--data", "--output")),
    ],
)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_says_what_a_command_does(command: str, phrases: tuple[str, ...], option: str) -> None:
    text = " ".join(succeeded(invoke(command, option)).split())
    for phrase in (*phrases, "--json", "--verbose"):
        assert phrase in text


@pytest.mark.parametrize("command", ["export", "parity", "bench", "build"])
def test_help_names_every_target_of_the_table(command: str) -> None:
    text = " ".join(succeeded(invoke(command, "--help")).split())
    named = [f"{target.name} ({target.aliases[0]})" if target.aliases else target.name for target in TARGETS.values()]
    assert f"{', '.join(named[:-1])} or {named[-1]}." in text


def test_help_lists_every_command_with_a_line() -> None:
    lines = succeeded(invoke("--help")).splitlines()
    listed = {line.split()[0]: line.split(maxsplit=1)[1:] for line in lines[lines.index("Commands:") + 1 :] if line}
    assert set(listed) == set(COMMANDS)
    assert all(text and not text[0].endswith("...") for text in listed.values())


def test_version() -> None:
    assert succeeded(invoke("--version")) == f"nsm, version {nsm.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["deploy"], ["parity"], ["bench", "a", "b"], ["inspect", "a", "--deep"]])
def test_a_call_that_click_does_not_understand_is_a_usage_error(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


# -- bundles that are none -------------------------------------------------------------------------------------------

ON_A_BUNDLE = [["parity"], ["bench", "--steps", "10"], ["inspect"], ["run"], ["build", "-t", "onnx"]]


@pytest.mark.parametrize("command", ON_A_BUNDLE, ids=lambda command: str(command[0]))
def test_no_bundle_there_ends_with_2(tmp_path: Path, command: list[str]) -> None:
    refused(invoke(command[0], tmp_path / "m.nsm", *command[1:], "--json"), 2, "There is no bundle", "m.nsm")


def _flip(path: Path) -> None:
    content = bytearray((path / "graphs" / "weights.bin").read_bytes())
    content[1000] ^= 1
    (path / "graphs" / "weights.bin").write_bytes(content)


def _cut(path: Path) -> None:
    content = (path / "graphs" / "step.onnx").read_bytes()
    (path / "graphs" / "step.onnx").write_bytes(content[:-1])


def _lose(path: Path) -> None:
    (path / "graphs" / "weights.bin").unlink()


def _no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def _broken_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"format_version": 2')


def _other_version(path: Path) -> None:
    data = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**data, "format_version": 99}))


@pytest.mark.parametrize("command", ON_A_BUNDLE, ids=lambda command: str(command[0]))
@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (_flip, "graphs/weights.bin does not have the recorded SHA-256"),
        (_cut, "graphs/step.onnx has"),
        (_lose, "graphs/weights.bin is missing"),
        (_no_manifest, "is not a bundle: manifest.json cannot be read"),
        (_broken_manifest, "is not JSON"),
        (_other_version, "format version 99; this nsm reads version 2"),
    ],
)
def test_a_bundle_that_is_damaged_or_of_another_version_ends_with_6(
    bundle_copy: Path, command: list[str], damage: Callable[[Path], None], part: str
) -> None:
    damage(bundle_copy)
    refused(invoke(command[0], bundle_copy, *command[1:], "--json"), 6, part)


# -- without torch ---------------------------------------------------------------------------------------------------

DRIVER = """
import contextlib, io, json, sys
sys.modules["torch"] = None
from nsm.export.cli.app import main
results = {}
for name, arguments in json.loads(sys.argv[1]).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments, prog_name="nsm")
        except SystemExit as end:
            results[name] = [end.code, out.getvalue(), err.getvalue()]
assert sys.modules["torch"] is None
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def torchless(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr of every command, in one process that cannot import torch."""
    folder = tmp_path_factory.mktemp("torchless")
    bundle = str(shutil.copytree(exported, folder / "m.nsm"))
    (folder / "data").mkdir()
    np.save(folder / "data" / "ids.npy", make_sequences(3, 20))
    calls = {
        "build": ["build", bundle, "--target", "openvino", "--force", "--json"],
        "parity": ["parity", bundle, "--json"],
        "bench": ["bench", bundle, "--steps", "10", "--json"],
        "inspect": ["inspect", bundle, "--json"],
        "roofline": ["roofline", bundle, "--target", "onnxruntime", "--threads", "1", "--json"],
        "run": ["run", bundle, "--output", str(folder / "out.npz"), "--json"],
        "score": ["score", bundle, str(folder / "data"), "--output", str(folder / "scores.jsonl"), "--json"],
        "doctor": ["doctor", "--json"],
        "export": ["export", str(folder / "model.pt"), "--target", "onnx"],
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(calls)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return {name: (result[0], result[1], result[2]) for name, result in json.loads(done.stdout).items()}


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "export"])
def test_a_command_on_a_bundle_works_without_torch(torchless: dict[str, tuple[int, str, str]], command: str) -> None:
    code, out, err = torchless[command]
    assert (code, err) == (0, "")
    data = json.loads(out)
    if command == "doctor":
        (finding,) = (item for item in data["findings"] if item["name"] == "torch")
        assert finding["found"] is None
        assert finding["fix"] == 'pip install "nsm-toolkit[export]"'
    elif command == "inspect":
        assert data["verified"] is True
    elif command == "build":
        assert data["artifacts"][0]["parity"]["status"] == "passed"
    elif command == "parity":
        assert data["passed"] is True
        assert [item["status"] for item in data["results"]].count("passed") == 3
    elif command == "roofline":
        assert [item["entry"] for item in data["results"]] == ["step", "decode"]
        assert all(0 < item["share"] < 10 for item in data["results"])
    elif command == "bench":
        assert len(data["results"]) == 3
    elif command == "score":
        assert (data["sequences"], data["tokens"], data["failed"]) == (3, 60, [])
    else:
        assert len(data["sequences"]) == 8


def test_export_without_torch_ends_with_3(torchless: dict[str, tuple[int, str, str]]) -> None:
    code, out, err = torchless["export"]
    assert (code, out) == (3, "")
    assert "Exporting needs torch, which is not installed" in err
    assert 'pip install "nsm-toolkit[export]"' in err


# -- as a user starts it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_nsm_export_has_help(option: str) -> None:
    done = program("nsm-export", option)
    assert done.returncode == 0
    assert "Usage: nsm-export [OPTIONS] MODEL" in done.stdout


def test_nsm_ends_with_the_exit_code_and_one_line(bundle_copy: Path) -> None:
    _flip(bundle_copy)
    done = program("nsm", "inspect", bundle_copy)
    assert (done.returncode, done.stdout) == (6, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("Error: ")


def test_progress_does_not_get_into_a_pipe(exported: Path) -> None:
    done = program("nsm", "parity", exported, "--target", "ort", "--steps", "2")
    assert done.returncode == 0
    assert "Checking" in done.stderr
    assert "Checking" not in done.stdout
    assert "\x1b" not in done.stdout
