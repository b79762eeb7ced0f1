"""The output file of `nsm score`: one line of JSON per finished sequence; a second run continues it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from nsm.errors import InputError, OutputExistsError
from nsm.files import check_output_file, replacing

FORMAT, VERSION = "nsm-scores", 1
"""Identify the file in its first line."""

_LONGEST_HEAD = 1 << 16


class ScoreLog:
    """A file of JSON lines; the first identifies the model, target and precision.

    Args:
        path: the file, created if missing.
        head: fingerprint, target and precision, which must match to continue a file.
        force: discard existing scores.

    Raises:
        OutputExistsError: the file is not a score file; or it has scores of another model or target, or lines that
            cannot be read, and `force` is not set.
        InputError: the path is a folder or a pipe, or cannot be written.
    """

    def __init__(self, path: Path, head: dict[str, Any], force: bool = False) -> None:
        if path.is_dir():
            raise InputError(
                f"{path} is a folder; give a file to write the scores to, such as {path / 'scores.jsonl'}."
            )
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is not a regular file. Expected one, because the next run reads it again.")
        head = {"format": FORMAT, "version": VERSION, **head}
        self._failed: list[dict[str, Any]] = []  # sequences that earlier runs could not score
        self.done: dict[tuple[str, int, str], dict[str, Any]] = {}
        try:
            check_output_file(path, "a file of scores of this version", _is_log)
            fresh = force or not path.exists() or not path.stat().st_size
            kept = 0 if fresh else self._read(path, head)
            if fresh:
                with replacing(path) as file:
                    file.write(_line(head))
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
            if kept:
                os.ftruncate(self._file, kept)  # removes the partial last line of a killed run
        except OSError as error:
            raise InputError(
                f"{path} cannot be written: {error}. Create the folder first, or give another file."
            ) from error

    def add(self, line: dict[str, Any]) -> None:
        """Append the result of one sequence; the next run ignores a partial line after a crash."""
        if line not in self._failed:  # the same failure is already in the file
            self._append(line)
        self.done[line["file"], line["index"], line["sha256"]] = line

    def close(self) -> None:
        os.close(self._file)

    def _append(self, line: dict[str, Any]) -> None:
        os.write(self._file, _line(line))
        os.fsync(self._file)

    def _read(self, path: Path, head: dict[str, Any]) -> int:
        """Load the existing lines; return the number of bytes in complete lines."""
        data = path.read_bytes()
        data = data[: data.rfind(b"\n") + 1]
        try:
            first, *lines = [json.loads(line) for line in data.splitlines()]
            results = {(line["file"], line["index"], line["sha256"]): line for line in lines}
        except (ValueError, TypeError, KeyError) as error:
            raise OutputExistsError(
                f"{path} has lines that are not scores ({error}). Give another file, or --force to start over."
            ) from error
        if first != head:
            raise OutputExistsError(
                f"{path} has scores of {first}; expected {head}. Give another file, or --force to start over."
            )
        self.done = {key: line for key, line in results.items() if "error" not in line}  # failures are tried again
        self._failed = [line for line in lines if "error" in line]
        return len(data)


def _line(data: dict[str, Any]) -> bytes:
    return (json.dumps(data) + "\n").encode()


def _is_log(file: IO[bytes]) -> bool:
    first = file.readline(_LONGEST_HEAD)
    try:
        head = json.loads(first) if first.endswith(b"\n") else None
    except ValueError:
        return False
    return isinstance(head, dict) and (head.get("format"), head.get("version")) == (FORMAT, VERSION)
