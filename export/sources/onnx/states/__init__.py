"""The states of an ONNX graph: which outputs are fed back to which inputs."""

from nsm.export.sources.onnx.states.ambiguity import choices, verdict
from nsm.export.sources.onnx.states.choice import (
    GraphState,
    check_answers,
    check_growth,
    choose_states,
    find_ours,
    join_lanes,
    possible_axes,
    settle_ours,
    state_of,
    take_defaults,
)
from nsm.export.sources.onnx.states.dependence import Dependence, dependence_of
from nsm.export.sources.onnx.states.pairing import Pair, Pairing, find_pairs
from nsm.export.sources.onnx.states.recurrent import restarts

__all__ = [
    "Dependence",
    "GraphState",
    "Pair",
    "Pairing",
    "check_answers",
    "check_growth",
    "choices",
    "choose_states",
    "dependence_of",
    "find_ours",
    "find_pairs",
    "join_lanes",
    "possible_axes",
    "restarts",
    "settle_ours",
    "state_of",
    "take_defaults",
    "verdict",
]
