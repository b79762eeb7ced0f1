"""Build and open an artifact in a child process, so that a crash of a compiler ends only the child."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nsm import errors
from nsm.decode import decode
from nsm.errors import BuildError, NsmError
from nsm.files import write_json
from nsm.runtimes import Target
from nsm.spec import StepSpec

REQUEST, REPLY, STAGE = "request.json", "reply.json", "stage"
_LOG = "log"


@dataclass(frozen=True)
class Trial:
    """The request to the child process.

    Args:
        target: the target's row of the table; the child does not know rows that were added at run time.
        spec: the spec of the model, with the entries that the target supports.
        directory, folder, low, device: see `nsm.export.builders.base.Request`.
        precision: precision of the artifact.
        threads: thread counts; the child opens the artifact with each of them.
        files: files of an existing artifact, relative to `directory`; () builds the artifact first.
        options: compile options for opening the artifact.
    """

    target: Target
    spec: StepSpec
    directory: str
    folder: str
    low: str | None
    device: str | None
    precision: str
    threads: tuple[int | None, ...]
    files: tuple[str, ...] = ()
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """The reply of the child process.

    Args:
        files, device, notes: see `nsm.export.builders.base.Built`.
        failure: the backend's error when it opened the artifact and ran every entry once, or "". The caller opens the
            artifact again to raise the original error.
    """

    files: tuple[str, ...]
    device: str
    notes: tuple[str, ...]
    failure: str = ""


@dataclass(frozen=True)
class Tried:
    """A reply, the compile options that avoided a crash, and a description of the crash, or ""."""

    reply: Reply
    options: Mapping[str, str]
    crash: str


class _CrashError(Exception):
    """The child process crashed; `reply` is its result so far, or None."""

    def __init__(self, message: str, reply: Reply | None) -> None:
        super().__init__(message)
        self.reply = reply


def try_target(trial: Trial) -> Tried:
    """Build an artifact and open it in a child process; return its reply.

    If the child crashes while opening the artifact, it tries again with each set of compile options that the target's
    row lists as a remedy.

    Raises:
        BuildError: the child crashed with every set of options; the message names the target, the signal and the stage.
        NsmError: the builder's error.
    """
    first: _CrashError | None = None
    failures: list[str] = []
    for options in (trial.options, *(item for item in trial.target.remedies if item != trial.options)):
        try:
            reply = _reply(replace(trial, options=options))
        except _CrashError as crash:
            first = first or crash
            if crash.reply is None:  # crashed while building, which compile options do not affect
                break
            trial = replace(trial, files=crash.reply.files)
            if options:
                failures.append(f"With {shown_options(options)} it failed as well: {crash}.")
            continue
        if first is None:
            return Tried(reply, options, "")
        if not reply.failure:
            return Tried(replace(reply, device=_made(first).device, notes=_made(first).notes), options, str(first))
        failures.append(f"With {shown_options(options)} it failed as well: {reply.failure}.")
    assert first is not None
    raise BuildError(
        " ".join(
            (
                f"The target {trial.target.name} crashed: {first}.",
                *failures,
                f"This is a bug of the package {trial.target.installed()}. Build another target, try another version "
                "of the package, or change the model.",
            )
        )
    )


def try_opening(trial: Trial) -> None:
    """Raise `BuildError` if a child process crashes while opening an artifact."""
    try:
        _reply(trial)
    except _CrashError as crash:
        raise BuildError(
            f"The target {trial.target.name} crashed: {crash}. The artifact opened on the machine that built it, so "
            f"the package {trial.target.installed()} or the processor differs here. Build it again on this machine: "
            f"nsm build BUNDLE --target {trial.target.name}"
        ) from crash


def shown_options(options: Mapping[str, str]) -> str:
    """Format compile options for a message."""
    return ", ".join(f"{name}={value}" for name, value in options.items())


def _made(crash: _CrashError) -> Reply:
    assert crash.reply is not None
    return crash.reply


def _reply(trial: Trial) -> Reply:
    """Run the child once.

    Raises:
        _CrashError: the child crashed.
        NsmError: the builder's error.
    """
    with tempfile.TemporaryDirectory(prefix="nsm-build-") as name:
        place = Path(name)
        write_json(place / REQUEST, dataclasses.asdict(trial))
        code = _run(place)
        data = json.loads((place / REPLY).read_text("utf-8")) if (place / REPLY).is_file() else None
        if data is not None and "error" in data:
            raise raised(data)
        reply = None if data is None else decode(Reply, data, REPLY)
        if code == 0 and reply is not None:
            return reply
        doing = (place / STAGE).read_text("utf-8") if (place / STAGE).is_file() else "starting"
        last = (place / _LOG).read_text("utf-8", errors="replace").strip().splitlines()[-1:]
        said = f" (its last output: {last[0][:300]})" if last else ""
        raise _CrashError(f"{_ended(code)} while {doing}{said}", reply)


def _run(place: Path) -> int:
    """Run the child and return its exit status, negative for a signal.

    The child exits when its standard input closes, so it does not outlive this process.
    """
    # -P: do not import modules from the current folder.
    command = [sys.executable, "-P", "-m", "nsm.export.verify.trial", str(place)]
    folders = [*filter(None, sys.path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    with (place / _LOG).open("wb") as log:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment)
        with child:
            try:
                return child.wait()
            except BaseException:
                child.kill()
                raise


def _ended(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit status {code}"
    known = {int(item): item.name for item in signal.Signals}
    return f"its process was killed by signal {-code} ({known.get(-code, 'unknown')})"


def raised(data: Mapping[str, Any]) -> NsmError:
    """Recreate the error of the builder, with its class."""
    kind = getattr(errors, data["error"], BuildError)
    error: NsmError = kind(data["message"])
    if isinstance(error, BuildError):
        error.log = None if data["log"] is None else Path(data["log"])
    if data["traceback"]:
        error.add_note(data["traceback"])
    return error
