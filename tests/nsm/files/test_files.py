"""nsm.files.writing: a file is written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from nsm.errors import InputError, OutputExistsError
from nsm.files.writing import check_output_file, followed, json_with, replacing, settled, write_json


def test_the_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("there", "wanted"), [(None, 0o640), (0o600, 0o600), (0o755, 0o755)])
def test_a_file_has_the_permissions_of_the_one_it_replaces_or_those_of_new_ones(
    there: int | None, wanted: int, tmp_path: Path
) -> None:
    path = tmp_path / "a.bin"
    if there is not None:
        path.write_bytes(b"old")
        path.chmod(there)
    before = os.umask(0o027)
    try:
        with replacing(path) as file:
            file.write(b"new")
        assert os.umask(0o027) == 0o027, "it is as it was"
    finally:
        os.umask(before)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == wanted


@pytest.mark.parametrize("there", [True, False], ids=["there", "not there"])
def test_a_link_stays_and_what_it_leads_to_is_replaced(there: bool, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    path, target = tmp_path / "a.bin", tmp_path / "deep" / "b.bin"
    path.symlink_to("deep/b.bin")
    if there:
        target.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
    assert path.is_symlink()
    assert target.read_bytes() == b"new"
    assert not target.is_symlink()
    assert sorted(tmp_path.rglob("*")) == [path, target.parent, target]


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.symlink_to("a.bin")
    with pytest.raises(InputError, match=r"a\.bin is a link that leads back to itself"), replacing(path):
        pass
    assert path.is_symlink()
    assert followed(tmp_path / "other") == tmp_path / "other"


def test_what_is_no_regular_file_is_written_to_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path, 0o600)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with replacing(path) as file:
            file.write(b"through the pipe")
        assert os.read(reader, 100) == b"through the pipe"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(path.lstat().st_mode)
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


# By its number: nothing can be put into that folder, whatever this code does, while /dev/stdout is a link like others.
@pytest.mark.parametrize("name", ["/dev/fd/1", "out.txt"])
def test_the_file_that_stdout_goes_to_gets_both(name: str, tmp_path: Path) -> None:
    code = f"""
import pathlib
from nsm.files.writing import replacing
print("before", flush=True)
with replacing(pathlib.Path({name!r})) as file: file.write(b"between\\n")
print("after")
"""
    with (tmp_path / "out.txt").open("wb") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, cwd=tmp_path, check=True)
    assert (tmp_path / "out.txt").read_text() == "before\nbetween\nafter\n"


def test_what_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write_half() -> None:
        with replacing(path) as file:
            file.write(b"ne")
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"a\.bin cannot be written: .*Make the folder first"),
        replacing(tmp_path / "no" / "a.bin"),
    ):
        pass


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder; expected the name of a file"), replacing(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("here", "given", "wanted"),
    [
        ("a/b", ".", "a/b"),
        ("a/b", "..", "a"),
        ("a/b", "../../a/b", "a/b"),
        ("a/b", "../b/../../other/..", "."),
        ("other", "../a/b/..", "a"),
    ],
)
def test_a_folder_without_a_name_or_around_the_current_one_is_absolute(
    here: str, given: str, wanted: str, tmp_path: Path
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    with contextlib.chdir(tmp_path / here):
        assert settled(Path(given)) == tmp_path.resolve() / wanted


def test_other_paths_stay_as_they_were_given(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with contextlib.chdir(tmp_path / "here"):
        paths = [Path("new.nsm"), Path("../other/m.nsm"), tmp_path / "m.nsm"]
        assert [settled(path) for path in paths] == paths
        shutil.rmtree(tmp_path / "here")
        assert [settled(path) for path in paths] == paths


def test_json_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "parity.json"
    write_json(path, {"passed": True, "text": "ü"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"passed": True, "text": "ü"}
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"error": float("nan")})

    def refuse(source: Path, target: Path) -> NoReturn:
        raise OSError(errno.EIO, "disk error")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk error"):
        write_json(path, {"passed": False})
    assert path.read_bytes() == before


# -- what may be overwritten ---------------------------------------------------------------------------------------


def test_only_what_is_known_is_overwritten(tmp_path: Path) -> None:
    path, is_one = tmp_path / "a.json", json_with("a", "b")
    check_output_file(path)
    path.touch()
    check_output_file(path)
    for text, wanted in (
        ('{"a": 1, "b": 2, "c": 3}', True),
        ('[{"a": 1, "b": 2}]', True),
        ('{"a": 1}', False),
        ("[]", False),
        ("[1]", False),
        ("no JSON", False),
        ("[" * 100_000, False),
    ):
        path.write_text(text)
        if wanted:
            check_output_file(path, "a table", is_one)
            with pytest.raises(OutputExistsError, match=r"a\.json exists\. Give --force"):
                check_output_file(path, "a table", is_one, force=False)
        else:
            with pytest.raises(
                OutputExistsError, match=r"a\.json exists and is not a table, so it is not replaced\. Move"
            ):
                check_output_file(path, "a table", is_one)
        with pytest.raises(OutputExistsError, match=r"a\.json exists\. Move it away"):
            check_output_file(path)


def test_a_pipe_and_what_stdout_goes_to_have_nothing_to_lose(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    check_output_file(tmp_path / "pipe")
    code = "import pathlib\nfrom nsm.files.writing import check_output_file\nprint(1, flush=True)\n"
    code += "check_output_file(pathlib.Path('/dev/stdout'))\ncheck_output_file(pathlib.Path('out.txt'))"
    with (tmp_path / "out.txt").open("wb") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, cwd=tmp_path, check=True)
