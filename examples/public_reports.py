"""Export models that show publicly reported faults, and compare every stream with a loop over the original module.

    python examples/public_reports.py [--only TEXT] [--output docs/public-reports.json]

The script exports each model of `reported_models.py` with `nsm.as_step`, and each file of `reported_files.py` with
`nsm-export`, to both targets. It then streams 500 tokens per lane, fed unevenly to two lanes if the model takes two,
with random resets of each lane. The loop runs every lane alone, in PyTorch or in ONNX Runtime on the original file,
and does not use nsm. The exit status is 1 if a stream is silently wrong or a verdict is not the expected one.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import helper
from onnx.reference import ReferenceEvaluator
from reported_files import FILES, WIDTH, FileCase
from reported_models import CASES, Case
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils import _pytree as pytree

import nsm
from nsm.errors import NsmError, StreamError

TARGETS = ("onnxruntime", "openvino")
ALL: tuple[Case | FileCase, ...] = (*CASES, *FILES)
TOLERANCE = 1e-4
"""Largest error of an output, relative to the largest output of the stream."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case on a target.

    Args:
        name, reports, target: case and target.
        verdict: one of `Case.right`, "WRONG" if the stream was silently wrong, or "fails" if the backend raised an
            error.
        expected: whether the verdict is right.
        error: largest error of an output, relative to the largest output.
        tokens: number of compared tokens on all lanes.
        message: first sentence of the error, or "".
    """

    name: str
    reports: tuple[str, ...]
    target: str
    verdict: str
    expected: bool
    error: float | None
    tokens: int
    message: str


class Loop:
    """The reference: one lane of the module, token by token, without nsm."""

    def __init__(self, module: torch.nn.Module, states: Any, timed: bool) -> None:
        self.module, self.timed = module, timed
        self.start = pytree.tree_map(lambda state: state.initial.clone(), states)
        self.reset()

    def reset(self) -> None:
        self.state = pytree.tree_map(torch.clone, self.start)

    @torch.no_grad()
    def __call__(self, x: Array) -> Array:
        """Take one token [*token]; return its output [...]."""
        token = torch.from_numpy(x)[None, None] if self.timed else torch.from_numpy(x)[None]
        output, *self.state = self.module(token, *self.state)
        result: Array = (output[0, 0] if self.timed else output[0]).numpy().copy()
        return result


class FileLoop:
    """One lane of an .onnx file, in ONNX Runtime, or in ONNX's reference evaluator if that cannot open it."""

    def __init__(self, path: Path, case: FileCase) -> None:
        self.case = case
        graph = onnx.load(path).graph
        self.dtypes = {
            item.name: helper.tensor_dtype_to_np_dtype(item.type.tensor_type.elem_type) for item in graph.input
        }
        (self.main,) = set(self.dtypes) - set(case.states)
        self.names = [item.name for item in graph.output]
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self.session: Any = ort.InferenceSession(path, options)
        except ort.capi.onnxruntime_pybind11_state.Fail:
            self.session = ReferenceEvaluator(str(path))
        self.reset()

    def reset(self) -> None:
        self.state = {name: np.zeros(self.case.shapes[name], self.dtypes[name]) for name in self.case.states}

    def __call__(self, x: Array) -> Array:
        """Take one token [width]; return the output [...]."""
        given = dict(zip(self.names, self.session.run(None, {self.main: x[None], **self.state}), strict=True))
        self.state = {name: given[output] for name, output in self.case.states.items()}
        result: Array = given[next(name for name in self.names if name not in self.case.states.values())][0]
        return result


def run_case(case: Case | FileCase, target: str, folder: Path) -> Outcome:
    """Export a case, stream it, and compare."""
    if isinstance(case, FileCase):
        return _run_file(case, target, folder)
    torch.manual_seed(0)
    module, states = case.build()
    own = copy.deepcopy(module)
    shape = tuple(case.options["token_shape"])
    samples = np.random.default_rng(1).standard_normal((8, 64, *shape)).astype(np.float32)
    try:
        step = nsm.as_step(module, states, **case.options)
        lanes = step.lanes or 2
        bundle = nsm.export_model(step, [target], folder / "model.nsm", samples=samples, batch=lanes, force=True)
    except NsmError as error:
        return _outcome(case, target, "refused", message=str(error))
    loops = [Loop(own, states, bool(case.options.get("timed"))) for _ in range(lanes)]
    with nsm.open(bundle, target=target) as session:
        return stream(session, loops, case, target, shape, case.steps)


