"""Reference runtime: the original graph, unoptimized, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import onnxruntime as ort

from nsm.errors import RunError, UnsupportedError
from nsm.export.sources.onnx.file import Port
from nsm.export.sources.onnx.model import Foreign
from nsm.runtimes import CheckedRuntime, Handles, State, all_finite
from nsm.spec import VALID, StepSpec
from nsm.trace import Array, Arrays


class Given:
    """The file's own graph in ONNX Runtime, without optimisation; opened when it is first used."""

    def __init__(self, foreign: Foreign) -> None:
        self.foreign = foreign
        self._shapes: dict[tuple[int, int], dict[str, Port]] = {}

    @cached_property
    def _session(self) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        try:
            return ort.InferenceSession(
                self.foreign.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the binding's classes have no common base of their own
            raise UnsupportedError(
                f"ONNX Runtime cannot open the graph ({error}), so there is nothing that what is made of it could be "
                "compared with."
            ) from error

    def shapes(self, batch: int, length: int) -> dict[str, Port]:
        """The outputs that are not states, in a call of so many tokens on so many streams: found by a call.

        Raises:
            UnsupportedError: it does not run so, or a state has another shape after the call.
        """
        if (batch, length) not in self._shapes:
            graph = self.foreign
            count = [length] if graph.timed else [1]
            tokens = np.zeros((batch, *count, *graph.token_shape), graph.main.dtype)
            states = {state.name: state.initial_lanes(batch) for state in graph.states}
            try:
                answers, after = self.step(tokens, states)
            except (RunError, ValueError) as error:  # the latter: an axis that there is not
                raise UnsupportedError(
                    f"The graph does not run with {batch} streams and {length} tokens a call: {error}. Is a size built "
                    "in that is said to be open? Fix it: --shape INPUT=1,512"
                ) from error
            for state in graph.states:
                if after[state.name].shape != states[state.name].shape:
                    raise UnsupportedError(
                        f"The state {state.past} has the shape {list(states[state.name].shape)} before a step, and "
                        f"{state.present} has {list(after[state.name].shape)} after it, lanes first. Are they paired "
                        "rightly? A state keeps its shape; a cache that grows cannot be one."
                    )
            self._shapes[batch, length] = {
                name: Port(name, value.shape, str(value.dtype)) for name, value in answers.items()
            }
        return self._shapes[batch, length]

    def step(self, tokens: Array, states: Mapping[str, Array]) -> tuple[Arrays, Arrays]:
        """One call.

        Args:
            tokens: [B, K, *token].
            states: by name, lanes first.

        Returns:
            The outputs in the graph's own shapes, and the states after the call, lanes first.

        Raises:
            RunError: the graph failed.
        """
        graph = self.foreign
        feed = {graph.main.name: tokens if graph.timed else tokens[:, 0]}
        feed |= {state.past: state.given_layout(states[state.name]) for state in graph.states}
        names = [*graph.answers, *(state.present for state in graph.states)]
        try:
            values = [np.asarray(value) for value in self._session.run(names, feed)]
        except Exception as error:  # see above
            raise RunError(f"ONNX Runtime failed while it ran the graph as it was given: {error}") from error
        after = {
            state.name: state.lanes_first(value)
            for state, value in zip(graph.states, values[len(graph.answers) :], strict=True)
        }
        return dict(zip(graph.answers, values, strict=False)), after


class GivenRuntime(CheckedRuntime):
    """The given graph under a `Session`; see `nsm.runtimes.base.Runtime`."""

    effective_precision = "fp32"

    def __init__(self, given: Given, spec: StepSpec) -> None:
        super().__init__(Handles())
        self._given, self._spec = given, spec
        self._state: Arrays = {}
        self._answered: Arrays = {}

    def load_state(self, arrays: Mapping[str, Array]) -> State:
        self._check_open()
        self._handles.consume()
        self._state = {name: np.array(value) for name, value in arrays.items()}
        self._answered = {}
        return self._handles.new()

    def call(self, entry: str, inputs: Mapping[str, Array], state: State) -> tuple[Arrays, State]:
        self._check(state)
        answers, after = self._given.step(inputs["tokens"], self._state)
        if VALID in inputs:
            runs = inputs[VALID] > 0
            for name, new in after.items():
                after[name] = np.where(runs.reshape(-1, *[1] * (new.ndim - 1)), new, self._state[name])
        handle = self._handles.new()
        self._state = after
        self._answered = {item.name: answers[item.name].reshape(item.shape) for item in self._spec.entry(entry).outputs}
        return {name: np.array(value) for name, value in self._answered.items()}, handle

    def read_state(self, state: State) -> Arrays:
        self._check(state)
        return {name: np.array(value) for name, value in self._state.items()}

    def finite(self, state: State) -> bool:
        self._check(state)
        arrays = (*self._state.values(), *self._answered.values())
        return all_finite([array.reshape(-1) for array in arrays if array.dtype.kind == "f"])

    def close(self) -> None:
        self._open = False
        self._state = {}
