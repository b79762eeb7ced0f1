"""PyTorch to ONNX: a model's entries as plain graphs whose states are named, paired and described."""

from __future__ import annotations

import ast
import gc
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from nsm.bundle import WEIGHTS
from nsm.errors import BuildError
from nsm.export.capture import capture, quiet, rewritten
from nsm.export.graphs.exact_division import exact_division
from nsm.export.graphs.export_failure import failure
from nsm.export.graphs.external_data import check_graphs, save_shared
from nsm.export.graphs.metadata import OPSET, STATES_KEY, state_table
from nsm.export.graphs.operator_table import shared_operator_table
from nsm.export.graphs.passes import optimise
from nsm.export.graphs.walk import nodes_of
from nsm.models import State, StepModel
from nsm.spec import VALID, EntrySpec, StepSpec
from nsm.trace import Arrays

_SCOPES = "pkg.torch.onnx.name_scopes"
_DTYPES = {"int64": torch.int64, "float32": torch.float32}


class EntryModule(nn.Module):
    """An entry of a model over flat tensors: (*inputs, *states read) -> (*outputs, *states written).

    States that the entry does not read are constants that nothing depends on.
    """

    def __init__(self, model: StepModel, spec: StepSpec, entry: EntrySpec) -> None:
        super().__init__()
        self.model = model
        self.entry = entry
        self.reads = [state.name for state in spec.states_of(entry.reads)]
        self.writes = [state.name for state in spec.states_of(entry.writes)]
        self.unread = {
            name: value.detach() for name, value in model.initial_state(spec.batch).items() if name not in self.reads
        }

    def forward(self, *flat: Tensor) -> tuple[Tensor, ...]:
        count = len(self.entry.inputs)
        inputs = {item.name: value for item, value in zip(self.entry.inputs, flat[:count], strict=True)}
        state = {**self.unread, **dict(zip(self.reads, flat[count:], strict=True))}
        outputs, state = self.model.graph(self.entry.name, inputs, state)
        results = (*(outputs[item.name] for item in self.entry.outputs), *(state[name] for name in self.writes))
        return tuple(_apart(results, flat))


def _apart(results: Sequence[Tensor], taken: Sequence[Tensor]) -> Iterator[Tensor]:
    """Results as tensors of their own: one name of a graph cannot be both an input and an output, or two outputs."""
    seen = {id(value) for value in taken}
    for value in results:
        yield value.clone() if id(value) in seen else value
        seen.add(id(value))


def export_onnx(model: StepModel, spec: StepSpec, directory: Path, opset: int = OPSET) -> list[Path]:
    """Write one graph for each entry, `{entry}.onnx`, over one set of weights in `weights.bin`.

    The graphs use standard operators only. `metadata_props["nsm.states"]` of each holds the table of its states as
    JSON; with it and `state_init.npz` any ONNX client can run the stream (see `state_table`).

    Args:
        model: in eval mode.
        spec: as declared by `model.spec(batch, tokens_per_call)`.
        directory: the bundle's folder for graphs; must exist.
        opset: ONNX operator set.

    Returns:
        Paths of the graphs.

    Raises:
        UnsupportedError: ONNX lacks an operator of the model; names it and its module.
        BuildError: the exporter failed, or a graph is not valid or does not have the declared inputs and outputs.
    """
    graphs = {}
    for entry in spec.entries:
        with _no_garbage_collection():
            graphs[entry.name] = _export_entry(model, spec, entry, opset)
    paths = save_shared(graphs, directory, WEIGHTS)
    check_graphs(paths)
    return paths


