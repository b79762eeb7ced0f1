"""A bundle is written all or nothing, and changed as a whole."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from nsm.bundle import GOLDEN, STATE_INIT, Bundle
from nsm.errors import (
    BundleDamagedError,
    InputError,
    NsmError,
    OutputExistsError,
    ParityError,
)
from nsm.files.writing import write_json
from nsm.manifest import MANIFEST
from nsm.staging import staged, staged_copy, write_manifest
from tests.nsm.bundles import OWN, contents, edit, fill, names

# -- writing all or nothing ---------------------------------------------------------------------------------------


def test_a_stage_takes_the_name_at_the_end_only(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "er" / "model.nsm"
    with staged(output) as stage:
        assert stage.parent == output.parent
        assert not output.exists()
        fill(stage)
    assert names(output.parent) == ["model.nsm"]
    Bundle(output).verify()


def test_a_bundle_can_be_read_by_others(made: Path) -> None:
    for path in (made, *made.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644)


def test_new_files_have_the_permissions_of_new_files_and_others_keep_theirs(tmp_path: Path) -> None:
    output, private = tmp_path / "model.nsm", ("openvino", "openvino/step.xml")
    before = os.umask(0o027)
    try:
        with staged(output) as stage:
            manifest = fill(stage)
            (stage / "graphs" / "tool").write_text("#!/bin/sh")
            (stage / "graphs" / "tool").chmod(0o700)
            write_manifest(stage, manifest)
        modes = {path.relative_to(output).as_posix(): path.stat().st_mode & 0o777 for path in output.rglob("*")}
        assert modes == {name: 0o750 if name in ("graphs", "openvino", "graphs/tool") else 0o640 for name in modes}
        output.chmod(0o700)
        for name in private:
            (output / name).chmod(0o700)
        with staged(output, force=True) as stage:
            fill(stage)
    finally:
        os.umask(before)
    for path in (output, *(output / name for name in private)):
        assert path.stat().st_mode & 0o777 == 0o700
    assert (output / OWN[1]).stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, InputError, SystemExit])
@pytest.mark.parametrize("there", [False, True], ids=["new", "over another"])
def test_a_crash_inside_leaves_nothing_behind(tmp_path: Path, error: type[BaseException], there: bool) -> None:
    output = tmp_path / "model.nsm"
    if there:
        with staged(output) as stage:
            fill(stage)
    before = contents(tmp_path)

    def crash() -> NoReturn:
        with staged(output, force=there) as stage:
            fill(stage, "another")
            raise error("a crash")

    with pytest.raises(error):
        crash()
    assert contents(tmp_path) == before
    assert names(tmp_path) == (["model.nsm"] if there else [])


@pytest.mark.parametrize("method", ["os.fdopen", "pathlib.Path.write_bytes", "pathlib.Path.mkdir"])
@pytest.mark.parametrize("there", [False, True], ids=["new", "over another"])
def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, there: bool
) -> None:
    output = tmp_path / "out" / "model.nsm"
    output.parent.mkdir()
    if there:
        with staged(output) as stage:
            fill(stage)
    before = contents(tmp_path)

    def full(*args: object, **kwargs: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def export() -> None:
        with staged(output, force=there) as stage:
            monkeypatch.setattr(method, full)
            fill(stage)

    with pytest.raises((OSError, NsmError), match="No space left on device"):
        export()
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert names(output.parent) == (["model.nsm"] if there else [])


def test_what_exists_is_not_replaced_without_force(made: Path) -> None:
    before = contents(made)
    entered = False
    with pytest.raises(OutputExistsError, match=r"model\.nsm exists\. Give --force to replace it"), staged(made):
        entered = True
    assert not entered
    assert contents(made) == before
    assert names(made.parent) == ["model.nsm"]


def test_with_force_the_old_bundle_stays_until_the_new_one_is_complete(made: Path) -> None:
    before = contents(made)
    with staged(made, force=True) as stage:
        fill(stage, "another command")
        assert contents(made) == before
    bundle = Bundle(made)
    bundle.verify()
    assert bundle.manifest.command == "another command"
    assert names(made.parent) == ["model.nsm"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["file", "directory", "empty directory"])
def test_what_is_no_bundle_is_never_replaced(tmp_path: Path, force: bool, kind: str) -> None:
    output = tmp_path / "thesis"
    if kind == "file":
        output.write_text("years of work")
    else:
        output.mkdir()
    if kind == "directory":
        (output / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    entered = False
    with pytest.raises(OutputExistsError, match="exists"), staged(output, force):
        entered = True
    assert not entered
    assert output.exists()
    assert contents(tmp_path) == before
    if force:
        with (
            pytest.raises(
                OutputExistsError, match=r"thesis exists and is not a bundle, so it is not replaced\. Move it"
            ),
            staged(output, True),
        ):
            pass


def test_a_folder_with_the_manifest_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    """A web app has a manifest.json too."""
    output = tmp_path / "site"
    output.mkdir()
    for manifest in ('{"name": "My shop", "icons": []}', "[]", "not JSON", '{"format_version": 1}'):
        (output / "manifest.json").write_text(manifest)
        (output / "index.html").write_text("years of work")
        before = contents(tmp_path)
        with (
            pytest.raises(OutputExistsError, match=r"cannot be read as a bundle, so it is not replaced\. Move it away"),
            staged(output, force=True),
        ):
            pass
        assert contents(tmp_path) == before


def test_a_bundle_of_another_version_is_not_replaced(made: Path) -> None:
    """Which of its files are its own, this version cannot tell."""
    edit(made, lambda data: data.update(format_version=99))
    before = contents(made)
    with pytest.raises(OutputExistsError, match="has format version 99"), staged(made, force=True):
        pass
    assert contents(made) == before


@pytest.mark.parametrize("suffix", ["", ".failed"], ids=["the bundle", "a failed one"])
def test_files_in_a_bundle_that_are_not_of_it_stop_an_export(made: Path, suffix: str) -> None:
    path = made.with_name(made.name + suffix)
    if suffix:
        shutil.copytree(made, path)
    others = [path / name for name in ("notes.txt", "openvino/tuned.xml", "plots/a.png", "plots/b/c.png", "z.txt")]
    for other in others:
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_text("mine")
    (path / "empty").mkdir()
    before = contents(made.parent)
    message = (
        r"not of the bundle, so it is not replaced.*: notes\.txt, openvino/tuned\.xml, plots and 1 more\. Move them"
    )
    with pytest.raises(OutputExistsError, match=message), staged(made, force=True):
        pass
    assert contents(made.parent) == before
    for other in others:
        other.unlink()
    with staged(made, force=True) as stage:
        fill(stage, "another command")
    assert Bundle(made).manifest.command == "another command"


def test_a_file_that_came_into_a_bundle_during_the_work_stops_the_export(made: Path) -> None:
    def export() -> None:
        with staged(made, force=True) as stage:
            fill(stage, "another command")
            (made / "notes.txt").write_text("mine")

    with pytest.raises(OutputExistsError, match=r"notes\.txt"):
        export()
    assert (made / "notes.txt").read_text() == "mine"
    assert names(made.parent) == ["model.nsm"]


@pytest.mark.parametrize("force", [False, True])
def test_what_came_to_be_during_the_work_is_not_replaced_either(tmp_path: Path, force: bool) -> None:
    output = tmp_path / "thesis"

    def export() -> None:
        with staged(output, force) as stage:
            fill(stage)
            output.mkdir()
            (output / "thesis.tex").write_text("years of work")

    with pytest.raises(OutputExistsError, match="exists"):
        export()
    assert contents(tmp_path) == {"thesis/thesis.tex": b"years of work"}
    assert names(tmp_path) == ["thesis"]


def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsm.staging.exchange", lambda _first, _second: False)


@pytest.mark.parametrize("failing", range(1, 5))
def test_the_old_bundle_comes_back_if_the_new_one_cannot_be_put_in_place(
    made: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    before, move, calls = contents(made), os.rename, []

    def refuse(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == failing:
            raise OSError(errno.EIO, "disk error")
        move(source, target)

    def export() -> None:
        with staged(made, force=True) as stage:
            fill(stage, "another command")
            monkeypatch.setattr(os, "rename", refuse)

    no_exchange(monkeypatch)
    with pytest.raises(OSError, match="disk error"):
        export()
    assert contents(made) == before
    assert names(made.parent) == ["model.nsm"]


def test_a_link_to_a_bundle_is_replaced_and_leaves_nothing_behind(made: Path, tmp_path: Path) -> None:
    before = contents(made)
    link = tmp_path / "links" / "model.nsm"
    link.parent.mkdir()
    link.symlink_to(made, target_is_directory=True)
    with staged(link, force=True) as stage:
        fill(stage, "another command")
    assert Bundle(link).manifest.command == "another command"
    assert names(link.parent) == ["model.nsm"]
    assert contents(made) in (before, contents(link))


@pytest.mark.parametrize("there", [True, False], ids=["there", "not there"])
def test_the_work_is_done_where_a_link_leads(tmp_path: Path, there: bool) -> None:
    """It may be another file system, and nothing can be renamed from one to another."""
    link, target = tmp_path / "here" / "link.nsm", tmp_path / "there" / "model.nsm"
    for path in (link, target):
        path.parent.mkdir()
    link.symlink_to(target, target_is_directory=True)
    if there:
        with staged(target) as stage:
            fill(stage)
    with staged(link, force=there) as stage:
        assert stage.parent == target.parent
        fill(stage, "through the link")
    assert Bundle(target).manifest.command == "through the link"
    with pytest.raises(ParityError, match=f"kept as {target}.failed"):
        fail(link, "too far off", force=True)
    assert (names(link.parent), names(target.parent)) == (["link.nsm"], ["model.nsm", "model.nsm.failed"])


def test_an_output_that_links_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.nsm").symlink_to("model.nsm")
    with pytest.raises(InputError, match="leads back to itself"), staged(tmp_path / "model.nsm", force=True):
        pass


@pytest.mark.parametrize(("inside", "given"), [(".", "."), ("graphs", ".."), ("graphs", "../../model.nsm")])
def test_a_bundle_is_replaced_from_within(made: Path, inside: str, given: str) -> None:
    with contextlib.chdir(made / inside), staged(Path(given), force=True) as stage:
        fill(stage, "another command")
    assert Bundle(made).manifest.command == "another command"
    assert names(made.parent) == ["model.nsm"]
    with contextlib.chdir(made / inside), pytest.raises(ParityError, match=f"kept as {made}.failed"):
        fail(Path(given), "a third command", force=True)
    assert names(made.parent) == ["model.nsm", "model.nsm.failed"]


@pytest.mark.parametrize("given", [".", "..", "deep/.."])
def test_a_folder_that_is_no_bundle_is_not_replaced_from_within(tmp_path: Path, given: str) -> None:
    (tmp_path / "work" / "deep").mkdir(parents=True)
    for force in (False, True):
        with (
            contextlib.chdir(tmp_path / "work"),
            pytest.raises(OutputExistsError, match="is not a bundle"),
            staged(Path(given), force),
        ):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["work", "deep"]


def test_an_output_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    for output in (tmp_path / "file" / "model.nsm", Path("/proc/nothing/model.nsm")):
        with pytest.raises(InputError, match=r"model\.nsm cannot be written"), staged(output):
            pass
    assert names(tmp_path) == ["file"]


def test_a_directory_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("os.mkdir", refuse)
    with pytest.raises(InputError, match=r"model\.nsm cannot be written: .*Permission denied") as caught:
        staged(tmp_path / "model.nsm").__enter__()
    assert caught.value.exit_code == 2


# -- failed parity ------------------------------------------------------------------------------------------------


def fail(output: Path, command: str, force: bool = False) -> None:
    with staged(output, force) as stage:
        fill(stage, command)
        raise ParityError("too far off")


def test_a_bundle_that_failed_parity_is_kept_aside(tmp_path: Path) -> None:
    output, aside = tmp_path / "model.nsm", tmp_path / "model.nsm.failed"
    for command in ("first", "second"):
        with pytest.raises(ParityError, match=r"too far off.*kept as .*model\.nsm\.failed"):
            fail(output, command)
        assert names(tmp_path) == ["model.nsm.failed"]
        bundle = Bundle(aside)
        bundle.verify()
        assert bundle.manifest.command == command


def test_failed_parity_leaves_the_old_bundle_in_place(made: Path) -> None:
    before = contents(made)
    with pytest.raises(ParityError):
        fail(made, "another command", force=True)
    assert contents(made) == before
    assert names(made.parent) == ["model.nsm", "model.nsm.failed"]


def test_what_failed_can_be_read_by_others_too(tmp_path: Path) -> None:
    with pytest.raises(ParityError):
        fail(tmp_path / "model.nsm", "first")
    aside = tmp_path / "model.nsm.failed"
    for path in (aside, *aside.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644)


# -- a process that is killed -------------------------------------------------------------------------------------

KILLED = """
import sys, time
from pathlib import Path
from nsm.staging import staged
with staged(Path(sys.argv[1]), force=True) as stage:
    (stage / "manifest.json").write_text("{}")
    (stage / "graphs").mkdir()
    (stage / "graphs" / "step.onnx").write_bytes(b"half of")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("there", [False, True], ids=["new", "over another"])
