"""Measure the cost of each design choice of a layer: time of step and decode, state size, bf16 error.

python examples/design_choices.py

Every row changes one option of the NSM in examples/compare.py. Weights are untrained. Times are paired with the
unchanged model's, in one process, on OpenVINO in fp32. The bf16 columns compare bf16 with fp32 over 200 steps, each on
its own state: the mean relative error of the logits and of layer 0's bank over the last 50 steps. train_recall.py and
train_text.py measure the benefit of a choice.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
import compare
import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray
from openvino import properties as props
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nsm.bundle import Bundle
from nsm.files import check_output_file, json_with, replacing
from nsm.models import AdaptiveNSM, SimpleNSM, StepModel

STEPS, LAST = 200, 50

# Changes of depth and width; the size of the feed-forward part keeps the number of parameters equal.
EQUAL_PARAMETERS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "3 layers": {"num_layers": 3, "feed_forward": 4.7},
        "4 layers": {"num_layers": 4, "feed_forward": 2.8},
        "d=256": {"d_model": 256, "state_dim": 256, "feed_forward": 23.7},
        "d=256, 4 layers": {"d_model": 256, "state_dim": 256, "num_layers": 4, "feed_forward": 10.1},
        "d=512": {"d_model": 512, "state_dim": 512, "feed_forward": 3.37},
    }
)
CHOICES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "as compared": {},
        "consolidated every 2 chunks": {"consolidate_every": 2},
        "consolidated every 4 chunks": {"consolidate_every": 4},
        "consolidated every 8 chunks": {"consolidate_every": 8},
        "never consolidated": {"consolidate_every": 0},
        "gate gru": {"gate_type": "gru"},
        "gate lstm": {"gate_type": "lstm"},
        "communication": {"communication": True},
        "1 bank head": {"routing_heads": 1},
        "2 bank heads": {"routing_heads": 2},
        "8 bank heads": {"routing_heads": 8},
        "64 slots": {"num_states": 64},
        "slots twice as wide": {"state_dim": 768},
        "window 64": {"window": 64},
        "window 128": {"window": 128},
        "top-4 routing": {"routing": "topk", "top_k": 4},
        "sparsemax routing": {"routing": "sparsemax"},
        "entmax routing": {"routing": "entmax"},
        "hierarchy, 4 and 16 chunks": {"num_states": 33, "hierarchy": (4, 16)},
        "memory of 256 rows": {"memory_rows": 256},
        **EQUAL_PARAMETERS,
    }
)


def build(changes: Mapping[str, Any]) -> StepModel:
    """Return the compared model with changed options."""
    torch.manual_seed(0)
    return SimpleNSM(**{**compare.NSM, **changes})


def adaptive() -> StepModel:
    """Return the compared model with adaptive banks."""
    torch.manual_seed(0)
    arguments = dict(compare.NSM)
    slots = arguments.pop("num_states")
    return AdaptiveNSM(**arguments, max_states=slots, initial_states=slots // 2)


def bf16_errors(bundle: Path) -> tuple[float, float] | None:
    """Return the mean relative errors of bf16 at the end of a rollout: logits, and the bank of layer 0.

    Returns None on a processor without bf16.
    """
    if "BF16" not in ov.Core().get_property("CPU", props.device.capabilities()):
        return None
    exact, rounded = (_roll(bundle, kind) for kind in (ov.Type.f32, ov.Type.bf16))
    logits, bank = (
        float((np.linalg.norm(given - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)).mean())
        for wanted, given in zip(exact, rounded, strict=True)
    )
    return logits, bank


def _roll(bundle: Path, kind: ov.Type) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the logits and banks of the last steps, each flattened to [LAST, ...]."""
    core, folder = ov.Core(), bundle / "openvino"
    config = {props.hint.inference_precision(): kind}
    compiled = core.compile_model(core.read_model(folder / "step.xml", folder / "weights.bin"), "CPU", config)
    opened = Bundle(bundle)
    spec, initial = opened.manifest.spec, opened.state_init()
    entry = spec.entry("step")
    state = {item.name: initial[item.name] for item in spec.states_of(entry.reads)}
    tokens = np.random.default_rng(0).integers(0, compare.BYTES, (STEPS, *entry.inputs[0].shape))
    logits, banks = [], []
    for step in range(STEPS):
        feed = {item.past: state[item.name] for item in spec.states_of(entry.reads)}
        results = compiled({"tokens": tokens[step], **feed})
        state |= {item.name: results[item.present] for item in spec.states_of(entry.writes)}
        if step >= STEPS - LAST:
            logits.append(results["outputs"].reshape(-1))
            banks.append(state["0.bank"].reshape(-1))
    return np.stack(logits), np.stack(banks)


@click.command()
@click.option("--rounds", default=11, show_default=True)
@click.option("--calls", default=40, show_default=True, help="Calls per round.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the rows to this .json.")
def main(rounds: int, calls: int, output: Path | None) -> None:
    """Export every variant, measure them in turns, and print the table."""
    if output is not None:
        check_output_file(output, "a table of this script", json_with("choice", "parameters"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bundles: dict[str, Path] = {}
        for index, (name, changes) in enumerate(track(CHOICES.items(), "exporting")):
            bundles[name] = compare.make_bundle(build(changes), "openvino", Path(folder) / f"{index}.nsm")
        bundles["slots that adapt"] = compare.make_bundle(adaptive(), "openvino", Path(folder) / "adaptive.nsm")
        times = compare.pairs_of(bundles, "openvino", rounds, calls)
        for name, path in bundles.items():
            ratios = np.median(times[name][1] / times[name][0], 1) if name in times else np.ones(2)
            errors = bf16_errors(path)
            manifest = Bundle(path).manifest
            rows.append(
                {
                    "choice": name,
                    "parameters": manifest.model["parameters"],
                    "state_kb": manifest.spec.state_nbytes / 1e3,
                    "step": ratios[0],
                    "decode": ratios[1],
                    "bf16_logits": errors and errors[0],
                    "bf16_bank": errors and errors[1],
                }
            )
    table = Table(header_style="bold", box=None)
    for column in ("choice", "parameters", "state kB", "step", "decode", "bf16 logits", "bf16 bank"):
        table.add_column(column, justify="left" if column == "choice" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["choice"],
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['state_kb']:.0f}",
            f"{row['step']:.2f}x",
            f"{row['decode']:.2f}x",
            *("-" if row[name] is None else f"{row[name]:.4f}" for name in ("bf16_logits", "bf16_bank")),
        )
    Console(width=110).print(table)
    if output is not None:
        with replacing(output) as file:
            file.write((json.dumps(rows, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
