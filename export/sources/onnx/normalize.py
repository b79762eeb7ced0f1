"""Rewrite a foreign ONNX graph to normal form: one input `tokens`, lanes first, static shapes, named states.

The inner graph gets a prefix before all its names, and transforms as MatMuls. Around it are reshapes and transposes
where needed and, for several lanes, the selection between the new state and the old one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir
from onnx import TensorProto, helper, numpy_helper

from nsm.errors import BuildError, UnsupportedError
from nsm.export.graphs import STATES_KEY, graphs_of, optimise, state_table
from nsm.export.sources.onnx.file import Port, Shape, opset_of, real_inputs
from nsm.export.sources.onnx.fourier import transforms_as_matmuls
from nsm.export.sources.onnx.model import Foreign
from nsm.export.sources.onnx.reference import Given
from nsm.export.sources.onnx.states import GraphState
from nsm.spec import VALID, EntrySpec, StateSpec, StepSpec, TensorSpec

_PREFIX = "model/"


def spec_of(given: Given, batch: int, length: int, chunk: int, token: TensorSpec) -> StepSpec:
    """The declaration of a graph's entries.

    Raises:
        UnsupportedError: it does not run with so many streams and tokens, or its outputs are no step's.
    """
    foreign = given.foreign
    states = tuple(
        StateSpec(s.name, lane_first(s, batch), s.dtype, init="learned" if s.initial.any() else "zeros")
        for s in foreign.states
    )
    names = tuple(state.name for state in states)
    entries = []
    for name, count in {"step": length, **({"decode": 1} if foreign.timed else {})}.items():
        inputs = [TensorSpec("tokens", (batch, count, *token.shape), token.dtype, 1, token.minimum, token.maximum)]
        if batch > 1 and count == 1:
            inputs.append(TensorSpec(VALID, (batch,), "int64", None, 0, 1))
        shapes = given.shapes(batch, count)
        outputs = tuple(
            TensorSpec(answer, _answer(foreign, shapes[answer], batch, count), "float32", 1)
            for answer in foreign.answers
        )
        entries.append(EntrySpec(name, tuple(inputs), outputs, names, names))
    return StepSpec(tuple(entries), states, chunk, batch)


def lane_first(state: GraphState, batch: int) -> tuple[int, ...]:
    """Its shape with the lanes first."""
    if state.lane_axis is None:
        return (1, *state.shape)
    rest = [size for index, size in enumerate(state.shape) if index != state.lane_axis]
    return (batch, *rest)


def _answer(foreign: Foreign, port: Port, batch: int, count: int) -> tuple[int, ...]:
    """The shape of an output in normal form.

    Raises:
        UnsupportedError: it is no number for each token.
    """
    shape = [int(size) for size in port.shape]
    lead = [batch, count] if foreign.timed else [batch]
    if port.dtype != "float32" or (shape[: len(lead)] != lead and math.prod(shape) % batch):
        raise UnsupportedError(
            f"The output {port.name} is {port.dtype}{shape}; expected float32 of shape {[*lead, '...']}. Remove "
            "other outputs from the graph, or export with this one cast."
        )
    if foreign.timed and shape[:2] != lead:
        raise UnsupportedError(
            f"The output {port.name} has the shape {shape} for {count} tokens of {batch} streams; expected "
            f"{[*lead, '...']}: an answer for every token."
        )
    rest = shape[len(lead) :] if shape[: len(lead)] == lead else [math.prod(shape) // batch]
    return (batch, count, *(rest or [1]))


def normal_graph(foreign: Foreign, spec: StepSpec, entry: EntrySpec, opset: int) -> onnx.ModelProto:
    """The graph of one entry, with its weights inside.

    Raises:
        BuildError: the operator set cannot be had, or the result is no valid graph.
    """
    length = entry.inputs[0].shape[1]
    inner = _converted(foreign.static(spec.batch, length), opset)
    inputs = real_inputs(inner)
    _rename(inner)
    around = _Around(entry)
    around.give(entry.inputs[0].name, foreign.main.name, inputs[foreign.main.name].shape)
    specs = {state.name: state for state in spec.states}
    for state in foreign.states:
        around.give_state(specs[state.name].past, state)
    for item in entry.outputs:
        around.take(item.name, item.name, item.shape)
    for state in foreign.states:
        around.take_state(specs[state.name], state)
    graph = helper.make_graph(
        [*around.before, *inner.graph.node, *around.after],
        "step",
        [_value(item.name, item.shape, item.dtype) for item in entry.inputs]
        + [_value(s.past, s.shape, s.dtype) for s in spec.states],
        [_value(item.name, item.shape, item.dtype) for item in entry.outputs]
        + [_value(s.present, s.shape, s.dtype) for s in spec.states],
        [*inner.graph.initializer, *around.constants],
    )
    model = helper.make_model(graph, opset_imports=list(inner.opset_import), producer_name="nsm")
    model = tidied(model)
    table = model.metadata_props.add()
    table.key, table.value = STATES_KEY, json.dumps(state_table(spec, entry))
    return model


class _Around:
    """The nodes before and after a graph."""

    def __init__(self, entry: EntrySpec) -> None:
        self.before: list[onnx.NodeProto] = []
        self.after: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self._lanes = entry.inputs[0].shape[0]
        self._choose = entry.input(VALID) is not None
        if self._choose:
            self._constant("normal/zero", np.zeros((), np.int64))
            self.after.append(helper.make_node("Greater", [VALID, "normal/zero"], ["normal/runs"], "normal/runs"))

    def give(self, name: str, inner: str, shape: Shape) -> None:
        """Reshape an input to the shape that the graph expects."""
        self._constant(f"normal/{inner}/shape", np.array(shape, np.int64))
        self.before.append(
            helper.make_node("Reshape", [name, f"normal/{inner}/shape"], [_PREFIX + inner], f"normal/{inner}/give")
        )

    def give_state(self, name: str, state: GraphState) -> None:
        if state.lane_axis in (0, None):
            shape = [self._lanes if index == state.lane_axis else size for index, size in enumerate(state.shape)]
            self.give(name, state.past, tuple(shape))
            return
        order = list(range(1, len(state.shape)))
        order.insert(state.lane_axis, 0)
        self.before.append(
            helper.make_node("Transpose", [name], [_PREFIX + state.past], f"normal/{state.past}/give", perm=order)
        )

    def take(self, name: str, inner: str, shape: Sequence[int]) -> None:
        """Reshape an output of the graph."""
        self._constant(f"normal/{inner}/taken", np.array(shape, np.int64))
        self.after.append(
            helper.make_node("Reshape", [_PREFIX + inner, f"normal/{inner}/taken"], [name], f"normal/{inner}/take")
        )

    def take_state(self, spec: StateSpec, state: GraphState) -> None:
        taken = f"normal/{state.present}" if self._choose else spec.present
        if state.lane_axis in (0, None):
            self.take(taken, state.present, spec.shape)
        else:
            order = [state.lane_axis, *(index for index in range(len(state.shape)) if index != state.lane_axis)]
            # Its shape need not follow from the graph.
            given = [self._lanes if index == state.lane_axis else size for index, size in enumerate(state.shape)]
            self.take(f"normal/{state.present}/given", state.present, given)
            self.after.append(
                helper.make_node(
                    "Transpose",
                    [f"normal/{state.present}/given"],
                    [taken],
                    f"normal/{state.present}/turn",
                    perm=order,
                )
            )
        if self._choose:
            self._where(spec, taken)

    def _where(self, spec: StateSpec, new: str) -> None:
        """The new state on lanes that run, the old one on the others."""
        stem = f"normal/{spec.name}"
        self._constant(f"{stem}/lanes", np.array([self._lanes, *[1] * (len(spec.shape) - 1)], np.int64))
        self.after.append(
            helper.make_node("Reshape", ["normal/runs", f"{stem}/lanes"], [f"{stem}/runs"], f"{stem}/runs")
        )
        if spec.dtype != "bool":
            self.after.append(
                helper.make_node("Where", [f"{stem}/runs", new, spec.past], [spec.present], f"{stem}/choose")
            )
            return
        # ONNX Runtime selects among numbers only.
        self.after += [
            helper.make_node("And", [f"{stem}/runs", new], [f"{stem}/new"], f"{stem}/new"),
            helper.make_node("Not", [f"{stem}/runs"], [f"{stem}/rests"], f"{stem}/rests"),
            helper.make_node("And", [f"{stem}/rests", spec.past], [f"{stem}/old"], f"{stem}/old"),
            helper.make_node("Or", [f"{stem}/new", f"{stem}/old"], [spec.present], f"{stem}/choose"),
        ]

    def _constant(self, name: str, value: np.ndarray) -> None:
        if all(tensor.name != name for tensor in self.constants):
            self.constants.append(numpy_helper.from_array(value, name))


def _value(name: str, shape: Sequence[int], dtype: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(shape))


def _rename(model: onnx.ModelProto) -> None:
    """Put the prefix before all names, in place; inside branches and loops too, which may use names from outside."""
    for graph in graphs_of(model.graph):
        for node in graph.node:
            node.name = _PREFIX + node.name if node.name else ""
            for names in (node.input, node.output):
                names[:] = [_PREFIX + name if name else "" for name in names]
        for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            value.name = _PREFIX + value.name
        for sparse in graph.sparse_initializer:
            sparse.values.name = _PREFIX + sparse.values.name


def _converted(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """A graph in the operator set that was asked for, or the later one that it has."""
    version = opset_of(model)
    if version >= opset:
        return model
    try:
        return onnx.version_converter.convert_version(model, opset)
    except Exception as error:  # C++ exceptions of the converter
        raise BuildError(f"The graph has operator set {version} and cannot be converted to {opset}: {error}") from error


def tidied(model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph after the passes that our own go through; branches that constants or shapes choose are chosen.

    Raises:
        BuildError: a pass failed.
    """
    try:
        made = onnx_ir.from_proto(model)
        optimise(made)
        if transforms_as_matmuls(made):
            optimise(made)
        result: onnx.ModelProto = onnx_ir.to_proto(made)
    except Exception as error:  # the passes' errors have no common base
        raise BuildError(f"The graph cannot be simplified: {error}") from error
    return result
