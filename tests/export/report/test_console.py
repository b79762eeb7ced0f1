from __future__ import annotations

import pytest

from nsm.export.report.console import PARITY_COLUMNS, Terminal, parity_row
from nsm.export.report.format import number, size
from nsm.manifest import Artifact, FileRecord
from nsm.results import ParityResult, Quantiles


@pytest.mark.parametrize(
    ("count", "wanted"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (136_495, "136.5 kB"),
        (4_642_516, "4.6 MB"),
        (7_500_000_000, "7.5 GB"),
        (2e13, "20000.0 GB"),
    ],
)
def test_size_is_in_powers_of_ten(count: float, wanted: str) -> None:
    assert size(count) == wanted


def test_number_has_three_figures_or_a_dash() -> None:
    assert number(0.000123456) == "1.23e-04"
    assert number(0.0) == "0.00e+00"
    assert number(None) == "-"


def make_artifact(parity: ParityResult) -> Artifact:
    return Artifact("openvino", "cpu", "fp32", "fp32", (FileRecord("openvino/step.bin", 4_600_000, "0"),), parity)


def error(p99: float) -> Quantiles:
    return Quantiles(p99, p99, p99, "outputs")


def test_a_row_of_an_artifact_that_was_compared() -> None:
    parity = ParityResult("passed", one_step=error(2e-7), free_run=error(3e-7), argmax_agreement=0.9987)
    row = parity_row(make_artifact(parity))
    assert row == ["openvino", "cpu", "fp32", "4.6 MB", "passed", "2.00e-07", "3.00e-07", "99.87%"]
    assert len(row) == len(PARITY_COLUMNS)


def test_a_row_of_an_artifact_that_produced_nothing_finite() -> None:
    nan = error(float("nan"))
    row = parity_row(make_artifact(ParityResult("failed", one_step=nan, free_run=nan, argmax_agreement=0.0)))
    assert row[-4:] == ["failed", "-", "-", "0.00%"]


def test_a_row_of_an_artifact_that_could_not_run() -> None:
    row = parity_row(make_artifact(ParityResult.not_run("no GPU")))
    assert row == ["openvino", "cpu", "fp32", "4.6 MB", "not_run", "-", "-", "-"]
    assert len(row) == len(PARITY_COLUMNS)


def test_results_go_to_stdout_and_the_rest_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    terminal.say("a result")
    terminal.remark("a remark")
    with terminal.stage("Some work") as step:
        step(1, 4)
    terminal.table(("name", "count"), [["one", "11"], ["two", "2"]], "A title")
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "a result"
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["A", "title"],
        ["name", "count"],
        ["one", "11"],
        ["two", "2"],
    ]
    assert "a remark" in err
    assert "Some work" in err
    assert "4/4" in err, "a stage that ended well is full"


def test_a_stage_that_counts_nothing_ends_full_too(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal().stage("Converting"):
        pass
    assert "1/1" in capsys.readouterr().err


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(quiet=True)
    terminal.say("a result")
    terminal.remark("a remark")
    terminal.table(("name",), [["one"]], "A title")
    with terminal.stage("Some work") as step:
        step(1, 4)
    assert capsys.readouterr() == ("", "")


def test_an_error_in_a_stage_is_not_swallowed() -> None:
    with pytest.raises(ValueError, match="halfway"), Terminal(quiet=True).stage("Some work"):
        raise ValueError("halfway")


def test_numbers_stand_to_the_right_and_words_to_the_left(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal().table(("name", "count"), [["a", "5"], ["long name", "12345"], ["b", "-"]])
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line.rstrip()) for line in lines}) == 1, "the last column ends where all its cells end"
    assert all(not line.startswith(" ") for line in lines)


def test_brackets_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    """A path or a hint such as nsm-toolkit[tensorrt] is not markup."""
    terminal = Terminal()
    terminal.say('pip install "nsm-toolkit[tensorrt]" [/]')
    terminal.remark("Wrote a[bold]b.nsm")
    terminal.table(("to get it",), [['pip install "nsm-toolkit[export]"']], "model[red].nsm")
    out, err = capsys.readouterr()
    assert 'pip install "nsm-toolkit[tensorrt]" [/]' in out
    assert 'pip install "nsm-toolkit[export]"' in out
    assert "model[red].nsm" in out
    assert "Wrote a[bold]b.nsm" in err


def test_long_lines_are_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    terminal.say("x" * 500)
    terminal.table(("name", "path"), [["a", "y" * 120]])
    out = capsys.readouterr().out
    assert "x" * 500 in out
    assert "y" * 120 in out
