"""Which inputs and outputs of a foreign ONNX graph are its states."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from nsm.errors import InputError, UnsupportedError
from nsm.export.onnx_file import Port
from nsm.export.state_options import StateOption, find_states, state_name
from nsm.export.state_table import STATES_KEY
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
        symbolic: whether the lane axis takes any size.
    """

    name: str
    past: str
    present: str
    shape: tuple[int, ...]
    lane_axis: int | None
    dtype: str
    initial: Array
    found: str
    symbolic: bool


def choose_states(
    model: onnx.ModelProto, inputs: Mapping[str, Port], outputs: Mapping[str, Port], named: Sequence[StateOption]
) -> list[StateOption]:
    """Those that were named; else those of our own metadata; else those that names give away.

    Raises:
        InputError: a name that there is not, two states with one output, or none at all.
    """
    options = list(named) or _ours(model) or find_states(list(inputs), list(outputs))
    if not options:
        raise InputError(
            f"No states were found by the names of the inputs, {', '.join(inputs)}, and outputs, "
            f"{', '.join(outputs)}. Name them with --state INPUT=OUTPUT, once for each."
        )
    chosen = []
    for option in options:
        _check_name("input", option.past, inputs)
        present = option.present
        if present not in outputs and present.isdigit() and int(present) < len(outputs):
            present = list(outputs)[int(present)]
        _check_name("output", present, outputs)
        chosen.append(StateOption(option.past, present, option.init, option.found))
    presents = [option.present for option in chosen]
    twice = next((name for name in presents if presents.count(name) > 1), None)
    if twice is not None:
        pasts = [option.past for option in chosen if option.present == twice]
        raise InputError(f"The output {twice} is to become the states {' and '.join(pasts)}; each has one of its own.")
    return chosen


def _ours(model: onnx.ModelProto) -> list[StateOption]:
    text = next((item.value for item in model.metadata_props if item.key == STATES_KEY), None)
    if text is None:
        return []
    try:
        table: list[dict[str, Any]] = json.loads(text)
        both = [row for row in table if row["past"] and row["present"]]
        return [StateOption(row["past"], row["present"], found=f"the metadata {STATES_KEY}") for row in both]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"The metadata {STATES_KEY} of the graph is damaged ({error}). Name the states with --state INPUT=OUTPUT."
        ) from error


def _check_name(what: str, name: str, known: Mapping[str, Port]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, list(known), 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise InputError(f"The graph has no {what} {name!r}; it has {', '.join(known)}.{hint}")


def state_of(option: StateOption, past: Port, present: Port, batch: int | str) -> GraphState:
    """A state with its lanes found: on the axis whose size is that of the main input's first.

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
    axis = next((index for index, size in enumerate(past.shape) if size == batch), None)
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
    symbolic = isinstance(batch, str)
    name = state_name(past.name)
    return GraphState(name, past.name, present.name, shape, axis, past.dtype, initial, option.found, symbolic)


def _sizes(port: Port, lane_axis: int | None) -> list[int | str]:
    return [size for index, size in enumerate(port.shape) if index != lane_axis]
