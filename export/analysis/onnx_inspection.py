"""`nsm inspect FILE.onnx`: the inputs and outputs of a foreign graph, its states, and the command to export it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from nsm.export.report import Terminal
from nsm.export.sources.onnx.file import Port, default_inputs, ports, read_onnx, real_inputs, take_default
from nsm.export.sources.onnx.states import (
    Pair,
    Pairing,
    choices,
    dependence_of,
    find_ours,
    find_pairs,
    restarts,
    settle_ours,
    take_defaults,
    verdict,
)


def inspect_onnx(path: Path, as_json: bool) -> None:
    """Describe an ONNX file; see `nsm inspect --help`.

    Raises:
        InputError, UnsupportedError: the file cannot be read, or has operators that a step must not have.
    """
    model = read_onnx(path)
    settle_ours(path, model)
    ours = find_ours(path, model)
    defaults = take_defaults(model, ours)
    for name in default_inputs(model) if model.ir_version >= 4 else ():
        take_default(model, name)
    if ours:
        inputs, outputs = real_inputs(model), ports(list(model.graph.output))
        pairs = [Pair(option.past, option.present, option.found) for option in ours]
        data = [name for name in inputs if name not in [pair.past for pair in pairs]]
        pairing = Pairing(inputs, outputs, pairs, [], data)
    else:
        pairing = find_pairs(model, initial=defaults)
    reset = restarts(dependence_of(model.graph), [pair.past for pair in pairing.states])
    if as_json:
        click.echo(json.dumps(_facts(path, pairing, reset)))
        return
    terminal = Terminal()
    rows = [[kind, *_row(item)] for kind, items in _ports(pairing).items() for item in items.values()]
    terminal.table(("", "name", "dtype", "shape"), rows, f"{path}: an ONNX graph")
    rows = [[pair.past, pair.present, "a state", pair.found] for pair in pairing.states]
    rows += [[pair.past, pair.present, verdict(pair), pair.found] for pair in pairing.ambiguous]
    if rows:
        terminal.table(("input", "output", "", "found by"), rows, "\nStates: inputs and the outputs fed back to them")
    if pairing.trouble:
        terminal.say(f"\nThe graph could not be run with dynamic axes of size 1. {pairing.trouble}", "yellow")
    for one in reset:
        terminal.say(f"\n{one[0].upper()}{one[1:]} is reset in every call: no state reaches its initial state.")
    found = choices(path, pairing)
    if not found:
        terminal.say(
            "\nNo states were found. A step needs at least one: an input, and the output that is fed back to it."
        )
    for condition, advice in found:
        terminal.say(f"\nIf {condition}:" if condition else "\nTo export it:")
        click.echo(f"  {advice}")


def _ports(pairing: Pairing) -> dict[str, Mapping[str, Port]]:
    return {"input": pairing.inputs, "output": pairing.outputs}


def _row(port: Port) -> list[str]:
    return [port.name, port.dtype, f"[{', '.join(map(str, port.shape))}]"]


def _facts(path: Path, pairing: Pairing, reset: list[str]) -> dict[str, Any]:
    def shown(pair: Pair) -> dict[str, str]:
        return {"past": pair.past, "present": pair.present, "found": pair.found}

    return {
        "file": str(path),
        **{
            f"{kind}s": [{"name": p.name, "dtype": p.dtype, "shape": list(p.shape)} for p in items.values()]
            for kind, items in _ports(pairing).items()
        },
        "states": [shown(pair) for pair in pairing.states],
        "ambiguous": [shown(pair) for pair in pairing.ambiguous],
        "data": list(pairing.data),
        "reset_in_every_call": reset,
        "choices": [choice._asdict() for choice in choices(path, pairing)],
    }
