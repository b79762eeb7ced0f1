from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nsm.bundle import GOLDEN, STATE_INIT, Bundle
from nsm.errors import (
    BundleDamagedError,
    BundleError,
    InputError,
)
from nsm.files.writing import sha256
from nsm.manifest import FORMAT_VERSION, MANIFEST, FileRecord, Manifest, file_record
from nsm.staging import staged, write_manifest
from tests.nsm.bundles import FILES, OWN, SHARED, contents, edit, fill
from tests.runtimes.fake import assert_same, fake_initial, fake_spec, fake_trace

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
        data["artifacts"][1]["parity"]["status"] = "failed"

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
    with pytest.raises(BundleDamagedError, match=r" names .*, which is outside the bundle") as caught:
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


def test_a_manifest_behind_a_link_that_leads_out_is_not_read(made: Path, tmp_path: Path) -> None:
    shutil.move(made / MANIFEST, tmp_path / "other.json")
    (made / MANIFEST).symlink_to(tmp_path / "other.json")
    with pytest.raises(BundleDamagedError, match=r"'manifest\.json', which is outside the bundle"):
        Bundle(made)


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


# -- several precisions of a target --------------------------------------------------------------------------------


def _holding(made: Path, *labels: str) -> Bundle:
    """The bundle with artifacts of these targets and precisions, "openvino int8" for instance."""

    def change(data: Any) -> None:
        (plain,) = (item for item in data["artifacts"] if item["target"] == "onnxruntime")
        parts = [label.split() for label in labels]
        data["artifacts"] = [{**plain, "target": target, "precision": precision} for target, precision in parts]

    edit(made, change)
    return Bundle(made)


def test_of_a_target_the_artifact_in_fp32_is_taken_or_the_only_one(made: Path) -> None:
    bundle = _holding(made, "openvino int8", "onnx fp32", "openvino fp32", "onnxruntime int8")
    assert [item.label for item in bundle.artifacts()] == ["openvino int8", "onnx", "openvino", "onnxruntime int8"]
    assert bundle.artifact("openvino").label == "openvino"
    assert bundle.artifact("openvino", "int8").label == "openvino int8"
    assert bundle.artifact("onnxruntime").label == "onnxruntime int8"
    assert bundle.artifact().label == "openvino", "the first target, by the same rule"
    assert bundle.artifact(None, "int8").label == "openvino int8"
    assert [item.label for item in bundle.artifacts(["openvino"])] == ["openvino int8", "openvino"]
    assert [item.label for item in bundle.artifacts((), ["int8"])] == ["openvino int8", "onnxruntime int8"]
    assert [bundle.holds("openvino", name) for name in ("int8", "fp32", "bf16")] == [True, True, False]


def test_of_several_without_fp32_one_has_to_be_named(made: Path) -> None:
    bundle = _holding(made, "openvino int8", "openvino bf16")
    for target in ("openvino", None):
        with pytest.raises(
            InputError, match=r"openvino in int8, bf16\. Name one: precision='int8', or --precision int8"
        ):
            bundle.artifact(target)
    assert bundle.artifact(None, "bf16").label == "openvino bf16"


@pytest.mark.parametrize(
    ("target", "precision", "message"),
    [
        (
            "openvino",
            "bf16",
            r"no artifact for 'openvino' in bf16; .* nsm build .* --target openvino --precision bf16$",
        ),
        ("onnx", None, r"no artifact for 'onnx'; it holds: openvino int8, openvino\. .* --target onnx$"),
        (
            None,
            "fp16",
            r"no artifact in fp16; it holds: openvino int8, openvino\. .* --target openvino --precision fp16$",
        ),
    ],
)
def test_what_is_not_held_is_named_with_what_is(
    made: Path, target: str | None, precision: str | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        _holding(made, "openvino int8", "openvino fp32").artifact(target, precision)


def test_two_artifacts_of_one_target_and_precision_are_damage(made: Path) -> None:
    with pytest.raises(BundleError, match="two artifacts of openvino int8; expected one of a target and precision"):
        _holding(made, "openvino int8", "openvino int8")


def test_what_is_not_of_the_bundle_is_listed(made: Path) -> None:
    assert Bundle(made).others() == []
    for name in ("graphs/mine.txt", "notes/deep/a.txt", "notes/b.txt", "empty/deeper/x", "openvino/sub/y"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).touch()
    (made / "empty" / "deeper" / "x").unlink()
    (made / "link").symlink_to("graphs")
    found = [path.as_posix() for path in Bundle(made).others()]
    assert found == ["graphs/mine.txt", "link", "notes", "openvino/sub"]
