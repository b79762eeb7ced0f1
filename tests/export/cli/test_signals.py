"""A command that is told to end leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from nsm.export.cli.signals import ending_cleanly
from tests.export.helpers import PROGRAMS
from tests.nsm.bundles import names


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("program", [["nsm-export"], ["nsm", "export"]], ids=" ".join)
def test_an_export_that_is_ended_cleans_up(
    checkpoint: Path, tmp_path: Path, number: signal.Signals, program: list[str]
) -> None:
    output = tmp_path / "model.nsm"
    command = [str(PROGRAMS / program[0]), *program[1:], str(checkpoint), "-t", "ort", "-o", str(output)]
    command += ["--golden-steps", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        end = time.monotonic() + 60
        while time.monotonic() < end and not names(tmp_path):
            time.sleep(0.01)
        assert [name.endswith(".partial") for name in names(tmp_path)] == [True]
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    assert names(tmp_path) == []


def test_the_block_ends_with_the_number_of_the_signal_and_all_is_as_before() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, ending_cleanly():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_is_ignored_or_handled_stays_so() -> None:
    def handler(*_: object) -> None:
        """One of the program's own."""

    before = signal.signal(signal.SIGTERM, handler), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_cleanly():
            assert signal.getsignal(signal.SIGTERM) is handler
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, "as under nohup"
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGHUP, before[1])


def test_a_thread_changes_nothing() -> None:
    found = []

    def work() -> None:
        with ending_cleanly():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]
