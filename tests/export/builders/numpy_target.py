"""A backend that nsm does not know: the graphs in numpy, by the reference evaluator of the package onnx."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx.reference import ReferenceEvaluator

from nsm.export.builders.base import Built, Request
from nsm.export.graphs.external_data import load_shared
from nsm.runtimes.backends.buffered import Bind, BoundGraph, BufferedRuntime
from nsm.runtimes.base import Runtime
from nsm.runtimes.targets import Target
from nsm.spec import StepSpec
from nsm.trace import Arrays

ROW = Target(
    name="numpy",
    runtime=__name__,
    builder=__name__,
    packages=("onnx",),
    extra="export",
    suffix=".whole",
    folder="numpy",
    devices=("cpu",),
    summary="the graphs in numpy",
    aliases=("np",),
    asked_only=True,
    checked_when_built="nothing was checked",
    in_process=True,  # nothing in it compiles
)


def build(request: Request) -> Built:
    """A file for each entry, with its weights inside."""
    request.folder.mkdir()
    files = []
    for entry in request.spec.entries:
        path = request.folder / f"{entry.name}.whole"
        path.write_bytes(load_shared(request.graph(entry.name)).SerializeToString())
        files.append(path.relative_to(request.directory).as_posix())
    return Built(tuple(files), "cpu", ("it is slow",))


def load(
    files: Mapping[str, Path], spec: StepSpec, device: str, threads: int | None, precision: str = "fp32"
) -> Runtime:
    """Evaluate the files."""
    return BufferedRuntime(spec, {name: functools.partial(_opened, path) for name, path in files.items()}, precision)


def _opened(path: Path) -> Bind:
    evaluator = ReferenceEvaluator(onnx.load_model_from_string(path.read_bytes()))

    def bind(read: Arrays, written: Arrays) -> BoundGraph:
        def run() -> None:
            for name, value in zip(written, evaluator.run(list(written), read), strict=True):
                written[name][...] = value

        return BoundGraph(run, written.__setitem__)

    return bind
