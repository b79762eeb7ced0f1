"""ONNX Runtime on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from nsm.errors import BuildError, UnsupportedError
from nsm.runtimes.backends.buffered import Bind, BoundGraph, BufferedRuntime, Opener
from nsm.runtimes.base import Runtime, Watched
from nsm.spec import StepSpec
from nsm.trace import Array, Arrays

_PRECISIONS = {"tensor(float)": "fp32", "tensor(float16)": "fp16", "tensor(bfloat16)": "bf16"}
# Operators that identify a precision: a graph in that precision contains at least one. Linear ops in fp16 are
# surrounded by casts with ".activation.half" in their names.
_OPERATORS = {
    "int8": (b"MatMulInteger", b"DynamicQuantizeMatMul", b"DynamicQuantizeLSTM"),
    "int8-weights": (b"MatMulNBits",),
    "fp16": (b".activation.half",),
}

# On a CPU the fused operation is slower than the two operations it replaces.
SLOWER_ON_CPU = ("SkipLayerNormFusion",)


def load(
    files: Mapping[str, Path],
    spec: StepSpec,
    device: str,  # noqa: ARG001
    threads: int | None,
    precision: str = "fp32",
    optimise: bool = True,
) -> Runtime:
    """Open the graphs of a bundle.

    Args:
        files: the `.onnx` or `.ort` file of each entry.
        spec: spec of the model.
        device: "cpu" or "cpu-dot", which ONNX Runtime treats alike.
        threads: threads within an operation (default: ONNX Runtime's choice, the physical cores).
        precision: precision of the artifact.
        optimise: False disables graph optimizations.

    Raises:
        BuildError: ONNX Runtime refuses the file.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Every entry has its own threads. With spinning, they would stay busy after a call and take the CPU from the
    # next call of another entry.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL

    watched = Watched(*{path.parent for path in files.values()})

    def later(path: Path) -> Bind:
        watched.check()
        return _binder(open_graph(path, options, without=SLOWER_ON_CPU))

    first, *others = files
    session = open_graph(files[first], options, without=SLOWER_ON_CPU)
    effective = graph_precision(session, files[first], precision)
    entries: dict[str, Opener] = {first: lambda: _binder(session)}
    entries |= {name: functools.partial(later, files[name]) for name in others}
    return BufferedRuntime(spec, entries, effective)


def open_graph(
    path: Path,
    options: ort.SessionOptions,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
    without: Sequence[str] = (),
) -> ort.InferenceSession:
    """Open a graph on these providers, the preferred first, `without` some optimizers.

    Raises:
        UnsupportedError: ONNX Runtime lacks an operator of the graph; names the node.
        BuildError: ONNX Runtime refuses the file or the options.
    """
    try:
        return ort.InferenceSession(str(path), options, providers=list(providers), disabled_optimizers=list(without))
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        if "NOT_IMPLEMENTED" in str(error):
            raise UnsupportedError(
                f"ONNX Runtime does not support an operator of {path.name}: {error}. Build the model for "
                "another target, or without that operator."
            ) from error
        raise BuildError(f"ONNX Runtime cannot open {path}: {error}") from error


def graph_precision(session: ort.InferenceSession, path: Path, precision: str) -> str:
    """Return the precision of an open graph, from its dtypes: ONNX Runtime has no property for it."""
    if precision in _OPERATORS and any(name in path.read_bytes() for name in _OPERATORS[precision]):
        return precision
    types = {value.type for value in session.get_outputs()}
    return "+".join(sorted(name for kind, name in _PRECISIONS.items() if kind in types))


def _binder(session: ort.InferenceSession) -> Bind:
    def bind(read: Arrays, written: Arrays) -> BoundGraph:
        binding = session.io_binding()

        def point(name: str, array: Array) -> None:
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

        for name, array in read.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in written.items():
            point(name, array)
        return BoundGraph(functools.partial(session.run_with_iobinding, binding), point)

    return bind
