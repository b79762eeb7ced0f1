"""PyTorch to ONNX: the step as a plain graph whose states are named, paired and described."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import click
import numpy as np
import onnx
import torch
from torch import Tensor, nn

from nsm.bundle import STATE_INIT
from nsm.errors import BuildError
from nsm.models.stream import State, StreamModel
from nsm.spec import StepSpec
from nsm.trace import Arrays

OPSET = 20
WEIGHTS = "weights.bin"
STATES_KEY = "nsm.states"


class StepModule(nn.Module):
    """A model's step with the state as a flat list: (tokens, valid, *past) -> (outputs, *present)."""

    def __init__(self, model: StreamModel, spec: StepSpec) -> None:
        super().__init__()
        self.model = model
        self.names = spec.state_names

    def forward(self, tokens: Tensor, valid: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        outputs, state = self.model.step(tokens, dict(zip(self.names, past, strict=True)), valid)
        return (outputs, *(state[name] for name in self.names))


def export_onnx(model: StreamModel, spec: StepSpec, directory: Path, opset: int = OPSET) -> Path:
    """Write `step.onnx` with its weights beside it in `weights.bin`.

    The graph uses standard operators only. `metadata_props["nsm.states"]` holds the table of states as JSON; with
    it and `state_init.npz` any ONNX client can run the stream (see `state_table`).

    Args:
        model: in eval mode.
        spec: as declared by `model.spec(batch, tokens_per_call)`.
        directory: the bundle's folder for graphs; must exist.
        opset: ONNX operator set.

    Returns:
        Path of `step.onnx`.

    Raises:
        BuildError: the exporter failed, or its graph does not have the declared inputs and outputs.
    """
    entry = spec.entry("step")
    state = model.initial_state(spec.batch)
    tokens = torch.zeros(
        entry.inputs[0].shape, dtype=torch.int64 if entry.inputs[0].dtype == "int64" else torch.float32
    )
    valid = torch.full(entry.inputs[1].shape, tokens.shape[1], dtype=torch.int64)
    past = tuple(state[name].detach().clone() for name in spec.state_names)
    inputs = [*(item.name for item in entry.inputs), *(item.past for item in spec.states)]
    outputs = [*(item.name for item in entry.outputs), *(item.present for item in spec.states)]
    path = directory / "step.onnx"
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # What the exporter warns of concerns its own use of torch; what matters here is checked below.
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                StepModule(model, spec).eval(),
                (tokens, valid, *past),
                dynamo=True,
                opset_version=opset,
                input_names=inputs,
                output_names=outputs,
                verbose=False,
            )
    except Exception as error:  # the exporter's errors have no common base
        raise BuildError(f"The ONNX exporter failed: {click.unstyle(str(error))}") from error
    finally:
        logger.setLevel(level)
    if program is None:
        raise BuildError("The ONNX exporter returned no program.")
    proto = program.model_proto
    _strip(proto)
    proto.producer_name = "nsm"
    entry_meta = proto.metadata_props.add()
    entry_meta.key, entry_meta.value = STATES_KEY, json.dumps(state_table(spec))
    _check_interface(proto, inputs, outputs, spec, opset)
    onnx.save(proto, str(path), save_as_external_data=True, location=WEIGHTS, size_threshold=1024)
    onnx.checker.check_model(str(path), full_check=True)
    return path


def state_table(spec: StepSpec) -> list[dict[str, object]]:
    """The table of states as it stands in the graph's metadata.

    For each state: `name`; `past` and `present`, the graph's input and output; `shape`, `dtype`, `batch_axis`;
    and `init`: "zeros", or the file (relative to the graph) and key of the initial value.
    """
    return [
        {
            "name": state.name,
            "past": state.past,
            "present": state.present,
            "shape": list(state.shape),
            "dtype": state.dtype,
            "batch_axis": state.batch_axis,
            "init": "zeros" if state.init == "zeros" else {"file": f"../{STATE_INIT}", "key": state.name},
        }
        for state in spec.states
    ]


def initial_arrays(model: StreamModel, batch: int) -> Arrays:
    """The initial state as arrays, by name, lanes included."""
    state: State = model.initial_state(batch)
    return {name: np.ascontiguousarray(value.detach().numpy()) for name, value in state.items()}


def _strip(proto: onnx.ModelProto) -> None:
    """Remove what the exporter writes about this machine: source paths, stack traces, doc strings."""
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    del proto.graph.metadata_props[:]
    del proto.metadata_props[:]


def _check_interface(proto: onnx.ModelProto, inputs: list[str], outputs: list[str], spec: StepSpec, opset: int) -> None:
    """The graph must have the declared names, in order, the declared static shapes, and standard operators only."""
    shapes = {item.past: item.shape for item in spec.states} | {item.present: item.shape for item in spec.states}
    entry = spec.entry("step")
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
    used = {node.domain for node in proto.graph.node}
    if used - {"", "ai.onnx"}:
        raise BuildError(f"The graph uses operators outside the ONNX standard: domains {sorted(used)}.")
    if ("", opset) not in domains:
        raise BuildError(f"The exporter wrote the operator sets {sorted(domains)}; asked for was opset {opset}.")
