"""The table of targets. A new one is its builder, its loader and a row here."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType, ModuleType

from nsm.bundle import GRAPHS
from nsm.errors import InputError, MissingDependencyError
from nsm.spec import StepSpec


@dataclass(frozen=True)
class Target:
    """One place an artifact can run.

    Args:
        name: as in `--target`.
        runtime: module with `load(files, spec, device, threads) -> Runtime`.
        builder: module with `build(graphs, directory, request) -> Built`.
        packages: import names of which one must be there, the preferred first.
        extra: that installs one of them: `pip install "nsm-toolkit[extra]"`.
        suffix: of the file that the runtime opens, one per entry.
        folder: where in the bundle these files lie, in fp32; see `place`.
        devices: values of `--device`.
        summary: one line for people.
        aliases: other names for `--target`.
        asked_only: whether `nsm bench --all` leaves it out unless it is named.
        stem: name of that file without the suffix.
        entries: those that run there; () for all. A session there has no others.
        bisectable: whether its intermediate results can be seen; `nsm.runtimes.parity.bisection.operation` says how.
        checked_when_built: checks of its builder on an artifact that cannot run where it is built.
        in_process: whether it is built and first opened in the process of the export: nothing is compiled, or by a
            backend that the export runs anyhow. Others are in a child process, which a crash ends alone.
        trial_threads: numbers of threads with which the child opens it; a compiler may depend on them.
        remedies: compile options, each set of them known to keep its compiler from crashing on some graphs. The
            loader of a target that has any takes `options` as well.
    """

    name: str
    runtime: str
    builder: str
    packages: tuple[str, ...]
    extra: str
    suffix: str
    folder: str
    devices: tuple[str, ...]
    summary: str
    aliases: tuple[str, ...] = ()
    asked_only: bool = False
    stem: str = "{entry}"
    entries: tuple[str, ...] = ()
    bisectable: bool = False
    checked_when_built: str = ""
    in_process: bool = False
    trial_threads: tuple[int | None, ...] = (None,)
    remedies: tuple[Mapping[str, str], ...] = ()

    def file(self, entry: str) -> str:
        """Name of the file that the runtime opens for an entry."""
        return self.stem.format(entry=entry) + self.suffix

    def place(self, precision: str) -> str:
        """Folder in the bundle of the files in a precision, each its own: `openvino`, `openvino-int8`.

        A target that runs the portable graphs has separate graphs in low precision: `onnxruntime-int8`.
        """
        if precision == "fp32":
            return self.folder
        return f"{self.name if self.folder == GRAPHS else self.folder}-{precision}"

    def served(self, spec: StepSpec) -> StepSpec:
        """A model's spec as a session on this target has it: with the entries that run there, and all states."""
        if not self.entries:
            return spec
        return replace(spec, entries=tuple(entry for entry in spec.entries if entry.name in self.entries))

    def installed(self) -> str | None:
        """Import name of the package that would be used, None if none is installed."""
        return next((name for name in self.packages if importlib.util.find_spec(name) is not None), None)

    def require(self) -> str:
        """Import name of the package that is used.

        Raises:
            MissingDependencyError: names the extra to install.
        """
        package = self.installed()
        if package is None:
            raise MissingDependencyError(
                f"The target {self.name} needs the package {' or '.join(self.packages)}, which is not installed. "
                f'Install it with: pip install "nsm-toolkit[{self.extra}]"'
            )
        return package

    def runtime_module(self) -> ModuleType:
        self.require()
        return importlib.import_module(self.runtime)

    def builder_module(self) -> ModuleType:
        self.require()
        return importlib.import_module(self.builder)


# "cpu-dot": processors that add up products of int8 in 32 bits; see `nsm.runtimes.opening.cpu_features`.
_PROCESSORS = ("cpu", "cpu-dot")
# "portable": Ampere and later; "current": the GPU in this machine; the others are compute capabilities.
_NVIDIA = ("portable", "current", "sm75", "sm80", "sm86", "sm89", "sm120", "sm121")

