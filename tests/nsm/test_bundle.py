from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from nsm.bundle import (
    FORMAT_VERSION,
    GOLDEN,
    MANIFEST,
    STATE_INIT,
    Artifact,
    Bundle,
    FileRecord,
    Manifest,
    file_record,
    sha256,
    staged,
    staged_copy,
    write_json,
    write_manifest,
)
from nsm.errors import (
    BundleDamagedError,
    BundleError,
    BundleVersionError,
    InputError,
    NsmError,
    OutputExistsError,
    ParityError,
)
from tests.runtimes.fake import FINGERPRINT, assert_same, fake_initial, fake_spec, fake_trace

SHARED = ("graphs/step.onnx", "graphs/weights.bin", "state_init.npz", "golden.npz", "parity.json")
OWN = ("openvino/step.xml", "openvino/step.bin")
FILES = (*SHARED, *OWN)


def fill(stage: Path, command: str = "nsm-export model.pt") -> Manifest:
    """Everything that a bundle holds, with made-up graphs."""
    for name in ("graphs/step.onnx", "graphs/weights.bin", *OWN):
        (stage / name).parent.mkdir(exist_ok=True)
        (stage / name).write_bytes(f"content of {name}".encode() * 50)
    np.savez(stage / STATE_INIT, allow_pickle=False, **fake_initial(fake_spec()))
    fake_trace(streams=2, steps=4).save(stage / GOLDEN)
    write_json(stage / "parity.json", {"passed": True, "results": []})
    shared = tuple(file_record(stage, name) for name in SHARED[:2])
    manifest = Manifest(
        spec=fake_spec(),
        fingerprint=FINGERPRINT,
        model={"class": "Fake", "config": {"d_model": 4, "window": None}, "parameters": 40},
        artifacts=(
            Artifact("tensorrt", "sm86", "fp32", "fp32", (), {"status": "not_run", "reason": "no GPU"}, ("a note",)),
            Artifact("onnxruntime", "cpu", "fp32", "fp32", shared, {"status": "passed"}),
            Artifact(
                "openvino",
                "cpu",
                "fp32",
                "fp32",
                tuple(file_record(stage, name) for name in OWN),
                {"status": "failed", "one_step": {"p99": 0.5}},
                quantization={"form": "static", "float": {"head": "small"}, "speed": {"step": {"median": 1.5}}},
            ),
        ),
        files=(),
        versions={"python": "3.11", "nsm": "0.1.0"},
        command=command,
        created="2025-01-01T00:00:00+00:00",
    )
    write_manifest(stage, manifest)
    return manifest


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A small bundle in a folder of its own."""
    path = tmp_path / "out" / "model.nsm"
    with staged(path) as stage:
        fill(stage)
    return path


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change the manifest by hand."""
    data = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    change(data)
    (path / MANIFEST).write_text(json.dumps(data), encoding="utf-8")


# -- reading what was written -------------------------------------------------------------------------------------


def test_a_bundle_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "model.nsm"
    with staged(path) as stage:
        manifest = fill(stage)
    bundle = Bundle(str(path))
    bundle.verify()
    assert bundle.manifest == replace(manifest, files=tuple(file_record(path, name) for name in SHARED))
    assert bundle.manifest.format_version == FORMAT_VERSION
    assert_same(bundle.state_init(), fake_initial(fake_spec()))
    assert_same(bundle.trace().outputs, fake_trace(streams=2, steps=4).outputs)


def test_a_real_bundle_is_whole(bundle: Bundle) -> None:
    bundle.verify()
    recorded = {record.path for record in bundle.manifest.files}
    recorded |= {record.path for artifact in bundle.manifest.artifacts for record in artifact.files}
    assert recorded == set(contents(bundle.path)) - {MANIFEST}
    assert Manifest.from_json(json.loads(json.dumps(bundle.manifest.to_json()))) == bundle.manifest
    for artifact in bundle.manifest.artifacts:
        assert artifact.nbytes == sum((bundle.path / record.path).stat().st_size for record in artifact.files) > 0


def test_a_file_record_is_path_size_and_hash(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"abc")
    wanted = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_record(tmp_path, "a/b") == FileRecord("a/b", 3, wanted)
    assert sha256(tmp_path / "a" / "b") == wanted


def test_the_default_artifact_is_the_first_that_passed(made: Path) -> None:
    assert Bundle(made).artifact().target == "onnxruntime"

    def none_passed(data: Any) -> None:
        data["artifacts"][1]["parity"]["status"] = "not_run"

    edit(made, none_passed)
    assert Bundle(made).artifact().target == "tensorrt"


