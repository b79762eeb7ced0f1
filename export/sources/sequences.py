"""Reading the user's own sequences from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nsm.errors import InputError
from nsm.files import LIMITS, open_regular, read_npy, read_regular
from nsm.spec import StepSpec
from nsm.trace import Array, read_arrays

MOST_SEQUENCES = 1 << 20
"""That are read from a file."""


def sequence_axes(spec: StepSpec) -> int:
    """How many axes a sequence has that a model takes: 1 of ids, 2 of vectors."""
    return len(spec.entry("step").inputs[0].shape) - 1


def read_sequences(path: Path, count: int | None = None, axes: int = 1) -> list[Array]:
    """Sequences of tokens from a file.

    .npy: an array [N, T, *token], or one sequence [T, *token]: ids [T], vectors [T, input_dim].
    .npz: every array in it likewise.
    .txt: the bytes of the text as ids, cut into `count` (default 1) equal parts.

    How large they may be, an .npz also unpacked, is in `nsm.files.reading.LIMITS`.

    Args:
        count: at most so many sequences.
        axes: of one sequence, its tokens' included; see `sequence_axes`.

    Raises:
        InputError: no such file, another suffix, or nothing in it.
    """
    suffix = path.suffix.lower()
    if suffix not in (".npy", ".npz", ".txt"):
        raise InputError(f"{path}: sequences are read from .npy, .npz and .txt files; given {suffix or 'no suffix'}.")
    try:
        if suffix == ".txt":
            data = np.frombuffer(read_regular(path, "text"), np.uint8).astype(np.int64)
            parts = max(1, min(count or 1, len(data)))
            arrays = [data[: len(data) // parts * parts].reshape(parts, -1)]
        elif suffix == ".npy":
            arrays = [read_npy(path)]
        else:
            with open_regular(path, "arrays") as file:
                arrays = list(read_arrays(file, LIMITS["arrays"]).values())
    except Exception as error:  # on damaged files zipfile and numpy raise whatever they stumble over
        raise InputError(
            f"{path} cannot be read as sequences: {error}. Expected what numpy.save or numpy.savez writes, or text."
        ) from error
    sequences: list[Array] = []
    for array in arrays:
        if array.ndim < 1 or array.dtype.kind not in "iuf":
            raise InputError(
                f"{path} holds an array of shape {list(array.shape)} and dtype {array.dtype}; expected ids [N, T] "
                "or vectors [N, T, input_dim]."
            )
        if array.size == 0:
            continue
        if array.ndim not in (1, axes) and len(array) + len(sequences) > MOST_SEQUENCES:
            raise InputError(f"{path} holds more than {MOST_SEQUENCES:,} sequences. Cut it into several files.")
        rows = [array] if array.ndim in (1, axes) else list(array)
        sequences += [row for row in rows if row.ndim and len(row)]
    if not sequences:
        raise InputError(f"{path} holds no sequence of at least one token.")
    return sequences[:count]