def _run_file(case: FileCase, target: str, folder: Path) -> Outcome:
    path, bundle = folder / f"model{case.suffix}", folder / "model.nsm"
    case.write(path)
    command = [sys.executable, "-m", "nsm.export", str(path), "--target", target, "--output", str(bundle), "--force"]
    done = subprocess.run([*command, *case.options], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        first = next((line for line in lines if line.startswith("Error")), lines[-1] if lines else "")
        verdict = "refused" if 0 < done.returncode < 128 and "Traceback" not in done.stderr else "fails"
        message = " ".join(lines[lines.index(first) :]).replace(f"{folder}/", "") if lines else ""
        return _outcome(case, target, verdict, message=message)
    with nsm.open(bundle, target=target) as session:
        if case.suffix != ".onnx":
            return _outcome(case, target, "WRONG", message="exported in its training form")
        loops = [FileLoop(path, case) for _ in range(session.batch)]
        return stream(session, loops, case, target, (WIDTH,), 500)


def _outcome(
    case: Case | FileCase, target: str, verdict: str, error: float | None = None, tokens: int = 0, message: str = ""
) -> Outcome:
    first = message.removeprefix("Error: ").split(". ")[0][:200]
    return Outcome(case.name, case.reports, target, verdict, verdict in case.right, error, tokens, first)


def stream(
    session: nsm.runtimes.Session,
    loops: Sequence[Callable[[Array], Array]],
    case: Case | FileCase,
    target: str,
    shape: tuple[int, ...],
    steps: int,
) -> Outcome:
    """Feed lanes unevenly, reset them at random, and compare every output with the loops."""
    random = np.random.default_rng(0)
    lanes, long = len(loops), steps > 1000
    done, compared, largest, scale = np.zeros(lanes, int), 0, 0.0, 1e-6
    while done.min() < steps:
        for lane in range(0 if long else lanes):
            if random.random() < 0.005:
                session.reset(lane)
                loops[lane].reset()  # type: ignore[attr-defined]
        length = int(random.integers(1, 2001 if long else 8))
        counts = random.integers(0, length + 1, lanes)
        counts[int(random.integers(lanes))] = length
        tokens = random.standard_normal((lanes, length, *shape)).astype(np.float32)
        try:
            given = next(iter(session.feed(tokens, counts if lanes > 1 else None).values()))
        except StreamError as error:
            verdict = "stops" if compared and largest <= TOLERANCE * scale else "WRONG"
            return _outcome(case, target, verdict, largest / scale, compared, str(error))
        except NsmError as error:
            return _outcome(case, target, "fails", largest / scale, compared, str(error))
        for lane, count in enumerate(counts):
            for index in range(int(count)):
                try:
                    wanted = loops[lane](tokens[lane, index])
                except (IndexError, RuntimeError):  # the original model fails here, but the session did not
                    return _outcome(case, target, "WRONG", largest / scale, compared, "went on past the model's end")
                scale = max(scale, float(np.abs(wanted).max()))
                difference = float(np.abs(given[lane, index] - wanted).max())
                largest = max(largest, difference if np.isfinite(difference) else np.inf)
                compared += 1
        done += counts
    verdict = "equal" if largest <= TOLERANCE * scale else "WRONG"
    return _outcome(case, target, verdict, largest / scale, compared)


def shown(outcomes: list[Outcome]) -> Table:
    """Return the outcomes as a table for the terminal."""
    table = Table("case", "target", "verdict", "error", "tokens", "message")
    for one in outcomes:
        error = "" if one.error is None or one.verdict == "refused" else f"{one.error:.1e}"
        style = "" if one.expected else "bold red"
        table.add_row(one.name, one.target, one.verdict, error, f"{one.tokens:,}", one.message, style=style)
    return table


def markdown(outcomes: list[Outcome]) -> str:
    """Return the outcomes as a Markdown table, one row per case."""
    by_case: dict[str, dict[str, Outcome]] = {}
    for one in outcomes:
        by_case.setdefault(one.name, {})[one.target] = one
    rows = ["| case | reported in | " + " | ".join(TARGETS) + " |", "|---|---|" + "---|" * len(TARGETS)]
    for name, found in by_case.items():
        reports = ", ".join(next(iter(found.values())).reports) or "this project"
        rows.append(f"| {name} | {reports} | " + " | ".join(_cell(found, target) for target in TARGETS) + " |")
    return "\n".join(rows)


def _cell(found: Mapping[str, Outcome], target: str) -> str:
    one = found.get(target)
    if one is None:
        return ""
    return one.verdict if one.verdict == "refused" else f"{one.verdict}, {one.error:.0e}"


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--only", default="", help="Run the cases whose names contain this text.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the outcomes to this JSON file.")
def main(only: str, output: Path | None) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torch")
    console = Console()
    chosen = [case for case in ALL if only.lower() in case.name.lower()]
    if not chosen:
        raise click.UsageError(f"No case contains {only!r}. Cases: {', '.join(case.name for case in ALL)}.")
    pairs = [(case, target) for case in chosen for target in TARGETS]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [
            run_case(case, target, Path(folder))
            for case, target in track(pairs, "Cases", console=console, disable=not console.is_terminal)
        ]
    console.print(shown(outcomes))
    if output is not None:
        output.write_text(json.dumps([asdict(one) for one in outcomes], indent=1) + "\n")
        output.with_suffix(".md").write_text(markdown(outcomes) + "\n")
    odd = [one for one in outcomes if not one.expected]
    wrong = sum(one.verdict == "WRONG" for one in outcomes)
    console.print(f"{len(chosen)} cases on {len(TARGETS)} targets: {wrong} silently wrong, {len(odd)} not as expected")
    sys.exit(1 if odd else 0)


if __name__ == "__main__":
    main()
