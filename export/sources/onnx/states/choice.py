"""Which inputs and outputs of a foreign ONNX graph are its states."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from nsm.bundle import STATE_INIT
from nsm.errors import InputError, UnsupportedError
from nsm.export.graphs import STATES_KEY
from nsm.export.sources.onnx.file import Port, default_inputs, ports, real_inputs, take_default
from nsm.export.sources.onnx.states.ambiguity import ask
from nsm.export.sources.onnx.states.dependence import dependence_of
from nsm.export.sources.onnx.states.pairing import find_pairs
from nsm.export.sources.onnx.states.recurrent import restarts
from nsm.export.sources.state_names import find_orphans, find_states, state_name
from nsm.export.sources.state_options import ZEROS, StateOption
from nsm.trace import Array


@dataclass(frozen=True)
class GraphState:
    """One state of a foreign graph.

    Args:
        name: in the bundle.
        past, present: the graph's input and output.
        shape: of one stream, in the graph's own layout, of size 1 on the lane axis.
        lane_axis: None where there is none.
        dtype: of both.
        initial: [*shape], the value before the first step.
        found: how, for people.
    """

    name: str
    past: str
    present: str
    shape: tuple[int, ...]
    lane_axis: int | None
    dtype: str
    initial: Array
    found: str

    def initial_lanes(self, batch: int) -> Array:
        """The value before the first step, [B, ...]: lanes first."""
        first = self.initial[None] if self.lane_axis is None else np.moveaxis(self.initial, self.lane_axis, 0)
        return np.ascontiguousarray(np.repeat(first, batch, 0))

    def given_layout(self, value: Array) -> Array:
        """A value with its lanes first, as the graph takes it."""
        if self.lane_axis is None:
            return np.array(value[0], order="C")  # np.ascontiguousarray gives a single number an axis
        return np.ascontiguousarray(np.moveaxis(value, 0, self.lane_axis))

    def lanes_first(self, value: Array) -> Array:
        """An output of the graph with its lanes first."""
        return value[None] if self.lane_axis is None else np.moveaxis(value, self.lane_axis, 0)


def choose_states(
    path: Path,
    model: onnx.ModelProto,
    named: Sequence[StateOption],
    main: str | None,
    no_states: Sequence[str],
    defaults: Mapping[str, Array],
) -> list[StateOption]:
    """The states that were named, or else those of our own metadata, or else those that `find_pairs` finds.

    Args:
        path, model: the file.
        named: by the user; with any of them nothing is guessed.
        main: the input that takes tokens, where the user named it.
        no_states: outputs that the user says are none.
        defaults: values that inputs had, from which their states start.

    Raises:
        InputError: an undefined name, two states with one output, none at all, or several possibilities.
    """
    inputs, outputs = real_inputs(model), ports(list(model.graph.output))
    for name in filter(None, [main]):
        _check_name("input", name, inputs)
    for name in no_states:
        _check_name("output", name, outputs)
    chosen = []
    for option in named or find_ours(path, model) or _found(path, model, main, no_states, defaults):
        _check_name("input", option.past, inputs)
        present = option.present
        if present not in outputs and present.isdigit() and int(present) < len(outputs):
            present = list(outputs)[int(present)]
        _check_name("output", present, outputs)
        value = defaults.get(option.past) if option.init == ZEROS else None
        chosen.append(replace(option, present=present, value=value))
    presents = [option.present for option in chosen]
    twice = next((name for name in presents if presents.count(name) > 1), None)
    if twice is not None:
        pasts = [option.past for option in chosen if option.present == twice]
        raise InputError(f"The output {twice} is to become the states {' and '.join(pasts)}; each has one of its own.")
    for option in chosen:
        if option.past == main or option.present in no_states:
            said = f"--input {main}" if option.past == main else f"--no-state {option.present}"
            raise InputError(f"{said} contradicts --state {option.past}={option.present}. Leave one of them out.")
    return chosen


def _found(
    path: Path, model: onnx.ModelProto, main: str | None, no_states: Sequence[str], defaults: Mapping[str, Array]
) -> list[StateOption]:
    """The states that the graph shows.

    Raises:
        InputError: there are none, or several possibilities.
    """
    pairing = find_pairs(model, main, no_states, defaults)
    for pair in pairing.states:
        check_growth(pairing.inputs[pair.past])
    if pairing.ambiguous:
        raise InputError(ask(path, pairing))
    if pairing.states:
        return [StateOption(pair.past, pair.present, found=pair.found) for pair in pairing.states]
    reset = restarts(dependence_of(model.graph), ())
    if reset:
        raise InputError(
            f"No states were found: no output of {path} is fed back to an input, and {' and '.join(reset)} "
            f"{'is' if len(reset) == 1 else 'are'} reset in every call, so no call depends on the calls before it. "
            "Export the model with the initial state as an argument and the last state as a result."
        )
    raise InputError(
        f"No states were found among the inputs, {', '.join(pairing.inputs)}, and outputs, "
        f"{', '.join(pairing.outputs)}. Name them with --state INPUT=OUTPUT, once for each."
    )


def check_answers(path: Path, answers: Sequence[str], states: Sequence[StateOption]) -> None:
    """Refuse outputs that are no states here, and by their names are.

    Args:
        path: of the file.
        answers: the outputs that are left when those of states are taken away.
        states: as they are paired.

    Raises:
        InputError: a new state would be lost.
    """
    orphans = find_orphans(answers)
    if orphans:
        pairs = ", ".join(f"{option.past}={option.present}" for option in states)
        raise InputError(
            f"{path} gives {', '.join(orphans)}: by the name a state after a step, which no input takes in (the states "
            f"are {pairs}). Export the model with that state as an input, or name the input that takes it: --state "
            f"INPUT={orphans[0]}. If it is an output of the step and no state: --no-state {orphans[0]}."
        )


def take_defaults(model: onnx.ModelProto, named: Sequence[StateOption]) -> dict[str, Array]:
    """The default values of inputs that are states, by name or by convention; they have none any more, in place.

    Before version 4 of the format all weights were listed as inputs, which none of them is.
    """
    if model.ir_version < 4:
        return {}
    outputs = [value.name for value in model.graph.output]
    states = {option.past for option in (*named, *find_states(list(default_inputs(model)), outputs))}
    return {name: take_default(model, name) for name in default_inputs(model) if name in states}


def check_growth(past: Port) -> None:
    """Refuse a state with more open axes than that of the streams.

    Raises:
        UnsupportedError: it has.
    """
    opened = [index for index, size in enumerate(past.shape) if isinstance(size, str)]
    if len(opened) > 1:
        raise UnsupportedError(
            f"The state {past.name} has the shape {list(past.shape)}: axes {' and '.join(map(str, opened))} are "
            "open, and at most that of the streams may be. A step has static shapes, so a cache that grows cannot be "
            f"its state: carry a window of fixed length, or fix what is of one size: --shape {past.name}=..."
        )


def join_lanes(model: onnx.ModelProto, main: Port, pasts: Sequence[str]) -> None:
    """Where a state has one open axis, and it has a name of its own, it is that of the streams; in place.

    Exporters often give the streams another name in every input, or none. That they are is seen when the graph runs.
    """
    inputs = real_inputs(model)
    for value in model.graph.input:
        opened = [size for size in inputs[value.name].shape if isinstance(size, str)] if value.name in pasts else []
        if main.shape and len(opened) == 1 and opened[0] not in main.shape:
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param == opened[0]:
                    if isinstance(main.shape[0], int):
                        dim.dim_value = main.shape[0]
                    else:
                        dim.dim_param = main.shape[0]


def settle_ours(path: Path, model: onnx.ModelProto) -> None:
    """Adapt a graph that nsm wrote, in place: states that are only read become constants, those only written go.

    Raises:
        InputError: the value cannot be read, or the metadata is damaged.
    """
    for row in _table(model):
        past, present = row["past"], row["present"]
        if past and not present:
            for value in [item for item in model.graph.input if item.name == past]:
                (port,) = ports([value]).values()
                if any(isinstance(size, str) for size in port.shape):
                    raise UnsupportedError(
                        f"The input {past} has the shape {list(port.shape)}; the metadata {STATES_KEY} says that it is "
                        "constant, and a constant has a static shape. Was the graph edited? Export it again."
                    )
                shape = tuple(int(size) for size in port.shape)
                array = _option(path, row).initial(shape, port.dtype)
                model.graph.initializer.append(onnx.numpy_helper.from_array(array, past))
                model.graph.input.remove(value)
        if present and not past:
            for value in [item for item in model.graph.output if item.name == present]:
                model.graph.output.remove(value)


def find_ours(path: Path, model: onnx.ModelProto) -> list[StateOption]:
    """The states that the metadata of our own graphs names; none in a graph without it."""
    return [_option(path, row) for row in _table(model) if row["past"] and row["present"]]


def _option(path: Path, row: Mapping[str, Any]) -> StateOption:
    option = StateOption(str(row["past"]), str(row["present"]), found=f"the metadata {STATES_KEY}")
    if row["init"] == ZEROS:
        return option
    # Where our bundles keep it, whatever path an edited table names.
    return replace(option, init=str(path.parent.parent / STATE_INIT), key=str(row["name"]))


def _table(model: onnx.ModelProto) -> list[dict[str, Any]]:
    """The metadata of our own graphs; nothing where there is none."""
    text = next((item.value for item in model.metadata_props if item.key == STATES_KEY), None)
    if text is None:
        return []
    try:
        rows = [{key: row[key] for key in ("name", "past", "present", "init")} for row in json.loads(text)]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"The metadata {STATES_KEY} of the graph is damaged ({error}). Name the states with --state INPUT=OUTPUT."
        ) from error
    return rows


def _check_name(what: str, name: str, known: Mapping[str, Port]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, list(known), 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise InputError(f"The graph has no {what} {name!r}; it has {', '.join(known)}.{hint}")


def possible_axes(past: Port, batch: int | str) -> list[int]:
    """Where a state may have its lanes: axes with the size that the main input's first has."""
    return [index for index, size in enumerate(past.shape) if size == batch]


