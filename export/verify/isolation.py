"""Builds and first opens an artifact in a child process, which a crash in a compiler ends alone."""

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
        target: its row of the table, since the child may not know a row that was added at run time.
        spec: of the model, as the target serves it.
        directory, folder, low, device: see `nsm.export.builders.base.Request`.
        precision: of the artifact.
        threads: numbers of threads of the backend that the artifact is opened with, one after the other.
        files: of an artifact that is built already, relative to `directory`; () builds it first.
        options: compile options that it is opened with.
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
        failure: the error of the backend when it opened the artifact and ran every entry once, or "". The caller opens
            it again to raise the error in its own words.
    """

    files: tuple[str, ...]
    device: str
    notes: tuple[str, ...]
    failure: str = ""


@dataclass(frozen=True)
class Tried:
    """A reply, and the compile options without which the backend crashed; `crash` says how it did, or is ""."""

    reply: Reply
    options: Mapping[str, str]
    crash: str


class _CrashError(Exception):
    """The child died; `reply` is its result so far, or None."""

    def __init__(self, message: str, reply: Reply | None) -> None:
        super().__init__(message)
        self.reply = reply


def try_target(trial: Trial) -> Tried:
    """The reply of a child process that builds an artifact and opens it.

    Where the child crashes while it opens the artifact, it is tried again with each set of compile options that the
    target's row lists as a remedy.

    Raises:
        BuildError: the child crashed with each of them; names the target, the signal and the activity.
        NsmError: the error of the builder.
    """
    first: _CrashError | None = None
    failures: list[str] = []
    for options in (trial.options, *(item for item in trial.target.remedies if item != trial.options)):
        try:
            reply = _reply(replace(trial, options=options))
        except _CrashError as crash:
            first = first or crash
            if crash.reply is None:  # no compile option changes how the files are made
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
                f"This is a fault of the package {trial.target.installed()}. Build another target, try another version "
                "of the package, or change the model.",
            )
        )
    )


def try_opening(trial: Trial) -> None:
    """Raise `BuildError` where a child process crashes that opens an artifact."""
    try:
        _reply(trial)
    except _CrashError as crash:
        raise BuildError(
            f"The target {trial.target.name} crashed: {crash}. The artifact was opened where it was built, so the "
            f"package {trial.target.installed()} or the processor is another one here. Build it again on this machine: "
            f"nsm build BUNDLE --target {trial.target.name}"
        ) from crash


def shown_options(options: Mapping[str, str]) -> str:
    """Compile options for a message."""
    return ", ".join(f"{name}={value}" for name, value in options.items())


def _made(crash: _CrashError) -> Reply:
    assert crash.reply is not None
    return crash.reply


def _reply(trial: Trial) -> Reply:
    """Run the child once.

    Raises:
        _CrashError: it died.
        NsmError: the error of the builder.
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
        said = f" (it last wrote: {last[0][:300]})" if last else ""
        raise _CrashError(f"{_ended(code)} while {doing}{said}", reply)


def _run(place: Path) -> int:
    """The exit status of the child, negative for a signal. It ends with this process: its standard input ends then."""
    # -P: modules in the current folder are not imported by accident.
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
    """The error that the builder raised, of the same class."""
    kind = getattr(errors, data["error"], BuildError)
    error: NsmError = kind(data["message"])
    if isinstance(error, BuildError):
        error.log = None if data["log"] is None else Path(data["log"])
    if data["traceback"]:
        error.add_note(data["traceback"])
    return error
