"""The child process of `isolation`: python -m nsm.export.verify.trial FOLDER builds and opens an artifact."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from nsm.bundle import STATE_INIT
from nsm.decode import decode
from nsm.errors import BuildError, NsmError
from nsm.export.builders import Built, Request
from nsm.export.verify.isolation import REPLY, REQUEST, STAGE, Reply, Trial
from nsm.files import json_bytes, write_json
from nsm.runtimes.opening import entry_files, loader
from nsm.spec import TensorSpec
from nsm.trace import Array, load_arrays


def main(folder: str) -> None:
    """Read FOLDER/request.json, build and open the artifact, and write FOLDER/reply.json."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    place = Path(folder)
    trial = decode(Trial, json.loads(json_bytes(place / REQUEST)), REQUEST)

    def stage(doing: str) -> None:
        (place / STAGE).write_text(doing, "utf-8")

    try:
        stage("building it")
        built = Built(trial.files, trial.device or "") if trial.files else build(trial)
    except Exception as error:  # report any error of the builder, a bug included, to the parent
        write_json(place / REPLY, told(trial, error))
        return
    reply = Reply(built.files, built.device, built.notes)
    write_json(place / REPLY, asdict(reply))
    try:
        for threads in trial.threads:
            _open(trial, built, threads, stage)
    except Exception as error:  # the parent opens the artifact again and raises the error
        reply = replace(reply, failure=f"{type(error).__name__}: {error}")
    write_json(place / REPLY, asdict(reply))


def told(trial: Trial, error: Exception) -> dict[str, str | None]:
    """Return an error of the builder as JSON, for the parent to raise."""
    if isinstance(error, NsmError):
        log = error.log if isinstance(error, BuildError) else None
        name, log_name = type(error).__name__, None if log is None else str(log)
        return {"error": name, "message": str(error), "log": log_name, "traceback": None}
    message = f"The builder of {trial.target.name} failed: {type(error).__name__}: {error}"
    return {"error": "BuildError", "message": message, "log": None, "traceback": traceback.format_exc()}


def _end_with_parent() -> None:
    """Exit when standard input closes, which happens when the parent exits."""
    os.read(0, 1)  # not sys.stdin: its lock breaks the interpreter's shutdown
    os._exit(1)


def build(trial: Trial) -> Built:
    """Build the files of the artifact, in this process."""
    low = None if trial.low is None else Path(trial.low)
    request = Request(Path(trial.directory), Path(trial.folder), trial.spec, trial.device, low)
    built: Built = trial.target.builder_module().build(request)
    return built


def _open(trial: Trial, built: Built, threads: int | None, stage: Callable[[str], None]) -> None:
    """Open every entry and run it once, from the initial state."""
    directory = Path(trial.directory)
    recorded = entry_files(trial.target, trial.spec, built.files, directory)
    files = {entry: directory / path for entry, path in recorded.items()}
    load = loader(trial.target, trial.options)
    initial = load_arrays(directory / STATE_INIT)
    stage("opening it")
    runtime = load(files, trial.spec, built.device.lower(), threads, trial.precision)
    state = runtime.load_state(initial)
    for entry in trial.spec.entries:
        stage(f"opening and running {entry.name}")
        _, state = runtime.call(entry.name, {item.name: _lowest(item) for item in entry.inputs}, state)
    stage("closing it")
    runtime.close()


def _lowest(item: TensorSpec) -> Array:
    """Return a valid input: the lowest id, or zeros."""
    return np.full(item.shape, item.minimum or 0, item.numpy_dtype)


if __name__ == "__main__":
    main(sys.argv[1])
