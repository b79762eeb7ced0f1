"""The table of targets. A new target needs a builder, a loader and a row here."""

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
    """A backend and artifact format that an export can build for.

    Args:
        name: value of `--target`.
        runtime: module with `load(files, spec, device, threads) -> Runtime`.
        builder: module with `build(graphs, directory, request) -> Built`.
        packages: import names, the preferred first; one of them must be installed.
        extra: extra that installs one of the packages: `pip install "nsm-toolkit[extra]"`.
        suffix: suffix of the file that the runtime opens, one file per entry.
        folder: folder in the bundle of these files, in fp32; see `place`.
        devices: values of `--device`.
        summary: one-line description for users.
        aliases: other names for `--target`.
        asked_only: whether `nsm bench --all` skips the target unless it is named.
        stem: name of the opened file without the suffix.
        entries: entries that run on the target; () for all. A session on it has no others.
        bisectable: whether its intermediate results can be read; see `nsm.runtimes.parity.bisection.operation`.
        checked_when_built: checks that its builder makes on an artifact that cannot run on the build machine.
        in_process: whether the export process itself builds and first opens the artifact, because nothing is compiled
            or the export uses the same backend anyway. Other targets use a child process, so that a crash ends only it.
        trial_threads: thread counts with which the child opens the artifact; a compiler may depend on them.
        remedies: sets of compile options, each known to keep the compiler from crashing on some graphs. The loader
            of a target with remedies also takes `options`.
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
        """Return the name of the file that the runtime opens for an entry."""
        return self.stem.format(entry=entry) + self.suffix

    def place(self, precision: str) -> str:
        """Return the bundle folder of the files in a precision: `openvino`, `openvino-int8`.

        A target that runs the portable graphs has separate graphs in low precision: `onnxruntime-int8`.
        """
        if precision == "fp32":
            return self.folder
        return f"{self.name if self.folder == GRAPHS else self.folder}-{precision}"

    def served(self, spec: StepSpec) -> StepSpec:
        """Return the spec of a session on this target: all states, and the entries that run on it."""
        if not self.entries:
            return spec
        return replace(spec, entries=tuple(entry for entry in spec.entries if entry.name in self.entries))

    def installed(self) -> str | None:
        """Return the import name of the preferred installed package, or None."""
        return next((name for name in self.packages if importlib.util.find_spec(name) is not None), None)

    def require(self) -> str:
        """Return the import name of the preferred installed package.

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


# "cpu-dot": processors that accumulate int8 products in 32 bits; see `nsm.runtimes.opening.cpu_features`.
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
            summary="the portable graph without graph optimisation",
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
    """Return the target with a name or alias.

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
