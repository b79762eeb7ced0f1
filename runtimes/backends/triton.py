"""Triton Inference Server: one model of its repository, with the server's handling of state.

This backend does not run the server. It reads the same files: config.pbtxt, the initial states and model.onnx. The
graph runs in ONNX Runtime, as in the server's ONNX Runtime backend.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from nsm.errors import BuildError, BundleDamagedError, RunError
from nsm.runtimes.base import CheckedRuntime, Handles, Runtime, State, all_finite
from nsm.spec import StepSpec
from nsm.trace import Array, Arrays

CONFIG = "config.pbtxt"
INITIAL = "initial_state"
"""Folder of a model from which the server reads non-zero initial states."""


class Kind(NamedTuple):
    """Names of each dtype in Triton and ONNX Runtime."""

    triton: str
    onnxruntime: str


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "bool": Kind("TYPE_BOOL", "tensor(bool)"),
        "uint8": Kind("TYPE_UINT8", "tensor(uint8)"),
        "int8": Kind("TYPE_INT8", "tensor(int8)"),
        "int32": Kind("TYPE_INT32", "tensor(int32)"),
        "int64": Kind("TYPE_INT64", "tensor(int64)"),
        "float16": Kind("TYPE_FP16", "tensor(float16)"),
        "float32": Kind("TYPE_FP32", "tensor(float)"),
        "float64": Kind("TYPE_FP64", "tensor(double)"),
    }
)
_PRECISIONS = {"TYPE_FP16": "fp16", "TYPE_FP32": "fp32", "TYPE_FP64": "fp64"}

_AGAIN = "Build the target again."

Message = dict[str, list[Any]]
"""Fields by name, each with all its values."""


@dataclass(frozen=True)
class Carried:
    """A state of the repository: its graph input, graph output and initial value."""

    name: str
    past: str
    present: str
    data_type: str
    start: Array


@dataclass(frozen=True)
class Served:
    """Contents of a config.pbtxt, as (data type, dims) by name."""

    inputs: Mapping[str, tuple[str, tuple[int, ...]]]
    outputs: Mapping[str, tuple[str, tuple[int, ...]]]
    states: tuple[Carried, ...]


def load(
    files: Mapping[str, Path],
    spec: StepSpec,
    device: str,  # noqa: ARG001
    threads: int | None,
    precision: str = "fp32",  # noqa: ARG001
) -> Runtime:
    """Open a model of a repository: only the graph `step`, because Triton models cannot share a state.

    Args:
        files: `1/model.onnx` of the model.
        spec: spec of the model, with `step` as the only entry.
        device: "cpu", the only device of this target.
        threads: threads within an operation (default: ONNX Runtime's choice).
        precision: precision of the artifact.

    Raises:
        BuildError: ONNX Runtime refuses the graph, or the server would refuse the configuration.
        BundleDamagedError: the configuration or a state cannot be read.
    """
    ort: Any = importlib.import_module("onnxruntime")
    path = files["step"]
    if not path.parent.name.isdigit():
        raise BundleDamagedError(f"{path} is not in a model's version folder; expected nsm/1/{path.name}. {_AGAIN}")
    served = read_model(path.parent.parent)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        graph = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the binding's classes have no common base of their own
        raise BuildError(f"ONNX Runtime cannot open {path}: {error}") from error
    check_loads(served, graph, path)
    return TritonRuntime(served, graph, spec)


class TritonRuntime(CheckedRuntime):
    """One sequence of a model in a repository.

    Args:
        served: the configuration.
        graph: an `onnxruntime.InferenceSession`.
        spec: spec of the model.
    """

    def __init__(self, served: Served, graph: Any, spec: StepSpec) -> None:
        super().__init__(Handles())
        self.effective_precision = "+".join(
            sorted({_PRECISIONS[kind] for kind, _ in served.outputs.values() if kind in _PRECISIONS})
        )
        self._graph = graph
        self._spec = spec
        self._outputs = [item.name for item in spec.entry("step").outputs]
        self._states = {state.name: state for state in served.states}
        self._pairs = as_paired([(state.past, state.present) for state in served.states])
        self._held: Arrays = {}
        self._untouched: Arrays = {}
        self._looked_at: list[Array] = []

    def load_state(self, arrays: Mapping[str, Array]) -> State:
        self._check_open()
        if not self._held:
            self._check_start(arrays)
        self._handles.consume()
        self._held = {
            state.past: np.array(arrays[name], state.start.dtype, order="C") for name, state in self._states.items()
        }
        self._untouched = {name: np.array(value) for name, value in arrays.items() if name not in self._states}
        self._looked_at = [*self._held.values(), *self._untouched.values()]
        return self._handles.new()

    def call(self, entry: str, inputs: Mapping[str, Array], state: State) -> tuple[Arrays, State]:
        self._check(state)
        names = [*self._outputs, *(present for _, present in self._pairs)]
        try:
            results = dict(zip(names, self._graph.run(names, {**inputs, **self._held}), strict=True))
        except Exception as error:  # the binding's classes have no common base of their own
            raise RunError(f"ONNX Runtime failed while it ran {entry}: {error}") from error
        self._handles.check(state)  # a signal handler may have used it in the meantime
        handle = self._handles.new()
        self._held = {past: results[present] for past, present in self._pairs}
        self._looked_at = list(results.values())
        return {name: results[name] for name in self._outputs}, handle

    def read_state(self, state: State) -> Arrays:
        self._check(state)
        held = {name: self._held[item.past] for name, item in self._states.items()}
        return {name: ({**held, **self._untouched})[name].copy() for name in self._spec.state_names}

    def finite(self, state: State) -> bool:
        self._check(state)
        return all_finite(value.reshape(-1) for value in self._looked_at if value.dtype.kind == "f")

    def close(self) -> None:
        self._open = False
        self._graph = None
        self._held, self._untouched, self._looked_at = {}, {}, []

    def _check_start(self, arrays: Mapping[str, Array]) -> None:
        """Check that bundle and repository have the same initial state."""
        unknown = sorted(set(self._states) - set(arrays))
        if unknown:
            raise BundleDamagedError(f"The repository has states that the bundle lacks: {unknown}. {_AGAIN}")
        for name, state in self._states.items():
            if state.start.tobytes() != np.asarray(arrays[name], state.start.dtype).tobytes():
                raise BundleDamagedError(
                    f"The repository and the bundle have different initial values of {name}. {_AGAIN}"
                )


def check_loads(served: Served, graph: Any, path: Path) -> None:
    """Raise `BuildError` if the configuration does not match the graph.

    The server requires every graph input exactly once, as a request input or a state, with data type and dims. It does
    not check the outputs of states when it loads a model: a wrong one fails, or is swapped, at the first request.
    """
    declared = {("input", name): item for name, item in served.inputs.items()}
    declared |= {("output", name): item for name, item in served.outputs.items()}
    for state in served.states:
        declared["input", state.past] = declared["output", state.present] = (state.data_type, state.start.shape)
    types = {kind.onnxruntime: kind.triton for kind in KINDS.values()}
    sides = (("input", graph.get_inputs()), ("output", graph.get_outputs()))
    there = {(side, v.name): (types.get(v.type, v.type), tuple(v.shape)) for side, values in sides for v in values}
    wrong = [
        f"the {side} {name} is {declared.get((side, name), 'not named')} there and {there.get((side, name), 'absent')} "
        "in the graph"
        for side, name in {**declared, **there}
        if declared.get((side, name)) != there.get((side, name))
    ]
    pairs = [(state.past, state.present) for state in served.states]
    if set(as_paired(pairs)) != set(pairs):
        wrong.append("the inputs and outputs of the states do not pair when sorted by name")
    if wrong:
        raise BuildError(f"{path.parent.parent / CONFIG} does not fit {path.name}: {wrong[0]}. {_AGAIN}")


def as_paired(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the server's pairs of state inputs and outputs, which ignore those in the configuration.

    The server keeps both in maps sorted by name, as bytes, and the k-th output becomes the k-th input
    (`SequenceStates::OutputState` in its sources).
    """
    pasts, presents = (sorted((pair[side] for pair in pairs), key=str.encode) for side in (0, 1))
    return list(zip(pasts, presents, strict=True))


def read_model(folder: Path) -> Served:
    """Read a model's configuration, with the initial states.

    Raises:
        BundleDamagedError: a file is missing, is outside the model's folder, or is invalid for the server.
    """
    try:
        config = parse(_inside(folder, folder / CONFIG).read_text(encoding="utf-8"))
        (batching,) = config["sequence_batching"]
        states = tuple(_carried(item, folder) for item in batching.get("state", []))
        if len({state.name for state in states}) < len(states):
            raise ValueError("two states have the same name")
        return Served(
            inputs={_text(item, "name"): _tensor(item) for item in config["input"]},
            outputs={_text(item, "name"): _tensor(item) for item in config["output"]},
            states=states,
        )
    except Exception as error:  # on an edited text, the parser and numpy may raise any exception
        raise BundleDamagedError(f"{folder / CONFIG} is no valid Triton configuration ({error!r}). {_AGAIN}") from error


def _inside(folder: Path, path: Path) -> Path:
    """Return the path of a file, if it is inside the folder."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} is outside the model's folder")
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    return path


def _text(item: Message, field: str) -> str:
    (value,) = item[field]
    if not isinstance(value, str) or not value.encode():
        raise ValueError(f"{field} is {value!r}; expected a string")
    return value


def _tensor(item: Message) -> tuple[str, tuple[int, ...]]:
    dims = tuple(item["dims"])
    if not all(isinstance(size, int) for size in dims):
        raise ValueError(f"dims are {list(dims)}; expected integers")
    return _text(item, "data_type"), dims


def _carried(item: Message, folder: Path) -> Carried:
    data_type, dims = _tensor(item)
    (initial,) = item["initial_state"]
    if _tensor(initial) != (data_type, dims):
        raise ValueError(f"{_text(item, 'input_name')} and its initial state have different dtypes or dims")
    dtype = {kind.triton: np.dtype(name) for name, kind in KINDS.items()}[data_type]
    if initial.get("zero_data") == ["true"]:
        start = np.zeros(dims, dtype)
    else:
        content = _inside(folder, folder / INITIAL / _text(initial, "data_file")).read_bytes()
        start = np.frombuffer(content, dtype, math.prod(dims)).reshape(dims)
    return Carried(_text(initial, "name"), _text(item, "input_name"), _text(item, "output_name"), data_type, start)


_COMMENT = re.compile(r'("(?:[^"\\]|\\.)*")|#[^\n]*')
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\w.+-]+|[{}\[\]:,]')


def parse(text: str) -> Message:
    """Parse the subset of protobuf's text format that a config.pbtxt uses, with `#` comments.

    Strings and numbers become str and int; words stay strings.

    Raises:
        ValueError: the text is not in this format.
    """
    tokens = iter([*_TOKEN.findall(_COMMENT.sub(lambda found: found[1] or " ", text)), "}"])
    try:
        message = _message(tokens)
    except StopIteration:
        raise ValueError("a closing bracket is missing") from None
    if next(tokens, None) is not None:
        raise ValueError("unexpected closing bracket")
    return message


def _message(tokens: Iterator[str]) -> Message:
    found: Message = {}
    name = next(tokens)
    while name != "}":
        if not name.isidentifier():
            raise ValueError(f"invalid field name {name}")
        values, token = found.setdefault(name, []), next(tokens)
        token = next(tokens) if token == ":" else token
        if token == "[":
            while (token := next(tokens)) != "]":
                values += [] if token == "," else [_value(token, tokens)]
        else:
            values.append(_value(token, tokens))
        name = next(tokens)
    return found


def _value(token: str, tokens: Iterator[str]) -> Any:
    if token == "{":
        return _message(tokens)
    if token.startswith('"'):
        return json.loads(token)
    return int(token) if token.lstrip("-").isdigit() else token
