from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nsm
from nsm.bundle import Bundle
from nsm.errors import InputError, OutputExistsError
from nsm.export.api import export_model
from nsm.export.cli.run import score as score_command
from nsm.export.cli.run.score_log import ScoreLog
from nsm.runtimes.generate import scoring
from nsm.runtimes.generate.scoring import predicts, score
from tests.export.helpers import PROGRAMS, invoke, refused, succeeded, the_json
from tests.small_models import VOCABULARY, make_model, make_sequences

HEAD = {"fingerprint": "a", "target": "onnxruntime", "precision": "fp32"}


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that predicts the next id, on two lanes."""
    output = tmp_path_factory.mktemp("predictor") / "model.nsm"
    model = make_model(output_dim=VOCABULARY)
    export_model(model, "onnxruntime", output, make_sequences(2, 64), batch=2, num_samples=1, golden_steps=2)
    return output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files in two folders: five sequences."""
    (tmp_path / "data" / "more").mkdir(parents=True)
    np.save(tmp_path / "data" / "a.npy", make_sequences(3, 50))
    np.save(tmp_path / "data" / "b.npy", make_sequences(1, 77, seed=1)[0])
    np.savez(tmp_path / "data" / "more" / "c.npz", x=make_sequences(1, 33, seed=2)[0])
    return tmp_path / "data"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


def test_the_score_is_what_the_outputs_say(predictor: Path, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "PIECE", 16)  # several pieces, the last one partial
    tokens = make_sequences(1, 45, seed=3)[0]
    with nsm.open(predictor) as session:
        assert predicts(session)
        found = score(session, tokens)
        session.reset()
        logits = session.feed(np.stack([tokens, tokens]))["outputs"][0].astype(np.float64)
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted = -np.log(chances[np.arange(44), tokens[1:]]).mean()
    assert found["nats_per_token"] == pytest.approx(wanted, rel=1e-6)
    assert found["perplexity"] == pytest.approx(np.exp(wanted), rel=1e-6)
    assert found["tokens"] == 45
    with nsm.open(exported, "onnxruntime") as session:
        assert not predicts(session)
        found = score(session, tokens)
        session.reset()
        outputs = session.feed(np.stack([tokens, tokens]))["outputs"][0]
    assert found["last_argmax"] == outputs[-1].argmax()
    np.testing.assert_allclose(found["means"], outputs.mean(0), rtol=1e-5, atol=1e-6)


