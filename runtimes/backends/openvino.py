"""OpenVINO on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import openvino as ov
from openvino import properties as props

from nsm.bundle import WEIGHTS
from nsm.errors import BuildError, BundleDamagedError, DeviceUnavailableError
from nsm.runtimes.backends.buffered import Bind, BoundGraph, BufferedRuntime, Opener
from nsm.runtimes.base import Runtime, Watched
from nsm.spec import StepSpec
from nsm.trace import Array, Arrays

# OpenVINO's element types and the matching precision names.
_INT8 = ("int8", "int8-weights")
_PRECISIONS = {"f32": "fp32", "f16": "fp16", "bf16": "bf16"}

# Inference precision hint and name of the capability; all other precisions compute in fp32.
_HALF = {"fp16": (ov.Type.f16, "FP16"), "bf16": (ov.Type.bf16, "BF16")}


def load(
    files: Mapping[str, Path],
    spec: StepSpec,
    device: str,  # noqa: ARG001
    threads: int | None,
    precision: str = "fp32",
    options: Mapping[str, str] = MappingProxyType({}),
) -> Runtime:
    """Compile the IR of a bundle; fp32 unless the graph or `precision` selects another type.

    By default OpenVINO computes fp32 models in bf16 on processors with bf16. So this function sets the inference
    precision hint, and reads it back into `effective_precision`.

    Args:
        files: the `.xml` file of each entry.
        spec: spec of the model.
        device: "cpu" or "cpu-dot", which OpenVINO treats alike.
        threads: inference threads (default: OpenVINO's choice).
        precision: precision of the artifact; with "fp16" and "bf16" OpenVINO computes everything in it.
        options: further compile options, as recorded in the artifact.

    Raises:
        BuildError: OpenVINO refuses the file.
        BundleDamagedError: a graph has an input that the spec does not name.
        DeviceUnavailableError: the processor does not support the requested fp16 or bf16.
    """
    core = ov.Core()
    kind, capability = _HALF.get(precision, (ov.Type.f32, "FP32"))
    if capability not in core.get_property("CPU", props.device.capabilities()):
        raise DeviceUnavailableError(
            f"The processor in this machine ({core.get_property('CPU', props.device.full_name())}) does not compute in "
            f"{precision}, so the artifact was not run here. Take int8, or fp32."
        )
    config: dict[Any, Any] = {
        props.hint.inference_precision(): kind,
        props.hint.performance_mode(): props.hint.PerformanceMode.LATENCY,
        **options,
    }
    if threads is not None:
        config[props.inference_num_threads()] = threads

    def compiled(name: str) -> ov.CompiledModel:
        path = files[name]
        try:
            found = core.compile_model(core.read_model(path, path.with_name(WEIGHTS)), "CPU", config)
        except Exception as error:  # the binding raises bare RuntimeErrors
            raise BuildError(f"OpenVINO cannot compile {path}: {error}") from error
        _check_inputs(found, spec, name, path)
        return found

    watched = Watched(*{path.parent for path in files.values()})

    def later(name: str) -> Bind:
        watched.check()
        return _binder(compiled(name))

    first, *others = files
    opened = compiled(first)
    read_back = opened.get_property(props.hint.inference_precision()).get_type_name()
    entries: dict[str, Opener] = {first: lambda: _binder(opened)}
    entries |= {name: functools.partial(later, name) for name in others}
    effective = _PRECISIONS.get(read_back, read_back)
    if precision in _INT8 and _products_in_int8(opened):
        effective = precision
    return BufferedRuntime(spec, entries, effective)


def _check_inputs(compiled: ov.CompiledModel, spec: StepSpec, name: str, path: Path) -> None:
    """Raise if a graph input is missing in the spec: OpenVINO would run it on uninitialized memory."""
    entry = spec.entry(name)
    filled = {item.name for item in entry.inputs} | {state.past for state in spec.states_of(entry.reads)}
    for port in compiled.inputs:
        if filled.isdisjoint(port.get_names()):
            raise BundleDamagedError(
                f"{path} has the input {port.get_any_name()}, and by the manifest the entry {name} has no such input "
                "and reads no such state. Was the manifest edited by hand? Export the bundle again."
            )


def _products_in_int8(compiled: ov.CompiledModel) -> bool:
    """Return whether the compiled graph has linear ops in int8."""
    facts = (node.get_rt_info() for node in compiled.get_runtime_model().get_ops())
    return any(
        fact["layerType"].astype(str) == "FullyConnected" and fact["runtimePrecision"].astype(str) in ("i8", "u8")
        for fact in facts
    )


def _binder(compiled: ov.CompiledModel) -> Bind:
    def bind(read: Arrays, written: Arrays) -> BoundGraph:
        request = compiled.create_infer_request()

        def point(name: str, array: Array) -> None:
            request.set_tensor(name, ov.Tensor(array, shared_memory=True))

        for name, array in (read | written).items():
            point(name, array)

        def documented() -> object:
            # Without sharing, OpenVINO would copy every output into its result.
            return request.infer(share_outputs=True)

        # OpenVINO's Python call looks for inputs to copy (here none) and builds a mapping of the outputs: 3 us
        # around this method of the class below.
        infer = super(ov.InferRequest, request).infer
        return BoundGraph(functools.partial(infer, {}, True, False), point, documented)

    return bind
