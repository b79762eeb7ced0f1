"""What int8 loses when it is calibrated on made-up states instead of states from rollouts.

python examples/calibration.py model.pt

The model is built for OpenVINO in int8 twice. One gets the ranges of its activations from rollouts of its calibration
sequences, as nsm-export does it; the other from as many calls on the same tokens with random states. Both replay the
same golden sequences, which neither has seen.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

import nsm
from nsm.bundle import Bundle
from nsm.export.build import check_artifact
from nsm.export.guard import Maker
from nsm.export.pipeline import ExportOptions, export
from nsm.models.checkpoint import load_checkpoint
from nsm.quantization.calibration import Range, Watched, calibrate, rollouts
from nsm.quantization.policy import find_policy
from nsm.quantization.recipe import Calibration
from nsm.runtimes.session import Session
from nsm.runtimes.targets import find_target
from nsm.spec import StepSpec
from nsm.trace import Array, Arrays


def random_states(spec: StepSpec, feeds: Arrays, generator: np.random.Generator) -> Arrays:
    """The feeds of a call with standard normal numbers in place of every floating-point state."""
    made = dict(feeds)
    for state in spec.states_of(spec.entry("step").reads):
        if state.numpy_dtype.kind == "f":
            made[state.past] = generator.standard_normal(state.shape).astype(state.numpy_dtype)
    return made


def made_up(graph: Path, session: Session, sequences: list[Array]) -> Calibration:
    """Calibrate on as many calls, with random states."""
    watched, generator = Watched(graph), np.random.default_rng(0)
    ranges = {product.key: Range() for product in watched.products}
    calls = 0
    for call in rollouts(session, sequences):
        for key, values in watched(random_states(session.spec, call.feeds, generator)).items():
            ranges[key].add(values)
        calls += 1
    return Calibration({key: found.scale() for key, found in ranges.items()}, len(sequences), calls, (0,), None)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--steps", default=200, show_default=True, help="Calls of a golden stream.")
def main(model: Path, steps: int) -> None:
    """Build MODEL both ways and compare over golden streams."""
    sequences = load_checkpoint(model).calibration
    policy, target = find_policy("openvino", "int8"), find_target("openvino")
    assert policy is not None
    table = Table("calibrated on", "one step p50", "drift, mean", "p50, last quarter", "argmax", "bank p99", box=None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.nsm"
        export(model, ExportOptions(["onnxruntime"], output=path, golden_steps=steps))
        bundle = Bundle(path)
        graph, trace = path / "graphs" / "step.onnx", bundle.trace()
        with nsm.open(path) as session:
            found = {
                "rollouts": calibrate(graph, session, sequences),
                "random states": made_up(graph, session, sequences),
            }
        for name, calibration in found.items():
            maker = Maker(bundle, target, None, "int8", policy, calibration)
            _, report = check_artifact(bundle, maker.build({}), trace)
            maker.clean()
            assert report is not None
            late = float(np.median(report.curves.free_run_p50[-(steps // 4) :]))
            table.add_row(
                name,
                f"{report.one_step.p50:.4f}",
                f"{report.free_run_mean:.4f}",
                f"{late:.4f}",
                f"{report.argmax_agreement:.2%}",
                f"{report.state_error_p99:.4f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