def test_an_artifact_is_found_by_its_target(made: Path) -> None:
    bundle = Bundle(made)
    assert bundle.artifact("openvino").files == tuple(file_record(made, name) for name in OWN)
    with pytest.raises(
        InputError, match=r"no artifact for 'onnx'; it holds: tensorrt, onnxruntime, openvino"
    ) as caught:
        bundle.artifact("onnx")
    assert f"nsm build {made} --target onnx" in str(caught.value)


def test_a_bundle_without_artifacts_says_so(made: Path) -> None:
    edit(made, lambda data: data.update(artifacts=[]))
    bundle = Bundle(made)
    with pytest.raises(InputError, match=r"'openvino'; it holds: none"):
        bundle.artifact("openvino")
    with pytest.raises(InputError, match="no artifact") as caught:
        bundle.artifact()
    assert "None" not in str(caught.value)


# -- damage -------------------------------------------------------------------------------------------------------


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


def _remove(path: Path) -> None:
    path.unlink()


def _replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (_truncate, r"{} has \d+ bytes, recorded are \d+"),
    "emptied": (_empty, r"{} has 0 bytes, recorded are \d+"),
    "grown": (_grow, r"{} has \d+ bytes, recorded are \d+"),
    "bit flipped": (_flip, r"content of {} does not have the recorded SHA-256"),
    "missing": (_remove, r"{} is missing"),
    "a directory": (_replace_by_directory, r"{} is missing"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named(made: Path, name: str, damage: Callable[[Path], None], message: str) -> None:
    damage(made / name)
    with pytest.raises(BundleDamagedError, match=message.format(name.replace(".", r"\."))) as caught:
        Bundle(made).verify()
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_every_file_of_a_real_bundle_is_watched(
    bundle_copy: Path, damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    bundle = Bundle(bundle_copy)
    files = sorted(set(contents(bundle_copy)) - {MANIFEST})
    assert len(files) >= 10
    for name in files:
        path, aside = bundle_copy / name, tmp_path / "aside"
        shutil.copy2(path, aside)
        damage(path)
        with pytest.raises(BundleDamagedError, match=message.format(name.replace(".", r"\."))):
            bundle.verify()
        if path.is_dir():
            path.rmdir()
        shutil.move(aside, path)
    bundle.verify()


def test_only_what_is_asked_for_is_verified(made: Path) -> None:
    bundle = Bundle(made)
    _flip(made / OWN[1])
    bundle.verify(bundle.artifact("onnxruntime").files)
    with pytest.raises(BundleDamagedError, match=r"openvino/step\.bin"):
        bundle.verify(bundle.artifact("openvino").files)


@pytest.mark.parametrize(
    ("name", "read"), [(STATE_INIT, Bundle.state_init), (GOLDEN, Bundle.trace)], ids=["state", "trace"]
)
def test_arrays_are_verified_when_they_are_read(made: Path, name: str, read: Callable[[Bundle], object]) -> None:
    bundle = Bundle(made)
    read(bundle)
    _flip(made / name)
    with pytest.raises(BundleDamagedError, match=rf"content of {name}"):
        read(bundle)
    edit(made, lambda data: data.update(files=[item for item in data["files"] if item["path"] != name]))
    with pytest.raises(BundleDamagedError, match=rf"the manifest does not list {name}"):
        read(Bundle(made))


def test_json_is_verified_when_it_is_read(made: Path) -> None:
    bundle = Bundle(made)
    assert bundle.json("parity.json") == {"passed": True, "results": []}
    assert bundle.json("calibration.json") is None
    (made / "calibration.json").write_text("{}")
    assert bundle.json("calibration.json") is None, "it is not recorded"
    (made / "parity.json").write_text("{}")
    with pytest.raises(BundleDamagedError, match=r"parity\.json has 2 bytes"):
        bundle.json("parity.json")


@pytest.mark.parametrize("text", [b"rubbish", b"\xff\xfe", b"[" * 200_000], ids=["text", "bytes", "deep"])
def test_what_is_recorded_but_no_json_is_damage(made: Path, text: bytes) -> None:
    (made / "parity.json").write_bytes(text)
    write_manifest(made, Bundle(made).manifest)
    with pytest.raises(BundleDamagedError, match=r"parity\.json is not JSON"):
        Bundle(made).json("parity.json")


# -- manifests that are none --------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, "1", None, [1], 1.5])
def test_another_format_version_is_refused(made: Path, version: object) -> None:
    edit(made, lambda data: data.update(format_version=version))
    with pytest.raises(
        BundleVersionError, match=rf"this nsm reads version {FORMAT_VERSION}\. Export it again"
    ) as caught:
        Bundle(made)
    assert repr(version) in str(caught.value)
    assert caught.value.exit_code == 6


def test_a_manifest_without_a_version_is_refused(made: Path) -> None:
    edit(made, lambda data: data.pop("format_version"))
    with pytest.raises(BundleVersionError, match="format version None"):
        Bundle(made)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"<html>", "is not JSON"),
        (b'{"format_version": 1', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "holds no JSON object"),
        (b"3", "holds no JSON object"),
        (b"null", "holds no JSON object"),
        (b'"text"', "holds no JSON object"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
    ids=["empty", "brace", "html", "cut", "deep", "list", "number", "null", "string", "bytes"],
)
def test_a_manifest_that_is_no_json_object_is_refused(made: Path, text: bytes, message: str) -> None:
    (made / MANIFEST).write_bytes(text)
    with pytest.raises(BundleDamagedError, match=rf"manifest\.json.*{message}") as caught:
        Bundle(made)
    assert caught.value.exit_code == 6


def test_a_directory_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleDamagedError, match=r"is not a bundle: manifest\.json cannot be read"):
        Bundle(tmp_path)
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(BundleDamagedError, match=r"is not a bundle: manifest\.json cannot be read"):
        Bundle(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_manifest_that_is_no_regular_file_is_not_read(made: Path, kind: str) -> None:
    (made / MANIFEST).unlink()
    if kind == "pipe":
        os.mkfifo(made / MANIFEST)
    else:
        (made / MANIFEST).symlink_to("/dev/zero")
    with pytest.raises(BundleDamagedError, match=r"manifest\.json cannot be read .*no regular file"):
        Bundle(made)


def test_no_directory_is_no_bundle(tmp_path: Path, made: Path) -> None:
    for path in (tmp_path / "no.nsm", made / MANIFEST):
        with pytest.raises(InputError, match=r"There is no bundle .*: expected is a directory written by nsm-export"):
            Bundle(path)


ARTIFACT: tuple[str | int, ...] = ("artifacts", 1)

WRONG: dict[str, tuple[tuple[str | int, ...], object]] = {
    "no spec": (("spec",), KeyError),
    "spec a list": (("spec",), []),
    "spec without states": (("spec", "states"), KeyError),
    "state dtype unknown": (("spec", "states", 0, "dtype"), "float31"),
    "no fingerprint": (("fingerprint",), KeyError),
    "fingerprint null": (("fingerprint",), None),
    "fingerprint a number": (("fingerprint",), 3),
    "no model": (("model",), KeyError),
    "model a word": (("model",), "Fake"),
    "model null": (("model",), None),
    "model without a class": (("model", "class"), KeyError),
    "model config a number": (("model", "config"), 3),
    "model parameters a word": (("model", "parameters"), "many"),
    "no artifacts": (("artifacts",), KeyError),
    "artifacts null": (("artifacts",), None),
    "artifacts an object": (("artifacts",), {}),
    "artifact a word": (ARTIFACT, "openvino"),
    "artifact without a target": ((*ARTIFACT, "target"), KeyError),
    "artifact target a number": ((*ARTIFACT, "target"), 3),
    "artifact device null": ((*ARTIFACT, "device"), None),
    "artifact precision a list": ((*ARTIFACT, "precision"), []),
    "artifact with an unknown key": ((*ARTIFACT, "colour"), "red"),
    "artifact files null": ((*ARTIFACT, "files"), None),
    "artifact parity a number": ((*ARTIFACT, "parity"), 3),
    "artifact parity null": ((*ARTIFACT, "parity"), None),
    "artifact parity without a status": ((*ARTIFACT, "parity"), {}),
    "artifact notes null": ((*ARTIFACT, "notes"), None),
    "no files": (("files",), KeyError),
    "files a number": (("files",), 3),
    "files an object": (("files",), {}),
    "file a word": (("files", 0), "golden.npz"),
    "file without a path": (("files", 0, "path"), KeyError),
    "file path null": (("files", 0, "path"), None),
    "file size a word": (("files", 0, "size"), "large"),
    "file size null": (("files", 0, "size"), None),
    "file without a hash": (("files", 0, "sha256"), KeyError),
    "versions a word": (("versions",), "new"),
    "no command": (("command",), KeyError),
    "created a list": (("created",), []),
}


@pytest.mark.parametrize(("path", "value"), WRONG.values(), ids=WRONG)
def test_a_manifest_that_was_edited_by_hand_is_refused(made: Path, path: tuple[str | int, ...], value: object) -> None:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        if value is KeyError:
            del data[path[-1]]
        else:
            data[path[-1]] = value

    edit(made, change)
    with pytest.raises(BundleError, match="edited by hand") as caught:
        Bundle(made)
    assert caught.value.exit_code == 6


# -- paths that lead elsewhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["../secret", "graphs/../../secret", "graphs/..", "..", "/etc/passwd", "//etc/passwd", "graphs/../step.onnx"],
)
def test_a_path_that_leads_out_is_refused(made: Path, path: str) -> None:
    (made.parent / "secret").write_bytes(b"secret")

    def lead_out(data: Any) -> None:
        data["files"][0]["path"] = path

    edit(made, lead_out)
    bundle = Bundle(made)
    with pytest.raises(BundleDamagedError, match=r"the manifest names .*, which is outside the bundle") as caught:
        bundle.verify()
    assert repr(path) in str(caught.value)
    assert caught.value.exit_code == 6
    with pytest.raises(BundleDamagedError, match="outside the bundle"):
        bundle.locate(path)