def test_a_killed_process_leaves_nothing_under_the_name(tmp_path: Path, there: bool) -> None:
    output = tmp_path / "model.nsm"
    if there:
        with staged(output) as stage:
            fill(stage)
    before = contents(output)
    with subprocess.Popen([sys.executable, "-c", KILLED, str(output)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
        assert process.wait(30) == -signal.SIGKILL
    assert output.exists() == there
    assert contents(output) == before
    if not there:
        with pytest.raises(InputError, match="There is no bundle"):
            Bundle(output)
    with staged(output, force=there) as stage:
        fill(stage, "the next try")
    bundle = Bundle(output)
    bundle.verify()
    assert bundle.manifest.command == "the next try"
    assert names(tmp_path) == ["model.nsm"]


# -- changing a bundle --------------------------------------------------------------------------------------------


def add(stage: Path) -> None:
    """As a build does it: new files, replaced files, a new manifest."""
    manifest = Bundle(stage).manifest
    (stage / "tensorrt").mkdir()
    (stage / "tensorrt" / "step.engine").write_bytes(b"engine")
    write_json(stage / "parity.json", {"passed": False})
    write_manifest(stage, replace(manifest, command="changed"))


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_copy_takes_the_bundles_place(made: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:

        def refuse(source: str, target: str) -> NoReturn:
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", refuse)
    before = contents(made)
    with staged_copy(made) as stage:
        assert contents(stage) == before
        add(stage)
        assert contents(made) == before
    bundle = Bundle(made)
    bundle.verify()
    assert bundle.manifest.command == "changed"
    assert (made / "tensorrt" / "step.engine").read_bytes() == b"engine"
    assert {name: contents(made)[name] for name in OWN} == {name: before[name] for name in OWN}
    assert names(made.parent) == ["model.nsm"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_crash_while_a_copy_is_changed_leaves_the_bundle_alone(made: Path, error: type[BaseException]) -> None:
    before = contents(made)

    def crash() -> NoReturn:
        with staged_copy(made) as stage:
            add(stage)
            raise error

    with pytest.raises(error):
        crash()
    assert contents(made) == before
    assert names(made.parent) == ["model.nsm"]
    Bundle(made).verify()


def test_a_copy_that_failed_parity_is_kept_aside_and_the_bundle_stays(made: Path) -> None:
    before = contents(made)

    def change() -> NoReturn:
        with staged_copy(made) as stage:
            add(stage)
            raise ParityError("too far off")

    with pytest.raises(ParityError):
        change()
    assert contents(made) == before
    assert Bundle(made.with_name("model.nsm.failed")).manifest.command == "changed"


def test_a_copy_has_the_recorded_files_alone_and_touches_nothing_behind_a_link(made: Path, tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    (private / "key").write_text("secret")
    (private / "key").chmod(0o600)
    recorded = contents(made)
    (made / "graphs" / "more").symlink_to(private, target_is_directory=True)
    (made / "graphs" / "key").symlink_to(private / "key")
    (made / "graphs" / ".#step.onnx").symlink_to("user@host.1234")  # as an editor marks what it has open
    (made / "notes.txt").write_text("mine")
    (made / "notes").symlink_to(private, target_is_directory=True)
    with staged_copy(made) as stage:
        assert contents(stage) == recorded
        assert not [path for path in stage.rglob("*") if path.is_symlink()]
        add(stage)
        (stage / "graphs" / "new").symlink_to(private / "key")
        write_manifest(stage, Bundle(stage).manifest)
    bundle = Bundle(made)
    bundle.verify()
    assert set(bundle.recorded()) == set(recorded) - {MANIFEST}
    assert names(made / "graphs") == [".#step.onnx", "key", "more", "new", "step.onnx", "weights.bin"]
    assert (made / "notes.txt").read_text() == "mine"
    assert all(path.is_symlink() for path in (made / "notes", made / "graphs" / "more", made / "graphs" / "key"))
    assert (private.stat().st_mode & 0o777, (private / "key").stat().st_mode & 0o777) == (0o700, 0o600)
    assert (private / "key").stat().st_nlink == 1


def test_a_file_that_has_another_name_elsewhere_keeps_its_permissions(made: Path, tmp_path: Path) -> None:
    shared, weights = tmp_path / "shared.bin", made / "graphs" / "weights.bin"
    os.link(weights, shared)
    shared.chmod(0o600)
    with staged_copy(made) as stage:
        add(stage)
    assert shared.stat().st_mode & 0o777 == 0o600
    assert weights.read_bytes() == shared.read_bytes()


def test_what_a_link_inside_leads_to_becomes_the_file(made: Path) -> None:
    weights = made / "graphs" / "weights.bin"
    weights.rename(made / "graphs" / "real.bin")
    weights.symlink_to("real.bin")
    with staged_copy(made):
        pass
    assert not weights.is_symlink()
    Bundle(made).verify()


def test_what_is_not_of_the_bundle_stays_in_it(made: Path) -> None:
    (made / "openvino" / "tuning").mkdir()
    for name in ("notes.txt", "graphs/drawing.svg", "openvino/tuning/log.txt", "tensorrt.txt"):
        (made / name).write_text(f"my {name}")
    before = contents(made)
    with staged_copy(made) as stage:
        add(stage)
    after = contents(made)
    assert {name: after[name] for name in before if b"my " in before[name]} == {
        name: f"my {name}".encode()
        for name in ("notes.txt", "graphs/drawing.svg", "openvino/tuning/log.txt", "tensorrt.txt")
    }
    assert names(made.parent) == ["model.nsm"]
    Bundle(made).verify()


def test_what_is_not_of_the_bundle_is_not_overwritten_by_a_change(made: Path) -> None:
    (made / "tensorrt").mkdir()
    (made / "tensorrt" / "step.engine").write_text("the only one that works")
    before = contents(made)

    def change() -> None:
        with staged_copy(made) as stage:
            add(stage)

    with pytest.raises(
        OutputExistsError, match=r"not of the bundle where new ones would go: tensorrt\. Move them away"
    ):
        change()
    assert contents(made) == before
    assert names(made.parent) == ["model.nsm"]


def test_a_bundle_that_lacks_a_file_is_not_copied(made: Path) -> None:
    (made / OWN[0]).unlink()
    with pytest.raises(BundleDamagedError, match=r"openvino/step\.xml is missing"), staged_copy(made):
        pass
    assert names(made.parent) == ["model.nsm"]


@pytest.mark.parametrize("removed", [False, True], ids=["changed", "removed"])
def test_of_two_commands_on_one_bundle_the_later_is_refused(made: Path, removed: bool) -> None:
    def slow() -> None:
        with staged_copy(made) as stage:
            add(stage)
            with staged_copy(made) as quick:
                manifest = Bundle(quick).manifest
                write_manifest(quick, replace(manifest, command="the quick one"))
            if removed:
                shutil.rmtree(made)

    with pytest.raises(OutputExistsError, match=r"model\.nsm was changed by another command .*Start this one again"):
        slow()
    assert names(made.parent) == ([] if removed else ["model.nsm"])
    if not removed:
        bundle = Bundle(made)
        bundle.verify()
        assert bundle.manifest.command == "the quick one"


def test_only_a_bundle_is_copied(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    with pytest.raises(BundleDamagedError, match="not a bundle"), staged_copy(tmp_path / "thesis"):
        pass
    assert names(tmp_path) == ["thesis"]


def test_the_manifest_lists_the_files_that_are_there(tmp_path: Path) -> None:
    manifest = fill(tmp_path)
    (tmp_path / "graphs" / "deep").mkdir()
    (tmp_path / "graphs" / "deep" / "decode.onnx").write_bytes(b"x")
    (tmp_path / "parity.json").unlink()
    write_manifest(tmp_path, manifest)
    listed = [record.path for record in Bundle(tmp_path).manifest.files]
    assert listed == ["graphs/deep/decode.onnx", "graphs/step.onnx", "graphs/weights.bin", STATE_INIT, GOLDEN]
    Bundle(tmp_path).verify()
