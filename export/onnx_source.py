"""OnnxSource: an ONNX file as what bundles are made of. Needs onnx and onnxruntime, and no torch."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from nsm.errors import BuildError, InputError, NsmError, UnsupportedError
from nsm.export.onnx_file import Port, fix_inputs, ports, read_onnx, real_inputs
from nsm.export.onnx_normal import Foreign, normal_graph, spec_of
from nsm.export.onnx_states import choose_states, state_of
from nsm.export.source import OPSET
from nsm.export.state_options import StateOption
from nsm.export.weights import save_shared
from nsm.runtimes.onnxruntime_plain import load
from nsm.runtimes.session import Session
from nsm.spec import StepSpec, TensorSpec
from nsm.trace import Array, Arrays

WEIGHTS = "weights.bin"
CHUNK = 16
"""Tokens a call of a graph that takes any number, unless others are asked for."""
LENGTHS_TOLERANCE = 1e-4


class OnnxSource:
    """A foreign graph; see `nsm.export.source.Source`. The reference is its normal form, in fp32."""

    golden: list[Array]
    calibration: list[Array]

    def __init__(self, path: Path, foreign: Foreign, token: TensorSpec, fingerprint: str) -> None:
        self.kind = f"ONNX graph {path.name}"
        self.fingerprint = fingerprint
        self.token_spec = token
        self.chunk_size = CHUNK if foreign.timed else 1
        self.golden, self.calibration = [], []
        self.parameters = sum(math.prod(tensor.dims) for tensor in foreign.model.graph.initializer)
        self._foreign = foreign

    @property
    def config(self) -> Mapping[str, Any]:
        graph = self._foreign
        states = {state.name: [state.past, state.present] for state in graph.states}
        return {"input": graph.main.name, "outputs": list(graph.answers), "states": states}

    @property
    def lanes(self) -> int | None:
        graph = self._foreign
        if any(state.lane_axis is None for state in graph.states):
            return 1
        return None if isinstance(graph.batch, str) else graph.batch

    @property
    def remarks(self) -> tuple[str, ...]:
        graph = self._foreign
        takes = "any number of tokens" if graph.timed else "one token"
        lines = [
            f"input {graph.main.name}: {takes} a call, each {self.token_spec.dtype}{list(self.token_spec.shape)}; "
            f"outputs {', '.join(graph.answers)}"
        ]
        for state in graph.states:
            start = "the file that was given" if state.initial.any() else "zeros"
            lines.append(
                f"state {state.name}: input {state.past}, output {state.present}, {state.dtype}{list(state.shape)}, "
                f"lanes on axis {state.lane_axis}, starts from {start}; found by {state.found}"
            )
        return tuple(lines)

    def spec(
        self,
        batch: int = 1,
        tokens_per_call: int | None = None,
        debug_outputs: bool = False,  # noqa: ARG002
    ) -> StepSpec:
        """The entries: `step`, and `decode` where a call may have any number of tokens. There are no debug outputs."""
        if self.lanes is not None and batch != self.lanes:
            raise UnsupportedError(
                f"{self.kind} takes {self.lanes} streams at a time; asked for are {batch} lanes. Export it with a "
                "dynamic first axis of its input and of its states."
            )
        length = self.chunk_size if tokens_per_call is None else tokens_per_call
        if length < 1 or (not self._foreign.timed and length != 1):
            raise InputError(
                f"{self.kind} takes {'at least one token' if self._foreign.timed else 'one token'} a call; given "
                f"{length}."
            )
        return spec_of(self._foreign, batch, length, 1, self.token_spec)

    def check_sequence(self, sequence: Array) -> None:
        spec = self.token_spec
        if not len(sequence):
            raise InputError("The model takes at least one token; given none.")
        if spec.maximum is not None and not 0 <= int(sequence.min()) <= int(sequence.max()) <= spec.maximum:
            raise InputError(
                f"Token ids must lie in 0 .. {spec.maximum}; given {int(sequence.min())} .. {int(sequence.max())}."
            )

    def reference(self, spec: StepSpec, exact: bool = False) -> Session | None:
        if exact:  # not every operator has a kernel in fp64
            return None
        folder = tempfile.TemporaryDirectory(prefix="nsm-onnx-")
        self.write_graphs(spec, Path(folder.name), OPSET)
        files = {entry.name: Path(folder.name) / f"{entry.name}.onnx" for entry in spec.entries}
        return _Kept(
            folder, load(files, spec, "cpu", None), spec, self.initial_arrays(spec.batch), self.fingerprint, "onnx"
        )

    def write_graphs(self, spec: StepSpec, directory: Path, opset: int) -> None:
        graphs = {entry.name: normal_graph(self._foreign, spec, entry, opset) for entry in spec.entries}
        for path in save_shared(graphs, directory, WEIGHTS):
            try:
                onnx.checker.check_model(str(path), full_check=True)
            except Exception as error:  # raised from C++
                raise BuildError(f"The graph of {path.stem} is not valid ONNX: {error}") from error

    def initial_arrays(self, batch: int) -> Arrays:
        found = {}
        for state in self._foreign.states:
            axis = state.lane_axis
            first = state.initial[None] if axis is None else np.moveaxis(state.initial, axis, 0)
            found[state.name] = np.ascontiguousarray(np.repeat(first, batch, 0))
        return found


class _Kept(Session):
    """A session whose graphs lie in a folder that goes when it ends."""

    def __init__(self, folder: tempfile.TemporaryDirectory[str], *arguments: Any) -> None:
        super().__init__(*arguments)
        self._folder = folder

    def close(self) -> None:
        super().close()
        self._folder.cleanup()


def load_onnx(
    path: Path,
    states: Sequence[StateOption] = (),
    constants: Mapping[str, str] | None = None,
    vocab_size: int | None = None,
) -> OnnxSource:
    """Read a file, find its states, and see that it is the step it says it is.

    Args:
        path: of the `.onnx`; weights beside it may lie in other files.
        states: those that were named; without any they are found by our metadata or by their names.
        constants: inputs that are always the same, by name, as text: {"sr": "16000"}.
        vocab_size: of a graph over ids, where the number of embeddings does not tell.

    Raises:
        InputError: no such file, or inputs, outputs and states that do not fit together.
        UnsupportedError: what no static step can be: a cache that grows, open dimensions, foreign operators.
    """
    model = read_onnx(path)
    fix_inputs(model, constants or {})
    inputs, outputs = real_inputs(model), ports(list(model.graph.output))
    chosen = choose_states(model, inputs, outputs, states)
    pasts, presents = [option.past for option in chosen], [option.present for option in chosen]
    left = [port for port in inputs.values() if port.name not in pasts]
    if len(left) != 1:
        raise InputError(
            f"{path} has the inputs {', '.join(f'{p.name} {p.dtype}{list(p.shape)}' for p in inputs.values())}; when "
            f"the states ({', '.join(pasts)}) are taken away, one is to be left, but {len(left)} are: "
            f"{', '.join(port.name for port in left) or 'none'}. Make one that never changes a constant (--constant "
            "sr=16000), or name further states (--state INPUT=OUTPUT)."
        )
    answers = tuple(name for name in outputs if name not in presents)
    if not answers:
        raise InputError(f"All outputs of {path}, {', '.join(outputs)}, are states; a step answers something.")
    (main,) = left
    if not main.shape:
        raise InputError(f"The input {main.name} is a single number; expected is [streams, ...].")
    timed = len(main.shape) > 1 and isinstance(main.shape[1], str)
    _check_closed(main, timed)
    by_name = {port.name: port for port in (*inputs.values(), *outputs.values())}
    found = tuple(state_of(o, by_name[o.past], by_name[o.present], main.shape[0]) for o in chosen)
    foreign = Foreign(model, main, answers, found, timed)
    token = _token(model, foreign, vocab_size)
    source = OnnxSource(path, foreign, token, _fingerprint(foreign))
    _examine(source, foreign)
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
        digest.update(f"{state.past} {state.present}".encode() + state.initial.tobytes())
    return digest.hexdigest()


def _check_closed(main: Port, timed: bool) -> None:
    opened = [index for index, size in enumerate(main.shape) if isinstance(size, str) and index > int(timed)]
    if opened:
        raise UnsupportedError(
            f"The input {main.name} has the shape {list(main.shape)}: axis {opened[0]} is dynamic besides the "
            "streams (axis 0) and time (axis 1). Export the model with this size fixed."
        )


def _token(model: onnx.ModelProto, foreign: Foreign, vocab_size: int | None) -> TensorSpec:
    main, shape = foreign.main, foreign.token_shape
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
    size = vocab_size or (sizes[0] if sizes else None)
    if size is None:
        raise InputError(
            f"The input {main.name} takes ids, and how many there are cannot be read off the graph. Say it: "
            "--vocab-size N"
        )
    return TensorSpec("tokens", shape, "int64", None, 0, size - 1)


def _examine(source: OnnxSource, foreign: Foreign) -> None:
    """Run it: once, and where a call may have any number of tokens, in calls of other lengths.

    Raises:
        UnsupportedError: it does not run, or answers other lengths differently.
    """
    length = 2 * CHUNK if foreign.timed else 3
    lanes = source.lanes or 1
    generator = np.random.default_rng(0)
    token = source.token_spec
    shape = (lanes, length, *token.shape)
    tokens: Array = generator.standard_normal(shape).astype(np.float32)
    if token.maximum is not None:
        tokens = generator.integers(0, token.maximum + 1, shape)
    whole = _answers(source, tokens, length if foreign.timed else 1)
    # What is exported is a rewriting of the file, so that is held against the file itself.
    scale = max(float(np.abs(whole).max()), 1e-3)
    if not np.abs(_given(foreign, tokens).reshape(whole.shape) - whole).max() <= LENGTHS_TOLERANCE * scale:
        raise BuildError(
            f"{source.kind} answers differently in the form that nsm gives it than in its own. This is a fault of nsm: "
            "please report it with the file, or one like it."
        )
    if not foreign.timed:
        return
    for size in (CHUNK, 1):
        parts = _answers(source, tokens, size)
        scale = max(float(np.abs(whole).max()), 1e-3)
        if not np.abs(parts - whole).max() <= LENGTHS_TOLERANCE * scale:
            raise UnsupportedError(
                f"{source.kind} answers {length} tokens in one call differently than in calls of {size}: a length is "
                "built "
                "into it, or something is not carried as state. If it only ever takes a fixed number of tokens, "
                "export it with a static axis 1: then these are one token."
            )


def _given(foreign: Foreign, tokens: Array) -> Array:
    """The first output of the file itself over a sequence, by nothing but ONNX Runtime: [B, ...] of each call."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(foreign.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    lanes = len(tokens)
    states = {
        state.past: state.initial if state.lane_axis is None else np.repeat(state.initial, lanes, state.lane_axis)
        for state in foreign.states
    }
    found = []
    for part in [tokens] if foreign.timed else np.moveaxis(tokens, 1, 0):
        names = [foreign.answers[0], *(state.present for state in foreign.states)]
        answer, *after = session.run(names, {foreign.main.name: part, **states})
        states = {state.past: value for state, value in zip(foreign.states, after, strict=True)}
        found.append(np.asarray(answer))
    return found[0] if foreign.timed else np.stack(found, 1)


def _answers(source: OnnxSource, tokens: Array, size: int) -> Array:
    """The first output over a sequence, in calls of `size` tokens."""
    try:
        session = source.reference(source.spec(len(tokens), size))
        assert session is not None
        with session:
            parts = np.split(tokens, tokens.shape[1] // size, 1)
            name = source.config["outputs"][0]
            return np.concatenate([session.step(part)[name] for part in parts], 1)
    except UnsupportedError:
        raise
    except NsmError as error:
        raise UnsupportedError(
            f"{source.kind} does not run with calls of {size} tokens: {error}. Does the graph hold for other sizes "
            "than those that it was exported with?"
        ) from error
