"""The message for ambiguous states of a foreign ONNX graph, with commands to copy."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from nsm.export.sources.onnx.file import Port
from nsm.export.sources.onnx.states.pairing import Pair, Pairing

_MOST_CHOICES = 8


def ask(path: Path, pairing: Pairing) -> str:
    """The message: inputs, outputs, the pairs with their evidence, and a command for each choice."""
    lines = [
        f"It is ambiguous which inputs of {path} are states.",
        f"  inputs: {', '.join(map(describe, pairing.inputs.values()))}",
        f"  outputs: {', '.join(map(describe, pairing.outputs.values()))}",
    ]
    lines += [f"  {pair.past} -> {pair.present}: a state, by {pair.found}" for pair in pairing.states]
    lines += [f"  {pair.past} -> {pair.present}: {verdict(pair)}, by {pair.found}" for pair in pairing.ambiguous]
    lines += [f"If {choice.condition}: {choice.advice}" for choice in choices(path, pairing)]
    return "\n".join(lines)


def describe(port: Port) -> str:
    """An input or output: `x float32[1, 64]`."""
    return f"{port.name} {port.dtype}[{', '.join(map(str, port.shape))}]"


def verdict(pair: Pair) -> str:
    """The verdict on a ambiguous pair."""
    return "data" if pair.refuted else "a state or data"


class Choice(NamedTuple):
    """One way to wire a graph: its condition ("" if unambiguous), and the command or other remedy."""

    condition: str
    advice: str


def choices(path: Path, pairing: Pairing) -> list[Choice]:
    """The ways to wire a graph: one where nothing is ambiguous, none where it has no states.

    Else one for each input that the data may come in at, with all others as states.
    """
    data = [name for name in pairing.data if pairing.inputs[name].shape]
    found = []
    if pairing.states and len(data) > 1:
        what = f"{' and '.join(data)} are data" if pairing.ambiguous else ""
        found.append(
            Choice(what, f"a step takes one input besides its states: join {' and '.join(data)} in the graph.")
        )
    elif pairing.states:
        return [Choice("", _command(path, pairing, pairing.data, []))]
    for main in data if len(data) > 1 else ():
        others = [name for name in data if name != main]
        for states in _wirings(others, [pair for pair in pairing.ambiguous if not pair.refuted]):
            if len(pairing.states) + len(states) == len(pairing.outputs):  # a step gives something besides its states
                continue
            what = " and ".join(f"{pair.present} is what {pair.past} takes in the next step" for pair in states)
            settings = [name for name in pairing.data if name not in others]
            found.append(Choice(what, _command(path, pairing, settings, states)))
            if len(found) == _MOST_CHOICES:
                return found
    return found


def _wirings(names: Sequence[str], pairs: Sequence[Pair]) -> Iterator[Sequence[Pair]]:
    """An output for each of these inputs, in every way that there is."""
    for wiring in itertools.product(*([pair for pair in pairs if pair.past == name] for name in names)):
        if len({pair.present for pair in wiring}) == len(wiring):
            yield wiring


def _command(path: Path, pairing: Pairing, data: Sequence[str], states: Sequence[Pair]) -> str:
    """The command to copy; VALUE and SIZE stand for values that the file does not contain."""
    words = ["nsm-export", str(path), "--target", "onnxruntime"]
    for name in data:
        port = pairing.inputs[name]
        if not port.shape:
            words += ["--constant", f"{name}=VALUE"]
        elif any(isinstance(size, str) for size in port.shape[1 if pairing.trouble else 2 :]):
            first = "batch" if isinstance(port.shape[0], str) else port.shape[0]
            sizes = [str(size) if isinstance(size, int) else "SIZE" for size in port.shape[1:]]
            words += ["--shape", ",".join([f"{name}={first}", *sizes])]
    for pair in (*pairing.states, *states):
        words += ["--state", f"{pair.past}={pair.present}"]
    return shlex.join(words)
