"""Reading the user's own sequences from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nsm.errors import InputError
from nsm.trace import Array


def read_sequences(path: Path, count: int | None = None) -> list[Array]:
    """Sequences of tokens from a file.

    .npy: an array [N, T] of ids or [N, T, input_dim] of vectors; [T] is one sequence.
    .npz: every array in it likewise.
    .txt: the bytes of the text as ids, cut into `count` (default 1) equal parts.

    Args:
        count: at most so many sequences.

    Raises:
        InputError: no such file, another suffix, or nothing in it.
    """
    suffix = path.suffix.lower()
    if suffix not in (".npy", ".npz", ".txt"):
        raise InputError(f"{path}: sequences are read from .npy, .npz and .txt files; given {suffix or 'no suffix'}.")
    try:
        if suffix == ".txt":
            data = np.frombuffer(path.read_bytes(), np.uint8).astype(np.int64)
            parts = max(1, min(count or 1, len(data)))
            arrays = [data[: len(data) // parts * parts].reshape(parts, -1)]
        elif suffix == ".npy":
            with path.open("rb") as file:
                arrays = [np.lib.format.read_array(file, allow_pickle=False)]
        else:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = [archive[name] for name in archive.files]
    except Exception as error:  # on damaged files zipfile and numpy raise whatever they stumble over
        raise InputError(f"{path} cannot be read as sequences: {error}") from error
    sequences: list[Array] = []
    for array in arrays:
        if array.ndim < 1 or array.dtype.kind not in "iuf":
            raise InputError(
                f"{path} holds an array of shape {list(array.shape)} and dtype {array.dtype}; expected are ids [N, T] "
                "or vectors [N, T, input_dim]."
            )
        rows = [array] if array.ndim == 1 else list(array)
        sequences += [row for row in rows if row.ndim and len(row)]
    if not sequences:
        raise InputError(f"{path} holds no sequence of at least one token.")
    return sequences[:count]
