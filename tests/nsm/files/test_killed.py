"""What a process that is killed leaves behind, and what the next command makes of it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from nsm.bundle import Bundle
from nsm.errors import InputError, OutputExistsError
from nsm.files import partials
from nsm.files.partials import abandoned, locked, partial
from nsm.files.writing import replacing
from nsm.staging import staged, staged_copy, write_manifest
from tests.nsm.bundles import contents, fill, names

ROOT = Path(__file__).resolve().parents[3]

# A process that replaces a bundle, and is killed by itself: with the exchange of names at `_settle`, else between two
# renames. `argv`: the bundle, then which call of os.rename it dies before, 0 for none.
REPLACING = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from nsm import staging
from nsm.bundle import Bundle
from tests.nsm.bundles import fill

output, last, copy = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "copy"
rename, calls = os.rename, []

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def counted(source, target):
    calls.append(source)
    die() if len(calls) == last else rename(source, target)

with staging.staged_copy(output) if copy else staging.staged(output, force=True) as stage:
    if copy:
        staging.write_manifest(stage, replace(Bundle(stage).manifest, command="the new one"))
    else:
        fill(stage, "the new one")
    if last:
        staging.exchange = lambda first, second: False
        os.rename = counted
    else:
        staging._settle = die
"""


def killed(code: str, *arguments: object) -> None:
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=False, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("kind", ["copy", "new"])
@pytest.mark.parametrize("last", range(5))
def test_a_bundle_has_its_name_after_any_kill(made: Path, last: int, kind: str) -> None:
    if kind == "copy":
        (made / "notes.txt").write_text("mine")
    killed(REPLACING, made, last, kind)
    assert made.exists() == (last != 4), "without the exchange there is a gap"
    assert names(made.parent) != ["model.nsm"], "the killed process left something"
    bundle = Bundle(made)
    bundle.verify()
    assert bundle.manifest.command == ("nsm-export model.pt" if last else "the new one")
    with staged_copy(made) as stage:
        write_manifest(stage, bundle.manifest)
    assert names(made.parent) == ["model.nsm"]
    assert contents(made).get("notes.txt") == (b"mine" if kind == "copy" else None)


def test_an_export_finds_the_bundle_that_was_set_aside(made: Path) -> None:
    before = contents(made)
    killed(REPLACING, made, 4, "new")
    with pytest.raises(RuntimeError), staged(made, force=True):
        raise RuntimeError
    assert contents(made) == before
    assert names(made.parent) == ["model.nsm"]


def test_a_bundle_that_cannot_be_put_back_is_named(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(REPLACING, made, 4, "new")

    def refuse(source: Path, target: Path) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(
        InputError, match=r"left it as .*\.replaced, and it cannot .*Read-only.*Rename it to model\.nsm"
    ):
        Bundle(made)


def test_what_is_at_work_is_left_alone(made: Path) -> None:
    """Its folder is locked as long as its process lives; another's number or start tell nothing."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom nsm.files.partials import partial\n"
        "with partial(Path(sys.argv[1]), folder=True) as path:\n    print(path, flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(made)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        assert path.is_dir()
        with staged(made, force=True) as stage:
            fill(stage, "another command")
        assert path.is_dir()
        process.kill()
        process.wait(30)
    with partial(made, folder=True):
        assert not path.exists()
    assert names(made.parent) == ["model.nsm"]


def test_a_file_that_was_half_written_goes_with_the_next(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom nsm.files.writing import replacing\n"
        "with replacing(Path(sys.argv[1])) as file:\n    file.write(b'half')\n    file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed(code, tmp_path / "model.pt")
    (left,) = tmp_path.iterdir()
    assert left.read_bytes() == b"half"
    with replacing(tmp_path / "other.pt") as file:
        file.write(b"whole")
    assert left.exists(), "it is another file's"
    with replacing(tmp_path / "model.pt") as file:
        file.write(b"whole")
    assert names(tmp_path) == ["model.pt", "other.pt"]


def test_only_what_has_the_very_name_is_taken_for_abandoned(tmp_path: Path) -> None:
    place = tmp_path / "model.nsm"
    for name in (
        ".model.nsm.a_1.partial",
        ".model.nsm.failed.a_1.partial",
        "model.nsm.a.partial",
        ".model.nsm.partial",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / ".model.nsm.link.partial").symlink_to(tmp_path)
    with abandoned(place, "partial") as found:
        assert [path.name for path in found] == [".model.nsm.a_1.partial"]
        with abandoned(place, "partial") as again:
            assert again == [], "it is locked"
    with abandoned(tmp_path / "nowhere" / "model.nsm", "partial") as found:
        assert found == []


def test_a_folder_that_another_took_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    make = partials._make

    def raced(path: Path, folder: bool) -> None:
        made.append(path)
        make(path, folder)
        if len(made) == 1:
            path.rmdir()

    monkeypatch.setattr("nsm.files.partials._make", raced)
    with partial(tmp_path / "model.nsm", folder=True) as path:
        assert path == made[1]
        assert path.is_dir()
    assert names(tmp_path) == []


def test_without_locks_nothing_is_taken_for_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, operation: int) -> NoReturn:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (tmp_path / ".model.nsm.a.partial").mkdir()
    monkeypatch.setattr("fcntl.flock", refuse)
    with locked(tmp_path) as held:
        assert not held
    with staged(tmp_path / "model.nsm") as stage:
        fill(stage)
    assert names(tmp_path) == [".model.nsm.a.partial", "model.nsm"]


def test_of_two_exports_to_a_new_name_the_later_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one came in the moment before the rename."""
    output, move = tmp_path / "model.nsm", os.rename

    def raced(source: Path, target: Path) -> None:
        output.mkdir()
        (output / "theirs").touch()
        move(source, target)

    def export() -> None:
        with staged(output) as stage:
            fill(stage)
            monkeypatch.setattr(os, "rename", raced)

    with pytest.raises(OutputExistsError, match="came to be during the work"):
        export()
    assert contents(tmp_path) == {"model.nsm/theirs": b""}
