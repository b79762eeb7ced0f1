"""Manifests that are none, or were edited by hand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from nsm.bundle import Bundle
from nsm.errors import (
    BundleDamagedError,
    BundleError,
    BundleVersionError,
    InputError,
)
from nsm.manifest import FORMAT_VERSION, MANIFEST
from tests.nsm.bundles import edit

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
    # A device is reached by a link, and that leads out of the bundle.
    message = r"manifest\.json cannot be read .*no regular file" if kind == "pipe" else r"which is outside the bundle"
    with pytest.raises(BundleDamagedError, match=message):
        Bundle(made)


def test_no_directory_is_no_bundle(tmp_path: Path, made: Path) -> None:
    for path in (tmp_path / "no.nsm", made / MANIFEST):
        with pytest.raises(InputError, match=r"There is no bundle .*: expected a directory written by nsm-export"):
            Bundle(path)


ARTIFACT: tuple[str | int, ...] = ("artifacts", 1)
LOW = ("artifacts", 2, "quantization")

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
    "artifact parity without a status": ((*ARTIFACT, "parity", "status"), KeyError),
    "artifact parity with an unknown status": ((*ARTIFACT, "parity", "status"), "good"),
    "artifact parity not run, and no reason": ((*ARTIFACT, "parity", "status"), "not_run"),
    "artifact parity with a word for an error": ((*ARTIFACT, "parity", "one_step"), "small"),
    "artifact parity with a list for an error": ((*ARTIFACT, "parity", "free_run"), {"p99": [1]}),
    "artifact parity without the error": ((*ARTIFACT, "parity", "free_run"), {}),
    "artifact parity with a word for a share": ((*ARTIFACT, "parity", "argmax_agreement"), "all"),
    "artifact quantization a word": ((*ARTIFACT, "quantization"), "int8"),
    "artifact quantization without a scheme": ((*LOW, "scheme"), KeyError),
    "artifact quantization, fp32 a list": ((*LOW, "kept_in_fp32"), ["head"]),
    "artifact quantization, reason a number": ((*LOW, "kept_in_fp32"), {"head": 1}),
    "artifact quantization, speed a number": ((*LOW, "speed"), 2.0),
    "artifact quantization, speed without an interval": ((*LOW, "speed"), {"step": {"median": 2.0}}),
    "artifact notes null": ((*ARTIFACT, "notes"), None),
    "artifact without a limit": ((*ARTIFACT, "limit"), KeyError),
    "artifact limit zero": ((*ARTIFACT, "limit"), 0),
    "artifact limit of less than a call": ((*ARTIFACT, "limit"), 3),
    "artifact limit a word": ((*ARTIFACT, "limit"), "none"),
    "artifact limit true": ((*ARTIFACT, "limit"), True),
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
    "work null": (("work",), None),
    "work of an entry without bytes": (("work",), {"step": {"flops": 1.0}}),
    "work of an entry a word": (("work",), {"step": {"flops": "many", "nbytes": 1.0}}),
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