def state_of(option: StateOption, past: Port, present: Port, batch: int | str, axis: int | None) -> GraphState:
    """A state of a graph.

    Args:
        option: how it was named or found.
        past, present: the graph's input and output.
        batch: size of the main input's first axis.
        axis: where its lanes are; None where there are none.

    Raises:
        UnsupportedError: a shape that changes over a step, or is not known before it.
        InputError: another dtype after the step, or an initial value that does not fit.
    """
    if past.dtype != present.dtype:
        raise InputError(
            f"The state {past.name} is {past.dtype}, and what comes back as {present.name} is {present.dtype}. Are "
            "they paired rightly? A state keeps its dtype over a step."
        )
    if past.dtype not in ("float32", "int64", "int32", "bool"):
        raise UnsupportedError(
            f"The state {past.name} is {past.dtype}; states are float32, int64, int32 or bool. Export the model in "
            "float32; low precision is made here (--precision)."
        )
    if axis is None and isinstance(batch, int) and batch > 1:
        raise UnsupportedError(
            f"The state {past.name} has the shape {list(past.shape)}; none of its axes has the size of the {batch} "
            "streams that the graph takes at a time, and each is to have a state of its own. Export the model for one "
            "stream."
        )
    others = [index for index, size in enumerate(past.shape) if isinstance(size, str) and index != axis]
    if others:
        raise UnsupportedError(
            f"The state {past.name} has the shape {list(past.shape)}: axis {others[0]} is dynamic besides the streams "
            f"({batch}). A step has static shapes, so a cache that grows cannot be its state: carry a window of "
            "fixed length, or export with this axis fixed."
        )
    known = [size for size in present.shape if isinstance(size, int)]
    if len(past.shape) != len(present.shape) or (
        len(known) == len(present.shape) and _sizes(past, axis) != _sizes(present, axis)
    ):
        raise UnsupportedError(
            f"The state {past.name} has the shape {list(past.shape)} before a step, and {present.name} has "
            f"{list(present.shape)} after it. Are they paired rightly? A state keeps its shape; a cache that grows "
            "cannot be one."
        )
    shape = tuple(1 if index == axis else int(size) for index, size in enumerate(past.shape))
    initial = option.initial(shape, past.dtype)
    return GraphState(state_name(past.name), past.name, present.name, shape, axis, past.dtype, initial, option.found)


def _sizes(port: Port, lane_axis: int | None) -> list[int | str]:
    return [size for index, size in enumerate(port.shape) if index != lane_axis]
