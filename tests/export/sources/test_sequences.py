from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nsm.errors import InputError
from nsm.export.sources import sequences
from nsm.export.sources.sequences import read_sequences
from nsm.files.reading import LIMITS

# -- what is read ----------------------------------------------------------------------------------------------------


def test_rows_of_an_npy_are_sequences(tmp_path: Path) -> None:
    ids = np.arange(12).reshape(3, 4)
    np.save(tmp_path / "ids.npy", ids)
    read = read_sequences(tmp_path / "ids.npy")
    assert len(read) == 3
    np.testing.assert_array_equal(np.stack(read), ids)


def test_one_row_is_one_sequence(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(5))
    (read,) = read_sequences(tmp_path / "ids.npy")
    np.testing.assert_array_equal(read, np.arange(5))


def test_vectors_keep_their_width_and_dtype(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((2, 7, 3)).astype(np.float32)
    np.save(tmp_path / "vectors.npy", vectors)
    read = read_sequences(tmp_path / "vectors.npy")
    assert [item.shape for item in read] == [(7, 3)] * 2
    assert all(item.dtype == np.float32 for item in read)
    np.testing.assert_array_equal(np.stack(read), vectors)


def test_one_sequence_of_vectors_is_one_where_vectors_are_taken(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
    np.savez(tmp_path / "frames.npz", one=frames, two=np.stack([frames, frames]))
    read = read_sequences(tmp_path / "frames.npz", axes=2)
    assert [item.shape for item in read] == [(7, 3)] * 3


def test_every_array_of_an_npz_counts_and_lengths_may_differ(tmp_path: Path) -> None:
    np.savez(tmp_path / "ids.npz", a=np.arange(4), b=np.arange(6).reshape(2, 3))
    read = read_sequences(tmp_path / "ids.npz")
    assert [item.tolist() for item in read] == [[0, 1, 2, 3], [0, 1, 2], [3, 4, 5]]


def test_at_most_count_sequences(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(12).reshape(4, 3))
    assert [item.tolist() for item in read_sequences(tmp_path / "ids.npy", 2)] == [[0, 1, 2], [3, 4, 5]]
    assert len(read_sequences(tmp_path / "ids.npy", 9)) == 4


@pytest.mark.parametrize(
    ("count", "wanted"),
    [(None, ["abcdefg"]), (1, ["abcdefg"]), (2, ["abc", "def"]), (7, list("abcdefg")), (50, list("abcdefg"))],
)
def test_text_is_its_bytes_in_equal_parts(tmp_path: Path, count: int | None, wanted: list[str]) -> None:
    (tmp_path / "TEXT.TXT").write_text("abcdefg", encoding="utf-8")
    read = read_sequences(tmp_path / "TEXT.TXT", count)
    assert [bytes(item.tolist()).decode() for item in read] == wanted
    assert all(item.dtype == np.int64 for item in read)


def test_empty_rows_are_left_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "ids.npz", a=np.empty((3, 0), np.int64), b=np.arange(2))
    assert [item.tolist() for item in read_sequences(tmp_path / "ids.npz")] == [[0, 1]]


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ids.csv", "ids.pt", "ids"])
def test_other_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("1,2,3")
    with pytest.raises(InputError, match=r"read from \.npy, \.npz and \.txt files; given (\.csv|\.pt|no suffix)"):
        read_sequences(tmp_path / name)


def _absent(path: Path) -> None:
    path.unlink(missing_ok=True)


def _rubbish(path: Path) -> None:
    path.write_bytes(b"\x00rubbish" * 20)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _objects(path: Path) -> None:
    np.save(path, np.array([[1, 2], [3]], dtype=object), allow_pickle=True)


def _pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps([1, 2, 3]))


def _truncated_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.arange(1000))
    path.write_bytes(path.read_bytes()[:-60])


def _npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.arange(8))


def _npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.arange(8))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("absent.npy", _absent),
        ("absent.npz", _absent),
        ("absent.txt", _absent),
        ("rubbish.npy", _rubbish),
        ("rubbish.npz", _rubbish),
        ("empty.npy", _empty),
        ("empty.npz", _empty),
        ("objects.npy", _objects),
        ("pickled.npy", _pickled),
        ("truncated.npz", _truncated_npz),
        ("an npz by content.npy", _npz),
        ("an npy by content.npz", _npy),
    ],
)
def test_a_file_that_is_not_what_its_suffix_says_is_refused(
    tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    write(tmp_path / name)
    with pytest.raises(InputError, match=f"{name} cannot be read as sequences"):
        read_sequences(tmp_path / name)


def test_a_compressed_file_is_read_and_one_that_would_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.zeros((10, 10_000), np.int64)
    np.savez_compressed(tmp_path / "ids.npz", a=ids)
    assert (tmp_path / "ids.npz").stat().st_size < ids.nbytes / 100
    np.testing.assert_array_equal(np.stack(read_sequences(tmp_path / "ids.npz")), ids)
    monkeypatch.setattr(sequences, "LIMITS", {**LIMITS, "arrays": ids.nbytes // 2})
    with pytest.raises(InputError, match=r"declares 800,\d+ bytes; expected at most 400,000"):
        read_sequences(tmp_path / "ids.npz")


@pytest.mark.parametrize(
    "array", [np.array(3), np.array([["a", "b"]]), np.ones((2, 3), bool), np.ones((2, 3), np.complex64)]
)
def test_arrays_that_are_no_tokens_are_refused(tmp_path: Path, array: np.ndarray[Any, Any]) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(InputError, match=r"x\.npy holds an array of shape .* and dtype .*expected ids \[N, T\]"):
        read_sequences(tmp_path / "x.npy")


@pytest.mark.parametrize("name", ["none.npy", "none.npz", "none.txt"])
def test_a_file_without_a_token_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".npy":
        np.save(path, np.empty((4, 0), np.int64))
    elif path.suffix == ".npz":
        np.savez(path)
    else:
        path.write_text("")
    with pytest.raises(InputError, match="holds no sequence of at least one token"):
        read_sequences(path)
