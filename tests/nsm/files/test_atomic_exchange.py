"""Two folders take each other's names, in one step or not at all."""

from __future__ import annotations

import ctypes
import errno
from pathlib import Path
from types import SimpleNamespace

import pytest

from nsm.files import atomic_exchange as module
from nsm.files.atomic_exchange import exchange


def _pair(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        path.mkdir()
        (path / path.name).touch()
    return first, second


def test_two_folders_exchange_their_names(tmp_path: Path) -> None:
    first, second = _pair(tmp_path)
    if not exchange(first, second):
        pytest.skip(f"the file system of {tmp_path} has no exchange of names")
    assert [path.name for path in (*first.iterdir(), *second.iterdir())] == ["second", "first"]


def test_a_refusal_is_an_error(tmp_path: Path) -> None:
    first, second = _pair(tmp_path)
    (second / "second").unlink()
    second.rmdir()
    with pytest.raises(FileNotFoundError, match=r"first' -> '.*second"):
        exchange(first, second)
    assert (first / "first").exists()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP])
def test_where_the_file_system_cannot_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_arguments: object) -> int:
        ctypes.set_errno(code)
        return -1

    first, second = _pair(tmp_path)
    monkeypatch.setattr(module, "_LIBRARY", SimpleNamespace(renameat2=refuse))
    assert not exchange(first, second)
    monkeypatch.setattr(module, "_LIBRARY", SimpleNamespace())
    assert not exchange(first, second), "the C library has no such function"
    assert (first / "first").exists()
