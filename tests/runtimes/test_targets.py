from __future__ import annotations

import importlib.metadata

import pytest

from nsm.errors import InputError, MissingDependencyError
from nsm.runtimes.targets import TARGETS, find_target

ALIASES = {"ort": "onnxruntime", "ov": "openvino", "trt": "tensorrt"}


@pytest.mark.parametrize("name", [*TARGETS, *ALIASES, "OpenVINO", "TRT"])
def test_a_target_is_found_by_name_or_alias_in_any_case(name: str) -> None:
    assert find_target(name).name == ALIASES.get(name.lower(), name.lower())


@pytest.mark.parametrize("name", ["coreml", "", "onnx ", "o"])
def test_an_unknown_target_lists_what_there_is(name: str) -> None:
    with pytest.raises(InputError, match=f"There is no target '{name}'") as caught:
        find_target(name)
    for target in TARGETS.values():
        assert target.name in str(caught.value)
        assert all(alias in str(caught.value) for alias in target.aliases)


def test_the_table_is_consistent() -> None:
    names = [name for target in TARGETS.values() for name in (target.name, *target.aliases)]
    assert len(names) == len(set(names))
    for name, target in TARGETS.items():
        assert name == target.name
        assert target.packages
        assert target.devices
        assert target.summary
        assert all(device == device.lower() for device in target.devices)


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError, match="does not support item assignment"):
        TARGETS["x"] = find_target("onnx")  # type: ignore[index]


@pytest.mark.parametrize("name", list(TARGETS))
def test_every_target_has_its_modules_and_an_extra_that_exists(name: str) -> None:
    target = find_target(name)
    assert callable(target.runtime_module().load)
    assert callable(target.builder_module().build)
    assert target.extra in (importlib.metadata.metadata("nsm-toolkit").get_all("Provides-Extra") or [])


@pytest.mark.parametrize("name", list(TARGETS))
def test_a_missing_package_names_the_extra_that_installs_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = find_target(name)
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    assert target.installed() is None
    for use in (target.require, target.runtime_module, target.builder_module):
        with pytest.raises(MissingDependencyError, match=rf'pip install "nsm-toolkit\[{target.extra}\]"') as caught:
            use()
        assert all(package in str(caught.value) for package in target.packages)
        assert caught.value.exit_code == 3


def test_the_preferred_package_is_taken_first(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"tensorrt", "tensorrt_rtx"}
    monkeypatch.setattr("importlib.util.find_spec", lambda package: object() if package in there else None)
    assert find_target("trt").require() == "tensorrt"
    there.remove("tensorrt")
    assert find_target("trt").installed() == "tensorrt_rtx"
