"""The installation: packages, devices, and how to install missing packages."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass
from typing import Any

from nsm.runtimes import TARGETS
from nsm.runtimes.opening import int8_dot_products


@dataclass(frozen=True)
class Finding:
    """One line of `nsm doctor`; `fix` is the fix if `found` is None."""

    name: str
    found: str | None
    purpose: str
    fix: str


def examine() -> list[Finding]:
    """Examine this installation; import only the packages that list devices."""
    findings = [
        Finding("python", platform.python_version(), "3.11 or newer", ""),
        _package("torch", "reading checkpoints, exporting", 'pip install "nsm-toolkit[export]"'),
        _package("onnx", "exporting", 'pip install "nsm-toolkit[export]"'),
        _package("onnxscript", "exporting", 'pip install "nsm-toolkit[export]"'),
    ]
    seen: set[tuple[str, ...]] = set()
    for target in TARGETS.values():
        if target.packages not in seen:
            seen.add(target.packages)
            name = target.installed() or target.packages[0]
            users = [item.name for item in TARGETS.values() if item.packages == target.packages]
            purpose = f"target {', '.join(users)}"
            findings.append(_package(name, purpose, f'pip install "nsm-toolkit[{target.extra}]"'))
    findings += [
        _package("cuda.bindings", "running TensorRT engines", 'pip install "nsm-toolkit[tensorrt]"', "cuda-bindings"),
        Finding("NVIDIA GPU", _gpu(), "running TensorRT engines", "a machine with an NVIDIA GPU and its driver"),
        Finding(
            "CUDA provider",
            _cuda_provider(),
            "target onnxruntime-cuda",
            'pip install "nsm-toolkit[gpu]"',
        ),
        Finding("OpenVINO devices", _openvino_devices(), "target openvino", 'pip install "nsm-toolkit[openvino]"'),
        Finding(
            "int8 dot products",
            {True: "yes", False: None, None: "unknown"}[int8_dot_products()],
            "int8 for cpu-dot",
            "a processor with VNNI or dotprod",
        ),
    ]
    return findings


def usable() -> dict[str, dict[str, Any]]:
    """Return for each target whether its package is installed, its extra, and its packages."""
    return {
        name: {"installed": target.installed() is not None, "extra": target.extra, "packages": list(target.packages)}
        for name, target in TARGETS.items()
    }


def _package(name: str, purpose: str, fix: str, distribution: str | None = None) -> Finding:
    try:
        there = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package of a dotted name
        there = False
    if not there:
        return Finding(name, None, purpose, fix)
    try:
        version = importlib.metadata.version((distribution or name).replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        version = "installed"
    return Finding(name, version, purpose, fix)


def _cuda_provider() -> str | None:
    """Whether the installed ONNX Runtime has CUDA; its packages with and without share an import name."""
    try:
        ort: Any = importlib.import_module("onnxruntime")
    except ImportError:
        return None
    return "in onnxruntime" if "CUDAExecutionProvider" in ort.get_available_providers() else None


def _gpu() -> str | None:
    try:
        cuda: Any = importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        return None
    status, count = cuda.cudaGetDeviceCount()
    if int(status) != 0 or not count:
        return None
    status, device = cuda.cudaGetDeviceProperties(0)
    return f"{device.name.decode()} (sm{device.major}{device.minor}), {count} in all"


def _openvino_devices() -> str | None:
    if importlib.util.find_spec("openvino") is None:
        return None
    openvino: Any = importlib.import_module("openvino")
    core = openvino.Core()
    return ", ".join(
        f"{name} ({core.get_property(name, 'FULL_DEVICE_NAME').strip()})" for name in core.available_devices
    )
