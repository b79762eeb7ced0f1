from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any

import pytest

from nsm.export.analysis.installation import Finding, examine, usable
from nsm.runtimes.targets import TARGETS


def found() -> dict[str, Finding]:
    return {item.name: item for item in examine()}


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Make packages look as if they were not installed."""
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        parent, *rest = name.split(".")
        if parent in names and rest:
            raise ModuleNotFoundError(f"No module named {parent!r}")
        if parent in names:
            return None
        return real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def put_cuda(monkeypatch: pytest.MonkeyPatch, runtime: Any) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)


def test_what_is_installed_is_found_with_its_version() -> None:
    pieces = found()
    assert pieces["python"].found == platform.python_version()
    for name in ("torch", "onnx", "onnxscript", "onnxruntime", "openvino"):
        assert pieces[name].found == importlib.metadata.version(name)
    assert pieces["cuda.bindings"].found == importlib.metadata.version("cuda-bindings")
    openvino = pieces["OpenVINO devices"].found
    assert openvino is not None
    assert "CPU (" in openvino


def test_every_piece_says_what_it_is_for_and_how_to_get_it() -> None:
    pieces = examine()
    assert len({item.name for item in pieces}) == len(pieces), "no piece twice"
    for item in pieces:
        assert item.purpose
        assert item.fix or item.name == "python"
    purposes = " ".join(item.purpose for item in pieces)
    assert all(target in purposes for target in TARGETS)


def test_what_is_missing_names_the_extra_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "torch", "openvino", "tensorrt", "tensorrt_rtx", "cuda")
    pieces = found()
    for piece, extra in (
        ("torch", "export"),
        ("openvino", "openvino"),
        ("tensorrt", "tensorrt"),
        ("cuda.bindings", "tensorrt"),
        ("OpenVINO devices", "openvino"),
    ):
        assert pieces[piece].found is None
        assert pieces[piece].fix == f'pip install "nsm-toolkit[{extra}]"'
    assert pieces["onnx"].found is not None
    targets = usable()
    assert {name: item["installed"] for name, item in targets.items()} == {
        "onnx": True,
        "onnxruntime": True,
        "openvino": False,
        "tensorrt": False,
        "onnxruntime-cuda": True,
        "mobile": True,
        "web": True,
        "triton": True,
    }
    assert targets["tensorrt"] == {
        "installed": False,
        "extra": "tensorrt",
        "packages": ["tensorrt", "tensorrt_rtx"],
    }


def test_a_module_without_a_distribution_is_installed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert found()["onnx"].found == "installed"


def test_a_gpu_is_named_with_its_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(name=b"NVIDIA RTX A6000", major=8, minor=6)
    put_cuda(
        monkeypatch,
        SimpleNamespace(cudaGetDeviceCount=lambda: (0, 2), cudaGetDeviceProperties=lambda _index: (0, device)),
    )
    assert found()["NVIDIA GPU"].found == "NVIDIA RTX A6000 (sm86), 2 in all"


@pytest.mark.parametrize("answer", [(35, 0), (0, 0)])
def test_a_machine_without_a_gpu_says_what_it_takes(monkeypatch: pytest.MonkeyPatch, answer: tuple[int, int]) -> None:
    put_cuda(monkeypatch, SimpleNamespace(cudaGetDeviceCount=lambda: answer))
    finding = found()["NVIDIA GPU"]
    assert finding.found is None
    assert "NVIDIA GPU and its driver" in finding.fix


def test_without_the_cuda_bindings_there_is_no_gpu_to_see(monkeypatch: pytest.MonkeyPatch) -> None:
    put_cuda(monkeypatch, None)
    assert found()["NVIDIA GPU"].found is None
