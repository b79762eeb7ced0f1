"""Evidence about states and lanes from the data flow of a foreign ONNX graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from nsm.errors import InputError, UnsupportedError
from nsm.export.graphs import node_name
from nsm.export.sources.onnx.file import Port
from nsm.export.sources.onnx.model import Foreign
from nsm.export.sources.onnx.normalize import tidied
from nsm.export.sources.onnx.states import Dependence, dependence_of, restarts
from nsm.results import Message


def check_read(path: Path, dependence: Dependence, pasts: Iterable[str], outputs: Iterable[str]) -> None:
    """Refuse states whose values no output depends on. A graph that reads a shape only reads no value.

    Raises:
        InputError: there are such.
    """
    read = frozenset[str]().union(*(dependence.values.get(name, frozenset()) for name in outputs))
    unread = [name for name in pasts if name not in read]
    if unread:
        raise InputError(
            f"{path} never reads its states {', '.join(unread)}. Where an exporter is given one tensor for two "
            "arguments, it may take them for the same: export again with a tensor of its own for each state. If the "
            "model does not need them, leave them out of it."
        )


def decision(path: Path, dependence: Dependence, main: Port, pasts: Sequence[str]) -> str:
    """The node that decides by the values of tokens or states, for people; "" where none does.

    Such a graph takes one stream at a time: an `If` has one condition for all of its lanes.

    Raises:
        UnsupportedError: there is one, and the graph only takes several streams.
    """
    node = dependence.decided_by([main.name, *pasts])
    if node is None:
        return ""
    what = f"its {node.op_type} node {node_name(node)} decides by values of the stream"
    if isinstance(main.shape[0], int) and main.shape[0] > 1:
        raise UnsupportedError(
            f"{path} takes {main.shape[0]} streams at a time, and {what}: one decision for all of them. Export the "
            "model for one stream."
        )
    return what


def doubts_of_flow(dependence: Dependence, foreign: Foreign) -> list[Message]:
    """Return warnings about the states.

    Args:
        dependence: of the graph as it was given.
        foreign: the graph with its states.

    Raises:
        BuildError: the graph cannot be simplified, where it must be to see which branches run.
    """
    carried = {state.past: state.present for state in foreign.states}
    reached = dependence.reached(carried, foreign.answers)
    told = [
        Message(
            f"no output depends on the state {past}, in the same step or in a later one. If one is to, the model was "
            "exported wrongly; if not, leave the state out of it.",
            "warning",
        )
        for past in carried
        if past not in reached
    ]
    if len(restarts(dependence, carried, optional=True)) > len(restarts(dependence, carried)):
        dependence = dependence_of(tidied(foreign.static(foreign.lanes or 1, 1)).graph)
    reset = restarts(dependence, carried, optional=True)
    if reset:
        one = len(reset) == 1
        told.append(
            Message(
                f"{' and '.join(reset)} {'is' if one else 'are'} reset in every call: no state reaches "
                f"{'its' if one else 'their'} initial state. That is right over a frequency axis, or within one call. "
                f"If {'it runs' if one else 'they run'} over time, export the model with that state as an argument and "
                "a result.",
                "warning",
            )
        )
    return told
