"""A foreign ONNX graph behind the protocol of the examination; and where its states have their lanes, by experiment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from nsm.adapters.validate import Advice, Results, close
from nsm.errors import InputError, NsmError, UnsupportedError
from nsm.export.graphs import nodes_of
from nsm.export.sources.onnx.file import read_onnx, real_inputs
from nsm.export.sources.onnx.normalize import spec_of
from nsm.export.sources.onnx.reference import Given
from nsm.spec import TensorSpec
from nsm.trace import Array, Arrays


class GraphStep:
    """See `nsm.adapters.validate.Step`.

    Args:
        given: the graph.
        token: one lane and one token.
        kind: of the graph, for messages.
        chunk: tokens of a usual call, where a call takes any number.
        size: how many numbers the weights have.
        capacity: tokens that a stream may have, where somebody said so.
    """

    def __init__(self, given: Given, token: TensorSpec, kind: str, chunk: int, size: int, capacity: int | None) -> None:
        self._given = given
        self._specs: dict[tuple[int, int], tuple[TensorSpec, ...]] = {}
        graph = given.foreign
        self.kind, self.size, self.capacity = kind, size, capacity
        self.inputs: Sequence[TensorSpec] = (token,)
        self.outputs: Sequence[str] = graph.answers
        self.timed, self.chunk, self.lanes = graph.timed, chunk if graph.timed else 1, graph.lanes
        self.why = "the graph has one stream" if graph.lanes == 1 else ""
        main = graph.main.name
        self.advice = Advice(
            samples="Is it an overflow? Does a state divide by itself at the start?",
            length="If it only ever takes a fixed number of tokens, export it with a static axis 1: then these are one "
            "token.",
            lanes=f"Take one stream at a time: --shape {main}=1,..., or an export with an axis 0 of size 1.",
            state="Export the model with all that it carries as inputs and outputs, in eval mode.",
            random="Export the model in eval mode.",
            offline="Give the model over whole sequences: --offline WHOLE.onnx",
        )

    def initial(self, lanes: int) -> Arrays:
        return {state.name: state.initial_lanes(lanes) for state in self._given.foreign.states}

    def __call__(self, inputs: Mapping[str, Any], state: Arrays) -> Results:
        (tokens,) = inputs.values()
        graph, (lanes, count) = self._given.foreign, tokens.shape[:2]
        try:
            answers, after = self._given.step(np.ascontiguousarray(tokens), state)
            outputs = self._outputs(lanes, count)
        except UnsupportedError:
            raise
        except (NsmError, ValueError) as error:
            raise UnsupportedError(
                f"{self.kind} does not run with calls of {count} tokens on {lanes} streams: {error} Does it hold "
                "for other sizes than those that it was exported with? Fix those that are said to be open: --shape "
                f"{graph.main.name}=1,512"
            ) from error
        return {item.name: answers[item.name].reshape(item.shape) for item in outputs}, after

    def suspects(self) -> list[str]:
        return [
            f"the node {node.name} is a BatchNormalization in training mode: it normalises over the streams of a call"
            for node in nodes_of(self._given.foreign.model.graph)
            if node.op_type == "BatchNormalization" and any(a.name == "training_mode" and a.i for a in node.attribute)
        ]

    def _outputs(self, lanes: int, count: int) -> tuple[TensorSpec, ...]:
        if (lanes, count) not in self._specs:
            spec = spec_of(self._given, lanes, count, 1, self.inputs[0])
            self._specs[lanes, count] = spec.entry("step").outputs
        return self._specs[lanes, count]

    def offline(self, inputs: Arrays) -> Arrays | None:  # noqa: ARG002 - a file of it is compared later
        return None


def lane_axes(given: Given, maximum: int | None, possible: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Where states have their lanes, by experiment: the first lane of a state does not depend on the tokens of others.

    Args:
        given: the graph, with the first of the possible axes.
        maximum: the largest id; None for numbers.
        possible: axes that it may be, by input.

    Returns:
        Those that it can be, by input; all of them where it can be none, which the examination refuses.

    Raises:
        UnsupportedError: the graph does not run.
    """
    graph, random = given.foreign, np.random.default_rng(0)
    shape = (graph.lanes or 2, 4, *graph.token_shape)
    tokens: Array
    if maximum is not None:
        tokens = random.integers(0, maximum + 1, shape)
    else:
        tokens = np.abs(random.standard_normal(shape)).astype(np.float32) + np.float32(0.1)
    others = np.roll(tokens, 1, 1)
    others[0] = tokens[0]
    before, after = (_states(given, part) for part in (tokens, others))
    found = {}
    for state in graph.states:
        axes = list(possible[state.past])
        one, other = (state.given_layout(run[state.name]) for run in (before, after))
        found[state.past] = [axis for axis in axes if close(one.take(0, axis), other.take(0, axis))] or axes
    return found


def _states(given: Given, tokens: Array) -> Arrays:
    """The states after tokens [B, T, *token], one a call."""
    states = {state.name: state.initial_lanes(len(tokens)) for state in given.foreign.states}
    for index in range(tokens.shape[1]):
        try:
            _, states = given.step(np.ascontiguousarray(tokens[:, index : index + 1]), states)
        except (NsmError, ValueError) as error:
            raise UnsupportedError(
                f"The graph does not run with {len(tokens)} streams: {error} Fix the sizes that are said to be open: "
                f"--shape {given.foreign.main.name}=1,512"
            ) from error
    return states


def whole_graph(path: Path) -> tuple[Callable[[Array], Array], int | None]:
    """A function that runs a graph over a whole sequence [1, T, *token], and its T; None if T is dynamic.

    Raises:
        InputError: it has not one input, or its input has no axis of time.
    """
    model = read_onnx(path)
    inputs = list(real_inputs(model).values())
    if len(inputs) != 1 or len(inputs[0].shape) < 2:
        raise InputError(
            f"{path} has the inputs {', '.join(f'{p.name} {list(p.shape)}' for p in inputs)}; expected one, a whole "
            "sequence [1, T, *token]."
        )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    length = inputs[0].shape[1]

    def run(tokens: Array) -> Array:
        return np.asarray(session.run(None, {inputs[0].name: tokens.astype(inputs[0].dtype)})[0])

    return run, length if isinstance(length, int) else None