_ROWS = {
    target.name: target
    for target in (
        Target(
            name="onnx",
            runtime="nsm.runtimes.backends.onnxruntime_unoptimized",
            builder="nsm.export.builders.onnxruntime",
            packages=("onnxruntime",),
            extra="onnxruntime",
            suffix=".onnx",
            folder=GRAPHS,
            devices=("cpu",),
            summary="the portable graph, run as it is written (no graph optimisation)",
            in_process=True,
            bisectable=True,
        ),
        Target(
            name="onnxruntime",
            runtime="nsm.runtimes.backends.onnxruntime",
            builder="nsm.export.builders.onnxruntime",
            packages=("onnxruntime",),
            extra="onnxruntime",
            suffix=".onnx",
            folder=GRAPHS,
            devices=_PROCESSORS,
            summary="ONNX Runtime on the CPU, fully optimised",
            in_process=True,
            aliases=("ort",),
            bisectable=True,
        ),
        Target(
            name="openvino",
            runtime="nsm.runtimes.backends.openvino",
            builder="nsm.export.builders.openvino",
            packages=("openvino",),
            extra="openvino",
            suffix=".xml",
            folder="openvino",
            devices=_PROCESSORS,
            summary="OpenVINO IR on the CPU",
            trial_threads=(1, None),
            # Snippets crash on three and more residual attentions of rank 3 (2025.2 to 2026.4).
            remedies=({"SNIPPETS_MODE": "DISABLE"},),
            aliases=("ov",),
            bisectable=True,
        ),
        Target(
            name="tensorrt",
            runtime="nsm.runtimes.backends.tensorrt",
            builder="nsm.export.builders.tensorrt",
            packages=("tensorrt", "tensorrt_rtx"),
            extra="tensorrt",
            suffix=".engine",
            folder="tensorrt",
            devices=_NVIDIA,
            summary="a TensorRT engine for one kind of NVIDIA GPU",
            aliases=("trt",),
            checked_when_built="the engines' inputs, outputs and states were checked against the model's",
        ),
        Target(
            name="onnxruntime-cuda",
            runtime="nsm.runtimes.backends.onnxruntime_cuda",
            builder="nsm.export.builders.onnxruntime_cuda",
            packages=("onnxruntime",),
            extra="gpu",
            suffix=".onnx",
            folder=GRAPHS,
            devices=("cuda",),
            summary="ONNX Runtime on an NVIDIA GPU, with the state in its memory and CUDA graphs",
            aliases=("cuda",),
            asked_only=True,
        ),
        Target(
            name="mobile",
            runtime="nsm.runtimes.backends.onnxruntime",
            builder="nsm.export.builders.mobile",
            packages=("onnxruntime",),
            extra="onnxruntime",
            suffix=".ort",
            folder="mobile",
            devices=_PROCESSORS,
            summary="ONNX Runtime's own format, for builds with few operators; as well: -t onnxruntime --mobile",
            asked_only=True,
        ),
        Target(
            name="web",
            runtime="nsm.runtimes.backends.web",
            builder="nsm.export.builders.web",
            packages=("numpy",),
            extra="web",
            suffix=".onnx",
            folder=GRAPHS,
            devices=("wasm",),
            summary="a folder for any static file server: the graphs on ONNX Runtime Web, with a page",
            in_process=True,
            asked_only=True,
        ),
        Target(
            name="triton",
            runtime="nsm.runtimes.backends.triton",
            builder="nsm.export.builders.triton",
            packages=("onnxruntime",),
            extra="triton",
            suffix=".onnx",
            folder="triton",
            devices=("cpu",),
            summary="a model repository for Triton Inference Server, which keeps the state of each sequence",
            in_process=True,
            asked_only=True,
            stem="model",
            entries=("step",),
        ),
    )
}

TARGETS: Mapping[str, Target] = MappingProxyType(_ROWS)


def find_target(name: str) -> Target:
    """The target of that name or alias.

    Raises:
        InputError: unknown target; the message lists the targets.
    """
    for target in TARGETS.values():
        if name.lower() in (target.name, *target.aliases):
            return target
    known = ", ".join(
        f"{target.name} ({', '.join(target.aliases)})" if target.aliases else target.name for target in TARGETS.values()
    )
    raise InputError(f"There is no target {name!r}. Targets: {known}.")
