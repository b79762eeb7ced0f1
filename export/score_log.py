"""The results of `nsm score`: a line of JSON for each sequence, appended when it is done; a second run goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nsm.errors import InputError, OutputExistsError


class ScoreLog:
    """A file of lines; the first says what was scored with.

    Args:
        path: of the file; made where it is not there.
        head: what must be the same to go on: fingerprint, target, precision.
        force: start over, whatever is there.

    Raises:
        OutputExistsError: the file is of another model or target, or no such file, and `force` is not set.
    """

    def __init__(self, path: Path, head: dict[str, Any], force: bool = False) -> None:
        if path.is_dir():
            raise InputError(
                f"{path} is a folder; give a file to write the scores to, such as {path / 'scores.jsonl'}."
            )
        self._path = path
        self._failed: list[dict[str, Any]] = []  # what earlier runs could not score
        self.done: dict[tuple[str, int, str], dict[str, Any]] = {}
        kept = b"" if force or not path.exists() else self._read(path, head)
        try:
            # What a run that was killed left of its last line goes.
            with path.open("r+b" if kept else "wb") as file:
                file.truncate(len(kept))
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error}. Make the folder first, or take another.") from error
        if not kept:
            self._append(head)

    def add(self, line: dict[str, Any]) -> None:
        """Append what was found for one sequence; a crash leaves all of it or nothing that counts."""
        if line not in self._failed:  # what fails as it did before is there already
            self._append(line)
        self.done[line["file"], line["index"], line["sha256"]] = line

    def close(self) -> None:
        os.close(self._file)

    def _append(self, line: dict[str, Any]) -> None:
        os.write(self._file, (json.dumps(line) + "\n").encode())
        os.fsync(self._file)

    def _read(self, path: Path, head: dict[str, Any]) -> bytes:
        data = path.read_bytes()
        data = data[: data.rfind(b"\n") + 1]
        try:
            first, *lines = [json.loads(line) for line in data.splitlines()] or [head]
            results = {(line["file"], line["index"], line["sha256"]): line for line in lines}
        except (ValueError, TypeError, KeyError) as error:
            raise OutputExistsError(
                f"{path} exists and is no file of scores ({error}). Take another name, or give --force to replace it."
            ) from error
        if first != head:
            raise OutputExistsError(
                f"{path} has scores of {first}, not of {head}. Take another name, or give --force to start over."
            )
        self.done = {key: line for key, line in results.items() if "error" not in line}  # those are tried again
        self._failed = [line for line in lines if "error" in line]
        return data