def _export_entry(model: StepModel, spec: StepSpec, entry: EntrySpec, opset: int) -> onnx.ModelProto:
    """The graph of one entry, with its weights inside."""
    reads, writes = spec.states_of(entry.reads), spec.states_of(entry.writes)
    state = model.initial_state(spec.batch)
    examples = [torch.zeros(item.shape, dtype=_DTYPES[item.dtype]) for item in entry.inputs]
    for item, example in zip(entry.inputs, examples, strict=True):
        if item.name == VALID:
            example.fill_(item.maximum or 0)
    examples += [state[item.name].detach().clone() for item in reads]
    inputs = [*(item.name for item in entry.inputs), *(item.past for item in reads)]
    outputs = [*(item.name for item in entry.outputs), *(item.present for item in writes)]
    program = capture(EntryModule(model, spec, entry).eval(), tuple(examples), model.kind)
    program = rewritten(program, tuple(examples))
    try:
        with quiet(), shared_operator_table():
            written = torch.onnx.export(
                program,
                tuple(examples),
                dynamo=True,
                opset_version=opset,
                input_names=inputs,
                output_names=outputs,
                verbose=False,
                optimize=False,  # `optimise` does it
            )
    except Exception as error:  # the exporter's errors have no common base
        raise failure(error, program, entry.name) from error
    if written is None:
        raise BuildError(f"The ONNX exporter returned no program for {entry.name}.")
    optimise(written.model)
    exact_division(written.model)
    proto = written.model_proto
    _name_nodes(proto)
    _strip(proto)
    proto.producer_name = "nsm"
    table = proto.metadata_props.add()
    table.key, table.value = STATES_KEY, json.dumps(state_table(spec, entry))
    _check_interface(proto, inputs, outputs, spec, entry, opset)
    return proto


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """An exporter makes objects by the million and few cycles; looking for those took a quarter of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def initial_arrays(model: StepModel, batch: int) -> Arrays:
    """The initial state as arrays, by name, lanes included."""
    state: State = model.initial_state(batch)
    return {name: np.ascontiguousarray(value.detach().numpy()) for name, value in state.items()}


def _name_nodes(proto: onnx.ModelProto) -> None:
    """Name every node after the module it comes from: `layers.0.feed_forward.2/MatMul`.

    A node outside every module's `forward` takes the name of the last layer.
    """
    names: set[str] = set()
    layer = ""
    for node in proto.graph.node:
        metadata = {item.key: item.value for item in node.metadata_props}
        scopes = ast.literal_eval(metadata.get(_SCOPES, "[]"))
        modules = [scope.removeprefix("model.") for scope in scopes if scope.startswith("model.")]
        if modules and modules[0].startswith("layers."):
            layer = ".".join(modules[0].split(".")[:2])
        stem = f"{modules[-1] if modules else layer or 'model'}/{node.op_type}"
        numbers = itertools.count(2)
        node.name = stem
        while node.name in names:
            node.name = f"{stem}.{next(numbers)}"
        names.add(node.name)


def _strip(proto: onnx.ModelProto) -> None:
    """Remove facts about this machine: source paths, stack traces, doc strings."""
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    del proto.graph.metadata_props[:]
    del proto.metadata_props[:]


def _check_interface(
    proto: onnx.ModelProto, inputs: list[str], outputs: list[str], spec: StepSpec, entry: EntrySpec, opset: int
) -> None:
    """The graph must have the declared names, in order, the declared static shapes, and standard operators only."""
    tokens = entry.inputs[0].shape[1] if entry.inputs else 0
    shapes = {item.past: item.shape for item in spec.states}
    shapes |= {item.present: item.present_shape(tokens) for item in spec.states}
    shapes |= {item.name: item.shape for item in (*entry.inputs, *entry.outputs)}
    for values, names in ((proto.graph.input, inputs), (proto.graph.output, outputs)):
        given = [value.name for value in values]
        if given != names:
            raise BuildError(f"The exporter named the graph's values {given}; declared are {names}.")
        for value in values:
            shape = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
            if shape != shapes[value.name]:
                raise BuildError(f"{value.name} has the shape {shape} in the graph; declared is {shapes[value.name]}.")
    domains = {(item.domain, item.version) for item in proto.opset_import}
    foreign = next((node for node in nodes_of(proto.graph) if node.domain not in ("", "ai.onnx")), None)
    if foreign is not None:
        raise BuildError(
            f"The exporter wrote an operator outside the ONNX standard: the node {foreign.name} is "
            f"{foreign.domain}::{foreign.op_type}."
        )
    if ("", opset) not in domains:
        raise BuildError(f"The exporter wrote the operator sets {sorted(domains)}; asked for was opset {opset}.")
