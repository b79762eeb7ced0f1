"""Naming conventions by which inputs and outputs of exported models are paired as states."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from nsm.export.sources.state_options import StateOption
from nsm.results import Message

# (pattern of an input, name of the output, pattern of an output that only a state has, or "" if data have such names
# too); groups are inserted. The first whose output exists counts. Where they come from: ours; Hugging Face's
# decoders; by hand; Silero's voice activity detector; torch's names; streaming encoders of WeNet (`att_cache`,
# `r_att_cache`) and icefall (`cached_key_0`, `embed_states`, `new_...`).
CONVENTIONS: Sequence[tuple[str, str, str]] = (
    (r"past_state\.(.+)", r"present_state.\1", r"present_state\..+"),
    (r"past_key_values\.(.+)", r"present.\1", r"present\..+"),
    (r"past_(.+)", r"present_\1", r"present_.+"),
    (r"(.+)_in", r"\1_out", ""),
    (r"(.+)_in([_.]?\d+)", r"\1_out\2", ""),
    (r"(.+)_cache", r"\1_cache_out", r".+_cache_out"),
    (r"(cache.*)", r"\1_out", r"cache.*_out"),
    (r"(h|c|hidden|cell|(?:.+_)?state)", r"\1_out", ""),
    (r"state", r"stateN", r"stateN"),
    (r"(h|c|hidden|cell)_?0?", r"\1n", r"hn|cn|hiddenn|celln"),
    (r"(h|c)0?", r"\1_n", r"h_n|c_n"),
    (r"(.+_cache)", r"r_\1", r"r_.+_cache"),
    (r"(.+)", r"new_\1", r"new_.*(cache|state|hidden|cell).*"),
)

_STATE_WORDS = "state|cache|cached|hidden|cell|memory|mem|buffer|buf|history|past|h|c|hx|cx|gru|lstm|rnn|carry"
_TELLING = re.compile(rf"(?:^|[._/])(?:{_STATE_WORDS})s?\d*(?:$|[._/])")


def find_states(inputs: Sequence[str], outputs: Sequence[str]) -> list[StateOption]:
    """The states that names give away, by `CONVENTIONS`."""
    found: list[StateOption] = []
    for name in inputs:
        for pattern, present, _ in CONVENTIONS:
            match = re.fullmatch(pattern, name)
            if match and (wanted := match.expand(present)) in outputs and wanted != name:
                found.append(StateOption(name, wanted, found="its name"))
                break
    return found


def is_telling(past: str, present: str) -> bool:
    """Whether the names of a pair, found by `CONVENTIONS`, are such as only a state has.

    An echo canceller has `mic_in` and `mic_out`, which are data; `state_in` and `conv.cache_in` are states.
    """
    return bool(_TELLING.search(past)) or bool(find_orphans([present]))


def find_orphans(answers: Iterable[str]) -> list[str]:
    """Outputs that are to be answers, and by their names are states after a step."""
    patterns = [pattern for _, _, pattern in CONVENTIONS if pattern]
    return [name for name in answers if any(re.fullmatch(pattern, name) for pattern in patterns)]


def crossed(chosen: Iterable[StateOption], inputs: Sequence[str], outputs: Sequence[str]) -> list[Message]:
    """Return a warning for each state that was paired by hand against its name.

    Names are conventions, and a file may hold others on purpose, so this is no error. But where the shapes are the
    same nothing else tells: the reference is wired as the targets are.
    """
    by_name = {option.past: option.present for option in find_states(inputs, outputs)}
    told = []
    for option in chosen:
        past = next((name for name, present in by_name.items() if present == option.present), option.past)
        pairs = {name: by_name[name] for name in (option.past, past) if name in by_name}
        if pairs and pairs.get(option.past) != option.present:
            told.append(
                Message(
                    f"--state pairs {option.past} with {option.present}; by their names "
                    + " and ".join(f"{name} goes with {present}" for name, present in pairs.items())
                    + ". If these are mixed up, each step takes the wrong state, and the parity check does not show "
                    "it: the reference takes the same one.",
                    "warning",
                )
            )
    return told


def state_name(past: str) -> str:
    """The name of a state: the name of its input without the prefix that nsm adds."""
    return re.sub(r"^(past_state|past_key_values)\.", "", past)
