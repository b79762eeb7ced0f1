"""OnnxSource: an ONNX file as the source of a bundle. Needs onnx and onnxruntime, and no torch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from nsm.adapters.validate import Examination, examine
from nsm.bundle import WEIGHTS
from nsm.errors import InputError, UnsupportedError
from nsm.export.graphs import check_graphs, save_shared
from nsm.export.sources.onnx.file import Port, check_main, fix_inputs, fix_shapes, ports, read_onnx, real_inputs
from nsm.export.sources.onnx.flow import check_read, decision, doubts_of_flow
from nsm.export.sources.onnx.model import Foreign
from nsm.export.sources.onnx.normalize import normal_graph, spec_of
from nsm.export.sources.onnx.reference import Given, GivenRuntime
from nsm.export.sources.onnx.states import (
    check_answers,
    check_growth,
    choose_states,
    dependence_of,
    join_lanes,
    possible_axes,
    settle_ours,
    state_of,
    take_defaults,
)
from nsm.export.sources.onnx.validate import GraphStep, lane_axes
from nsm.export.sources.state_names import crossed, find_states
from nsm.export.sources.state_options import ZEROS, StateOption
from nsm.quantization import largest_weights
from nsm.results import Message
from nsm.runtimes.parity import Perturbation
from nsm.runtimes.session import Session
from nsm.spec import VALID, StepSpec, TensorSpec
from nsm.trace import Array, Arrays

CHUNK = 16
"""Tokens a call of a graph that takes any number, unless others are asked for."""


class OnnxSource:
    """A foreign graph; see `nsm.export.sources.base.Source`. The reference is the graph as it was given."""

    golden: list[Array]
    calibration: list[Array]
    examination: Examination

    def __init__(
        self,
        path: Path,
        foreign: Foreign,
        token: TensorSpec,
        fingerprint: str,
        doubts: Sequence[Message] = (),
        capacity: int | None = None,
    ) -> None:
        self.kind = f"ONNX graph {path.name}"
        self.fingerprint = fingerprint
        self.token_spec = token
        self.chunk_size = CHUNK if foreign.timed else 1
        self.golden, self.calibration = [], []
        self.parameters = sum(math.prod(tensor.dims) for tensor in foreign.model.graph.initializer)
        self._foreign, self.given = foreign, Given(foreign)
        self._doubts = doubts
        self._capacity = capacity

    @property
    def config(self) -> Mapping[str, Any]:
        graph = self._foreign
        states = {state.name: [state.past, state.present] for state in graph.states}
        return {"input": graph.main.name, "outputs": list(graph.answers), "states": states}

    @property
    def lanes(self) -> int | None:
        return self._foreign.lanes

    @property
    def largest_weights(self) -> Mapping[str, int]:
        return largest_weights(self._foreign.model)

    @property
    def messages(self) -> tuple[Message, ...]:
        graph = self._foreign
        takes = "any number of tokens" if graph.timed else "one token"
        lines = [
            f"input {graph.main.name}: {takes} a call, each {self.token_spec.dtype}{list(self.token_spec.shape)}; "
            f"outputs {', '.join(graph.answers)}"
        ]
        for state in graph.states:
            start = "the file that was given" if state.initial.any() else "zeros"
            lanes = "no lanes" if state.lane_axis is None else f"lanes on axis {state.lane_axis}"
            lines.append(
                f"state {state.name}: input {state.past}, output {state.present}, {state.dtype}{list(state.shape)}, "
                f"{lanes}, starts from {start}; found by {state.found}"
            )
        return (*map(Message, lines), *self._doubts, *self.examination.messages)

    def spec(
        self,
        batch: int = 1,
        tokens_per_call: int | None = None,
        debug_outputs: bool = False,  # noqa: ARG002
    ) -> StepSpec:
        """The entries: `step`, and `decode` where a call may have any number of tokens. There are no debug outputs."""
        if self.lanes == 1 != batch and self._foreign.decided:
            raise UnsupportedError(
                f"{self.kind} takes one stream at a time: {self._foreign.decided}, and one decision cannot hold for "
                f"several streams. Asked for are {batch} lanes. Export one lane, or a model that selects with Where."
            )
        if self.lanes is not None and batch != self.lanes:
            raise UnsupportedError(
                f"{self.kind} takes {self.lanes} streams at a time; asked for are {batch} lanes. Export it with a "
                "dynamic first axis of its input and of its states, or leave that axis open (--shape)."
            )
        length = self.chunk_size if tokens_per_call is None else tokens_per_call
        if length < 1 or (not self._foreign.timed and length != 1):
            raise InputError(
                f"{self.kind} takes {'at least one token' if self._foreign.timed else 'one token'} a call; given "
                f"{length}."
            )
        return replace(spec_of(self.given, batch, length, 1, self.token_spec), capacity=self._capacity)

    def check_sequence(self, sequence: Array) -> None:
        spec = self.token_spec
        if not len(sequence):
            raise InputError("The model takes at least one token; given none.")
        if spec.maximum is not None and not 0 <= int(sequence.min()) <= int(sequence.max()) <= spec.maximum:
            raise InputError(
                f"Token ids must lie in 0 .. {spec.maximum}; given {int(sequence.min())} .. {int(sequence.max())}."
            )

    def reference(self, spec: StepSpec, perturbation: Perturbation | None = None) -> Session:
        initial = self.initial_arrays(spec.batch)
        if perturbation is None:
            return Session(GivenRuntime(self.given, spec), spec, initial, self.fingerprint, "onnx")
        runtime = perturbation.runtime(GivenRuntime(Given(self._foreign.perturbed(perturbation)), spec))
        return Session(runtime, spec, initial, self.fingerprint, "onnx")

    def write_graphs(self, spec: StepSpec, directory: Path, opset: int) -> None:
        graphs = {entry.name: normal_graph(self._foreign, spec, entry, opset) for entry in spec.entries}
        check_graphs(save_shared(graphs, directory, WEIGHTS))

    def initial_arrays(self, batch: int) -> Arrays:
        return {state.name: state.initial_lanes(batch) for state in self._foreign.states}


def load_onnx(
    path: Path,
    states: Sequence[StateOption] = (),
    constants: Mapping[str, str] | None = None,
    vocab_size: int | None = None,
    shapes: Mapping[str, str] | None = None,
    data_input: str | None = None,
    no_states: Sequence[str] = (),
    capacity: int | None = None,
) -> OnnxSource:
    """Read a file, find its states, and see that it is the step it says it is.

    Args:
        path: of the `.onnx`; weights beside it may lie in other files.
        states: all of them; where none is named they are found by our metadata or by `find_pairs`.
        constants: inputs that are always the same, by name, as text: {"sr": "16000"}.
        vocab_size: of a graph over ids, where the number of embeddings does not tell.
        shapes: sizes of open axes of inputs, by name, as text: {"input": "batch,576"}.
        data_input: the input that takes tokens, where nothing else tells.
        no_states: outputs that are no states, whatever they are called.
        capacity: tokens that a stream takes from one reset to the next.

    Raises:
        InputError: no such file, or inputs, outputs and states that do not fit together.
        UnsupportedError: not a static step: a growing cache, dynamic dimensions, foreign operators.
    """
    model = read_onnx(path)
    fix_inputs(model, constants or {})
    if not states:
        settle_ours(path, model)
    defaults = take_defaults(model, states)
    fix_shapes(model, shapes or {})
    outputs = ports(list(model.graph.output))
    chosen = choose_states(path, model, states, data_input, no_states, defaults)
    inputs = real_inputs(model)
    dependence = dependence_of(model.graph)
    check_read(path, dependence, [option.past for option in chosen], outputs)
    for option in chosen:
        check_growth(inputs[option.past])
    pasts, presents = [option.past for option in chosen], [option.present for option in chosen]
    left = [port for port in inputs.values() if port.name not in pasts]
    if len(left) != 1:
        raise InputError(
            f"{path} has the inputs {', '.join(f'{p.name} {p.dtype}{list(p.shape)}' for p in inputs.values())}. "
            f"Besides the states ({', '.join(pasts)}), expected exactly one input, found {len(left)}: "
            f"{', '.join(port.name for port in left) or 'none'}. Make one that never changes a constant (--constant "
            "sr=16000), name all states (--state INPUT=OUTPUT, once for each), or join several data inputs into one."
        )
    join_lanes(model, left[0], [option.past for option in chosen])
    inputs = real_inputs(model)
    answers = tuple(name for name in outputs if name not in presents)
    if not answers:
        raise InputError(f"All outputs of {path}, {', '.join(outputs)}, are states; a step answers something.")
    main = inputs[left[0].name]
    if "tokens" in answers or VALID in answers:
        raise InputError(
            f"{path} has the outputs {', '.join(answers)}; tokens and {VALID} are what a step takes here. Give the "
            "output another name."
        )
    if not main.shape:
        raise InputError(f"The input {main.name} is a single number; expected [streams, ...].")
    check_main(path, main.name, main.shape)
    timed = len(main.shape) > 1 and isinstance(main.shape[1], str)
    _check_closed(main, timed)
    decided = decision(path, dependence, main, pasts)
    by_name = {port.name: port for port in (*inputs.values(), *outputs.values())}
    axes = {option.past: possible_axes(by_name[option.past], main.shape[0]) for option in chosen}

    def graph(options: list[StateOption]) -> Foreign:
        batch = main.shape[0]
        found = [
            state_of(o, by_name[o.past], by_name[o.present], batch, next(iter(axes[o.past]), None)) for o in options
        ]
        return Foreign(model, main, answers, tuple(found), timed, decided)

    if main.shape[0] != 1 and any(len(found) > 1 for found in axes.values()):
        guess = graph([replace(option, init=ZEROS) for option in chosen])
        axes |= lane_axes(Given(guess), _token(model, guess, vocab_size).maximum, axes)
    foreign = graph(chosen)
    settled = [option.present for option in find_states(list(constants or {}), list(outputs))]
    check_answers(path, [name for name in answers if name not in (*settled, *no_states)], chosen)
    token = _token(model, foreign, vocab_size)
    doubts = [
        *crossed(chosen, list(inputs), list(outputs)),
        *doubts_of_flow(dependence, foreign),
    ]
    source = OnnxSource(path, foreign, token, _fingerprint(foreign), doubts, capacity)
    step = GraphStep(source.given, token, source.kind, CHUNK, source.parameters, capacity)
    source.examination = examine(step)
    if source.examination.lanes != foreign.lanes:
        raise UnsupportedError(
            f"{source.kind} takes any number of streams by its shapes, and one by experiment: "
            f"{source.examination.why}. Fix the sizes that are said to be open: --shape {main.name}=1,..."
        )
    return source


def _fingerprint(foreign: Foreign) -> str:
    """SHA-256 over operators, weights and states, part by part: a whole model of 2 GB does not serialise."""
    graph = foreign.model.graph
    digest = hashlib.sha256()
    for part in (*graph.node, *graph.input, *graph.output):
        digest.update(part.SerializeToString(deterministic=True))
    for tensor in graph.initializer:
        digest.update(f"{tensor.name} {tensor.data_type} {list(tensor.dims)}".encode())
        digest.update(tensor.raw_data or tensor.SerializeToString(deterministic=True))
    for state in foreign.states:
        digest.update(f"{state.past} {state.present} {state.lane_axis}".encode() + state.initial.tobytes())
    return digest.hexdigest()


def _check_closed(main: Port, timed: bool) -> None:
    opened = [index for index, size in enumerate(main.shape) if isinstance(size, str) and index > int(timed)]
    if opened:
        raise UnsupportedError(
            f"The input {main.name} has the shape {list(main.shape)}: axis {opened[0]} is dynamic besides the "
            f"streams (axis 0) and time (axis 1). Fix its size: --shape {main.name}={_example(main)}"
        )


def _example(main: Port) -> str:
    """An example of --shape: all dimensions after the streams fixed."""
    return ",".join(str(size) if isinstance(size, int) or not axis else "512" for axis, size in enumerate(main.shape))


def _token(model: onnx.ModelProto, foreign: Foreign, vocab_size: int | None) -> TensorSpec:
    main, shape = foreign.main, foreign.token_shape
    if vocab_size is not None and (vocab_size < 1 or main.dtype != "int64"):
        raise InputError(
            f"--vocab-size {vocab_size}: it is the number of ids, at least 1, of a graph over ids; the input "
            f"{main.name} is {main.dtype}."
        )
    if main.dtype == "float32":
        return TensorSpec("tokens", shape, "float32")
    if main.dtype != "int64":
        raise UnsupportedError(f"The input {main.name} is {main.dtype}; tokens are float32, or int64 ids.")
    rows = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
    sizes = [
        rows[n.input[0]]
        for n in model.graph.node
        if n.op_type == "Gather" and n.input[1] == main.name and n.input[0] in rows
    ]
    if vocab_size is not None and sizes and vocab_size > sizes[0]:
        raise InputError(f"--vocab-size {vocab_size}: the graph has embeddings for {sizes[0]} ids.")
    size = vocab_size or (sizes[0] if sizes else None)
    if size is None:
        raise InputError(
            f"The input {main.name} takes ids, and how many there are cannot be read off the graph. Say it: "
            "--vocab-size N"
        )
    return TensorSpec("tokens", shape, "int64", None, 0, size - 1)