def test_a_folder_is_scored_and_a_second_run_has_nothing_to_do(predictor: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.jsonl"
    shown = succeeded(invoke("score", predictor, folder, "-o", output))
    assert "5 sequences, 260 tokens" in shown
    assert "perplexity" in shown
    first = output.read_text()
    head = json.loads(first.splitlines()[0])
    of = {"fingerprint": Bundle(predictor).manifest.fingerprint, "target": "onnxruntime", "precision": "fp32"}
    assert head == {"format": "nsm-scores", "version": 1, **of}
    assert [(line["file"], line["index"]) for line in lines_of(output)] == [
        ("a.npy", 0),
        ("a.npy", 1),
        ("a.npy", 2),
        ("b.npy", 0),
        ("more/c.npz", 0),
    ]
    again = the_json(invoke("score", predictor, folder, "-o", output, "--json"))
    assert (again["sequences"], again["skipped"], again["failed"]) == (5, 5, [])
    assert output.read_text() == first
    np.save(folder / "b.npy", make_sequences(1, 78, seed=9)[0])  # another one under the same name
    assert the_json(invoke("score", predictor, folder, "-o", output, "--json"))["skipped"] == 4
    assert the_json(invoke("score", predictor, folder, "-o", output, "--json", "--force"))["skipped"] == 0


def test_what_cannot_be_scored_is_named_and_tried_again(predictor: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.jsonl"
    np.save(folder / "high.npy", np.array([1, 99]))
    np.save(folder / "short.npy", np.array([1]))
    np.save(folder / "vectors.npy", np.zeros((1, 4, 2)))
    (folder / "broken.npy").write_bytes(b"rubbish")
    result = invoke("score", predictor, folder, "-o", output)
    message = refused_with_output(result)
    assert "4 of 9 could not be scored; the first is broken.npy" in message
    assert "5 sequences" in result.stdout
    errors = {line["file"]: line["error"] for line in lines_of(output) if "error" in line}
    assert "must lie in 0 .. 19" in errors["high.npy"]
    assert "at least two tokens" in errors["short.npy"]
    assert "The model takes sequences of shape ['T']" in errors["vectors.npy"]
    before = lines_of(output)
    refused_with_output(invoke("score", predictor, folder, "-o", output))
    assert lines_of(output) == before, "what fails as it did is not written again"
    for name in ("broken", "short", "vectors"):
        (folder / f"{name}.npy").unlink()
    np.save(folder / "high.npy", np.array([1, 9]))
    assert the_json(invoke("score", predictor, folder, "-o", output, "--json"))["skipped"] == 5


def refused_with_output(result: Any) -> str:
    assert result.exit_code == 2, result.output
    return str(result.stderr.strip().splitlines()[-1])


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(predictor: Path, tmp_path: Path) -> None:
    """With the same answers as one that was not."""
    folder, output = tmp_path / "data", tmp_path / "scores.jsonl"
    folder.mkdir()
    for index in range(12):
        np.save(folder / f"{index:02}.npy", make_sequences(1, 12_000, seed=index)[0])
    command = [str(PROGRAMS / "nsm"), "score", str(predictor), str(folder), "-o", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while time.monotonic() < end and (not output.exists() or output.read_bytes().count(b"\n") < 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = output.read_bytes().count(b"\n") - 1
    assert 2 <= done < 12, "it was killed in the middle"
    with output.open("ab") as file:
        file.write(b'{"file": "03.npy", "ind')  # as a crash would leave it
    found = the_json(invoke("score", predictor, folder, "-o", output, "--json"))
    assert (found["sequences"], found["skipped"]) == (12, done)
    whole = tmp_path / "whole.jsonl"
    succeeded(invoke("score", predictor, folder, "-o", whole))
    assert sorted(output.read_text().splitlines()) == sorted(whole.read_text().splitlines())


def test_a_log_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    ScoreLog(path, HEAD).close()
    before = path.read_text()
    with pytest.raises(InputError, match=r"expected .*--force"):
        ScoreLog(path, {**HEAD, "target": "openvino"})
    assert path.read_text() == before
    path.write_text(before + "[]\n")
    with pytest.raises(OutputExistsError, match=r"has lines that are not scores .*--force to start over"):
        ScoreLog(path, HEAD)
    ScoreLog(path, HEAD, force=True).close()
    assert path.read_text() == before
    with pytest.raises(InputError, match=r"is a folder; give a file"):
        ScoreLog(tmp_path, HEAD)
    with pytest.raises(InputError, match="cannot be written"):
        ScoreLog(tmp_path / "absent" / "scores.jsonl", HEAD)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "a thesis without a line break",
        "thesis\n",
        '{"a": 1}\n[]\n',
        "1\n2\n",
        json.dumps(HEAD) + "\n",
        '{"format": "nsm-scores", "version": 2}\n',
        '{"format": "nsm-scores", "version": 1}',
    ],
)
def test_a_file_that_is_no_log_of_this_version_is_never_overwritten(tmp_path: Path, text: str, force: bool) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text(text)
    with pytest.raises(OutputExistsError, match=r"is not a file of scores of this version, so it is not replaced"):
        ScoreLog(path, HEAD, force)
    assert path.read_text() == text


def test_data_that_is_scored_is_not_overwritten(predictor: Path, folder: Path) -> None:
    (folder / "notes.txt").write_text("abc")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in ("notes.txt", "a.npy"):
        refused(
            invoke("score", predictor, folder, "-o", folder / name, "--force"), 2, f"{name} exists and is not a file"
        )
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_an_empty_file_becomes_a_log_and_a_pipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    path.touch()
    ScoreLog(path, HEAD).close()
    assert json.loads(path.read_text())["format"] == "nsm-scores"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"pipe is not a regular file"):
        ScoreLog(tmp_path / "pipe", HEAD)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], "--workers and --threads must be at least 1"),
        (["--threads", "0"], "--workers and --threads must be at least 1"),
    ],
)
def test_counts_below_one_are_refused(options: list[str], message: str, predictor: Path, folder: Path) -> None:
    refused(invoke("score", predictor, folder, "-o", folder / "s.jsonl", *options), 2, message)


def test_nothing_to_score_is_refused(predictor: Path, tmp_path: Path) -> None:
    refused(invoke("score", predictor, tmp_path / "absent", "-o", tmp_path / "s.jsonl"), 2, "is not a folder")
    (tmp_path / "empty").mkdir()
    refused(invoke("score", predictor, tmp_path / "empty", "-o", tmp_path / "s.jsonl"), 2, "has no .npy")


def test_workers_without_ray_name_the_extra(
    predictor: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = invoke("score", predictor, folder, "-o", tmp_path / "s.jsonl", "--workers", "2")
    refused(result, 3, 'pip install "nsm-toolkit[ray]"')


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='needs Ray: pip install "nsm-toolkit[ray]"')
def test_workers_of_ray_give_the_same_answers(predictor: Path, folder: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    succeeded(invoke("score", predictor, folder, "-o", one))
    environment = {**os.environ, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    command = [str(PROGRAMS / "nsm"), "score", str(predictor), str(folder), "-o", str(two), "--workers", "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    assert sorted(one.read_text().splitlines()) == sorted(two.read_text().splitlines())
    assert score_command.SUFFIXES == (".npy", ".npz", ".txt")
