"""The target triton: a model repository for Triton Inference Server, whose sequence batcher keeps the states.

    triton/nsm/config.pbtxt   triton/nsm/initial_state/   triton/nsm/1/model.onnx   triton/nsm/1/weights.bin

The folder `nsm` may be renamed: the server uses the folder's name for a configuration without a name. docs/serving.md
lists the server's rules that this module follows, with their sources.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np

from nsm.bundle import STATE_INIT, WEIGHTS
from nsm.errors import MissingDependencyError, UnsupportedError
from nsm.export.builders.base import Built, Request
from nsm.runtimes.backends.triton import CONFIG, INITIAL, KINDS, as_paired
from nsm.spec import EntrySpec, StateSpec, TensorSpec
from nsm.trace import Arrays, load_arrays

if TYPE_CHECKING:
    import onnx

MODEL = "nsm"
"""Name of the model in the repository."""

SEQUENCES = 64
"""Number of sequences that the server runs at once; others wait until one ends."""

IDLE_MICROSECONDS = 60_000_000
"""Time without a request after which the server drops a sequence."""


def build(request: Request) -> Built:
    """Write the model of `step`, with every state that it reads or writes as implicit state.

    Raises:
        UnsupportedError: the server does not support a state of the model.
        MissingDependencyError: onnx is not installed.
    """
    if importlib.util.find_spec("onnx") is None:
        raise MissingDependencyError(
            "The target triton edits the graph of step, which needs the package onnx; it is not installed. "
            'Install it with: pip install "nsm-toolkit[triton]"'
        )
    from nsm.export.graphs import load_shared, save_shared

    entry = request.spec.entry("step")
    states = request.spec.states_of((*entry.reads, *entry.writes))
    check_states(states)
    folder = request.folder / MODEL
    version = folder / "1"
    version.mkdir(parents=True)
    graph = load_shared(request.graph("step"))
    complete(graph.graph, entry, states)
    save_shared({"model": graph}, version, WEIGHTS)
    initial = load_arrays(request.directory / STATE_INIT) if states else {}
    (folder / CONFIG).write_text(configuration(entry, states, initial), encoding="utf-8")
    learned = [state for state in states if not _is_zero(initial, state)]
    if learned:
        (folder / INITIAL).mkdir()
    for state in learned:
        array = np.ascontiguousarray(initial[state.name], state.numpy_dtype)
        (folder / INITIAL / _file(state)).write_bytes(array.tobytes())
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return Built(tuple(path.relative_to(request.directory).as_posix() for path in files), "cpu", _notes(request))


def check_states(states: Iterable[StateSpec]) -> None:
    """Raise `UnsupportedError` for states that the server does not support."""
    states = tuple(states)
    remedy = "Serve this model with nsm.open on another target, for instance onnxruntime."
    rings = [state.name for state in states if state.append_axis is not None]
    if rings:
        raise UnsupportedError(
            f"Triton replaces a state by an output of the graph; for {', '.join(rings)} the graph outputs only the new "
            f"rows of a ring buffer. {remedy}"
        )
    odd = [f"{s.name} ({s.dtype} {list(s.shape)})" for s in states if s.dtype not in KINDS]
    if odd:
        raise UnsupportedError(
            f"Triton supports states of the dtypes {', '.join(KINDS)}; given {', '.join(odd)}. {remedy}"
        )
    pairs = [(state.past, state.present) for state in states]
    wrong = [pair for pair in as_paired(pairs) if pair not in pairs]
    if wrong:
        past, present = wrong[0]
        raise UnsupportedError(
            f"Triton pairs the inputs and outputs of states in sorted order: it would feed the output {present} back "
            f"as the input {past}. Name the states so that the sorted orders match, such as past_state.NAME and "
            "present_state.NAME."
        )


def complete(graph: onnx.GraphProto, entry: EntrySpec, states: Iterable[StateSpec]) -> None:
    """Give every state both an input and an output, which the server requires.

    A state that `step` only reads is copied to its output; a state that it only writes gets an unused input.
    """
    from onnx import helper

    for state in states:
        kind = helper.np_dtype_to_tensor_dtype(state.numpy_dtype)
        if state.name not in entry.writes:
            graph.node.append(helper.make_node("Identity", [state.past], [state.present], f"{state.name}/Identity"))
            graph.output.append(helper.make_tensor_value_info(state.present, kind, state.shape))
        if state.name not in entry.reads:
            graph.input.append(helper.make_tensor_value_info(state.past, kind, state.shape))


def configuration(entry: EntrySpec, states: Iterable[StateSpec], initial: Arrays) -> str:
    """Return the text of config.pbtxt."""
    lines = [
        'backend: "onnxruntime"',
        "# The lanes are part of every shape: one request has the tokens of all of them.",
        "max_batch_size: 0",
        *(line for item in entry.inputs for line in ("input {", *_tensor(item), "}")),
        *(line for item in entry.outputs for line in ("output {", *_tensor(item), "}")),
        "sequence_batching {",
        f"  max_sequence_idle_microseconds: {IDLE_MICROSECONDS}",
        f"  oldest {{ max_candidate_sequences: {SEQUENCES} }}",
        *(f"  {line}" for state in states for line in _state(state, _is_zero(initial, state))),
        "}",
        "instance_group { kind: KIND_CPU count: 1 }",
    ]
    return "\n".join(lines) + "\n"


def _tensor(item: TensorSpec) -> list[str]:
    return [f"  name: {json.dumps(item.name)}", *_kind(item)]


def _kind(item: TensorSpec | StateSpec) -> list[str]:
    return [f"  data_type: {KINDS[item.dtype].triton}", f"  dims: {list(item.shape)}"]


def _state(state: StateSpec, zero: bool) -> list[str]:
    start = "zero_data: true" if zero else f"data_file: {json.dumps(_file(state))}"
    return [
        "state {",
        f"  input_name: {json.dumps(state.past)}",
        f"  output_name: {json.dumps(state.present)}",
        *_kind(state),
        "  initial_state {",
        f"    name: {json.dumps(state.name)}",
        *(f"  {line}" for line in _kind(state)),
        f"    {start}",
        "  }",
        "}",
    ]


def _file(state: StateSpec) -> str:
    return quote(state.name, safe="")


def _is_zero(initial: Arrays, state: StateSpec) -> bool:
    """Whether the initial value of a state is zero in every bit."""
    return not any(initial[state.name].tobytes())


def _notes(request: Request) -> tuple[str, ...]:
    lanes = request.spec.batch
    notes: tuple[str, ...] = (
        "the server was not run: parity ran its model.onnx in ONNX Runtime, with states fed back as in config.pbtxt",
    )
    if request.spec.capacity is not None:
        notes += (
            f"the server does not count tokens: end each sequence after at most {request.spec.capacity:,} tokens, the "
            "model's capacity, and start a new one",
        )
    if lanes > 1:
        notes += (f"a sequence of the server contains {lanes} streams, which start and end together; --batch 1: one",)
    return notes
