"""Quantize a model's step with nsm and with onnxruntime.quantization, and compare error, accuracy, size and speed.

python examples/train_digits.py --width 128 --steps 600 --output digits.pt
python examples/quantizers.py digits.pt

All run the same plain ONNX Runtime loop over the test digits, one stream after the other, each with its own state.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import digits
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime import quantization
from rich.console import Console
from rich.table import Table

import nsm
from nsm.runtimes.bench import times_us

Array = NDArray[Any]
Feeds = dict[str, Array]
STREAMS, ROUNDS, CALLS = 8, 15, 200


class Step:
    """One graph `step` and the state of one stream.

    Args:
        path: of the graph.
        initial: initial states, by name.
    """

    def __init__(self, path: Path, initial: Feeds) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        table = json.loads(self._session.get_modelmeta().custom_metadata_map["nsm.states"])
        self._pairs = {state["past"]: state["present"] for state in table if state["past"]}
        self._names = [output.name for output in self._session.get_outputs()]
        self._initial = {state["past"]: initial[state["name"]] for state in table if state["past"]}
        self._state: Feeds = {}
        self.reset()

    def reset(self) -> None:
        """Return to the initial state."""
        self._state = dict(self._initial)

    def feeds(self, tokens: Array) -> Feeds:
        """The inputs of the next call, tokens [1, C]."""
        return {"tokens": tokens, **self._state}

    def __call__(self, tokens: Array) -> Array:
        """Outputs [1, C, classes] for tokens [1, C]."""
        found = dict(zip(self._names, self._session.run(None, self.feeds(tokens)), strict=True))
        self._state |= {past: found[present] for past, present in self._pairs.items() if present in found}
        outputs: Array = found["outputs"]
        return outputs


class Calls(quantization.CalibrationDataReader):  # type: ignore[misc]
    """The inputs of a step over whole streams, states included."""

    def __init__(self, step: Step, streams: Array) -> None:
        self._feeds = self._run(step, streams)

    @staticmethod
    def _run(step: Step, streams: Array) -> Iterator[Feeds]:
        for stream in streams:
            step.reset()
            for tokens in stream.reshape(-1, 1, digits.CHUNK):
                yield step.feeds(tokens)
                step(tokens)

    def get_next(self) -> Feeds | None:
        """The next inputs, None at the end."""
        return next(self._feeds, None)


def run(step: Step, streams: Array) -> Array:
    """Outputs [N, T, classes] over streams [N, T], each from the initial state."""
    outputs = []
    for stream in streams:
        step.reset()
        outputs.append(np.concatenate([step(tokens)[0] for tokens in stream.reshape(-1, 1, digits.CHUNK)]))
    return np.stack(outputs)


def times(steps: Sequence[Step], tokens: Array) -> Array:
    """Microseconds per call, [rounds, steps], the steps in turn."""
    found = np.empty((ROUNDS, len(steps)))
    for row in found:
        for index, step in enumerate(steps):
            step.reset()
            row[index] = times_us(functools.partial(step, tokens), CALLS).mean()
    return found


def graphs(checkpoint: Path, folder: Path) -> tuple[dict[str, Path], Feeds]:
    """The fp32 graph, those of nsm and of onnxruntime.quantization by name, and the initial state."""
    training, _ = digits.load()
    streams, _ = digits.streams(training, 36)
    bundle = nsm.export_model(nsm.load(checkpoint), "onnxruntime", folder / "digits.nsm", streams, num_samples=4)
    initial = bundle.state_init()
    whole = folder / "step.onnx"
    onnx.save(onnx.load(bundle.path / "graphs" / "step.onnx"), whole)
    found = {"fp32": whole}
    for precision in ("int8", "int8-weights"):
        path = folder / f"{precision}.nsm"
        made = nsm.export_model(
            nsm.load(checkpoint), "onnxruntime", path, streams, num_samples=4, precision=precision, allow_slower=True,
            max_fp32_share=1.0,
        )  # fmt: skip
        (artifact,) = made.manifest.artifacts
        assert artifact.quantization is not None
        scheme = artifact.quantization.scheme
        found[f"nsm {precision} ({scheme})"] = folder / f"{precision}.onnx"
        (step,) = (record.path for record in artifact.files if record.path.endswith("step.onnx"))
        onnx.save(onnx.load(made.path / step), folder / f"{precision}.onnx")
    for per_channel in (True, False):
        path = folder / f"dynamic-{per_channel}.onnx"
        found[f"onnxruntime dynamic, per {'channel' if per_channel else 'tensor'}"] = path
        quantization.quantize_dynamic(whole, path, per_channel=per_channel)
    found["onnxruntime static (QDQ)"] = folder / "static.onnx"
    reader = Calls(Step(whole, initial), streams[:8])
    quantization.quantize_static(whole, folder / "static.onnx", reader, per_channel=True)
    return found, initial


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="Write the results as JSON.")
def main(checkpoint: Path, output: Path | None) -> None:
    """Compare the quantizers on CHECKPOINT, a model of train_digits.py."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _, test = digits.load()
    ids, labels = digits.streams(test, STREAMS)
    with tempfile.TemporaryDirectory() as folder:
        found, initial = graphs(checkpoint, Path(folder))
        steps = {name: Step(path, initial) for name, path in found.items()}
        outputs, failures = {}, {}
        for name, step in steps.items():
            try:
                outputs[name] = run(step, ids)
            except Exception as raised:  # ONNX Runtime refuses some graphs of its own quantizer
                failures[name] = str(raised).strip().rpartition("\n")[2][-120:]
        steps = {name: steps[name] for name in outputs}
        spent = times(list(steps.values()), ids[:1, : digits.CHUNK])
        wanted = outputs["fp32"]
        rows = []
        for index, (name, values) in enumerate(outputs.items()):
            error = np.linalg.norm(values - wanted, axis=-1) / np.sqrt((np.linalg.norm(wanted, axis=-1) ** 2).mean())
            found_labels = digits.predictions(values)
            ratio = np.median(spent[:, 0] / spent[:, index])
            rows.append(
                {
                    "quantizer": name,
                    "kilobytes": round(found[name].stat().st_size / 1e3, 1),
                    "free_run_p99": float(np.quantile(error, 0.99)),
                    "free_run_mean": float(error.mean()),
                    "accuracy": float((found_labels == labels).mean()),
                    "microseconds": round(float(np.median(spent[:, index])), 1),
                    "speed": round(float(ratio), 3),
                }
            )
    table = Table("quantizer", "kB", "free-run p99", "mean", "accuracy", "us a step", "speed against fp32", box=None)
    for row in rows:
        table.add_row(
            str(row["quantizer"]), f"{row['kilobytes']:.0f}", f"{row['free_run_p99']:.1e}",
            f"{row['free_run_mean']:.1e}", f"{row['accuracy']:.1%}", f"{row['microseconds']:.0f}",
            f"{row['speed']:.2f}x",
        )  # fmt: skip
    console = Console(width=120)
    console.print(table)
    for name, failure in failures.items():
        console.print(f"{name} does not run: {failure}")
    if output is not None:
        output.write_text(
            json.dumps({"onnxruntime": ort.__version__, "results": rows, "failures": failures}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