def test_a_link_that_leads_out_is_refused(made: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    weights = made / "graphs" / "weights.bin"
    shutil.copy2(weights, outside / "weights.bin")
    weights.unlink()
    weights.symlink_to(outside / "weights.bin")
    with pytest.raises(BundleDamagedError, match=r"'graphs/weights\.bin', which is outside"):
        Bundle(made).verify()
    weights.unlink()
    shutil.move(made / "graphs" / "step.onnx", outside)
    (made / "graphs").rmdir()
    (made / "graphs").symlink_to(outside, target_is_directory=True)
    with pytest.raises(BundleDamagedError, match="which is outside"):
        Bundle(made).verify()


def test_a_link_that_stays_inside_and_a_linked_bundle_are_fine(made: Path, tmp_path: Path) -> None:
    weights = made / "graphs" / "weights.bin"
    weights.rename(made / "graphs" / "real.bin")
    weights.symlink_to("real.bin")
    (tmp_path / "link.nsm").symlink_to(made, target_is_directory=True)
    Bundle(made).verify()
    Bundle(tmp_path / "link.nsm").verify()


@pytest.mark.parametrize("path", ["", ".", "graphs", "no/such/file", "a\0b", "x" * 5000, "step.onnx/x"])
def test_a_path_that_is_no_file_is_damage(made: Path, path: str) -> None:
    def rename(data: Any) -> None:
        data["files"][0]["path"] = path

    edit(made, rename)
    with pytest.raises(BundleDamagedError, match=r"damaged|outside"):
        Bundle(made).verify()


def test_a_link_to_itself_is_damage(made: Path) -> None:
    weights = made / "graphs" / "weights.bin"
    weights.unlink()
    weights.symlink_to("weights.bin")
    with pytest.raises(BundleDamagedError, match=r"weights\.bin"):
        Bundle(made).verify()


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
            fill(stage)
            (stage / "tool").write_text("#!/bin/sh")
            (stage / "tool").chmod(0o700)
        modes = {path.relative_to(output).as_posix(): path.stat().st_mode & 0o777 for path in output.rglob("*")}
        assert modes == {name: 0o750 if name in ("graphs", "openvino", "tool") else 0o640 for name in modes}
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
            raise error

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
            pytest.raises(OutputExistsError, match="not a bundle, so --force does not replace it"),
            staged(output, True),
        ):
            pass


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


def test_the_old_bundle_comes_back_if_the_new_one_cannot_be_put_in_place(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, move = contents(made), os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(target) == made and ".partial" in Path(source).name:
            raise OSError(errno.EIO, "disk error")
        move(source, target)

    def export() -> None:
        with staged(made, force=True) as stage:
            fill(stage, "another command")
            monkeypatch.setattr(os, "replace", refuse)

    with pytest.raises((OSError, NsmError), match="disk error"):
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
    for force, message in ((False, "exists. Give --force"), (True, "is not a bundle")):
        with (
            contextlib.chdir(tmp_path / "work"),
            pytest.raises(OutputExistsError, match=message),
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

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
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
from nsm.bundle import staged
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
        (stage / "graphs" / "key").symlink_to(private / "key")
        write_manifest(stage, Bundle(stage).manifest)
    bundle = Bundle(made)
    bundle.verify()
    assert set(bundle.recorded()) == set(recorded) - {MANIFEST}
    assert names(made / "graphs") == ["key", "step.onnx", "weights.bin"]
    assert (made / "notes.txt").read_text() == "mine", "it lies beside what is nsm's"
    assert (made / "notes").is_symlink()
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
    with pytest.raises(OutputExistsError, match="not a bundle"), staged_copy(tmp_path / "thesis"):
        pass


# -- small writes -------------------------------------------------------------------------------------------------


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


def test_the_manifest_lists_the_files_that_are_there(tmp_path: Path) -> None:
    manifest = fill(tmp_path)
    (tmp_path / "graphs" / "deep").mkdir()
    (tmp_path / "graphs" / "deep" / "decode.onnx").write_bytes(b"x")
    (tmp_path / "parity.json").unlink()
    write_manifest(tmp_path, manifest)
    listed = [record.path for record in Bundle(tmp_path).manifest.files]
    assert listed == ["graphs/deep/decode.onnx", "graphs/step.onnx", "graphs/weights.bin", STATE_INIT, GOLDEN]
    Bundle(tmp_path).verify()
