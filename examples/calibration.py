"""Compare int8 calibration on states from rollouts, on random states, and on states from an int8 rollout.

python examples/calibration.py model.pt

The script builds the model for OpenVINO in int8 three times. The first build gets its activation ranges from rollouts
of the calibration sequences in fp32, as nsm-export does; the second from as many calls on the same tokens with random
states; the third from rollouts of the first build, which visit the states that int8 leads to. All builds replay the
same golden sequences, which no calibration used.
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
from nsm.export import ExportOptions, export
from nsm.export.verify import Maker, TargetPlan, check_artifact
from nsm.models import load_checkpoint
from nsm.quantization import Calibration, Range, Watched, calibrate, find_policy, levels_of, rollouts
from nsm.runtimes import find_target
from nsm.runtimes.opening import open_artifact
from nsm.runtimes.session import Session
from nsm.spec import StepSpec
from nsm.trace import Array, Arrays


def random_states(spec: StepSpec, feeds: Arrays, generator: np.random.Generator) -> Arrays:
    """Replace every floating-point state in the inputs of a call by standard normal numbers."""
    replaced = dict(feeds)
    for state in spec.states_of(spec.entry("step").reads):
        if state.numpy_dtype.kind == "f":
            replaced[state.past] = generator.standard_normal(state.shape).astype(state.numpy_dtype)
    return replaced


def calibrate_on_random_states(graph: Path, session: Session, sequences: list[Array]) -> Calibration:
    """Calibrate on the tokens of the sequences, with a random state in every call."""
    watched, generator = Watched(graph), np.random.default_rng(0)
    ranges = {linear_op.key: Range() for linear_op in watched.linear_ops}
    calls = 0
    for call in rollouts(session, sequences):
        for key, values in watched(random_states(session.spec, call.feeds, generator)).items():
            ranges[key].add(values)
        calls += 1
    return Calibration(*levels_of(ranges), len(sequences), calls, (0,), None)


def calibrate_on_int8(bundle: Bundle, first: Calibration, sequences: list[Array]) -> Calibration:
    """Calibrate on a rollout of the int8 artifact that was built with the first calibration."""
    maker = maker_of(bundle, first)
    with open_artifact(bundle, maker.build({})) as session:
        found = calibrate(bundle.path / "graphs" / "step.onnx", session, sequences)
    maker.clean()
    return found


def maker_of(bundle: Bundle, calibration: Calibration) -> Maker:
    """Return the builder of OpenVINO int8 artifacts with this calibration."""
    policy = find_policy("openvino", "int8")
    assert policy is not None
    return Maker(bundle, TargetPlan(find_target("openvino"), None, "int8", policy), calibration)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--steps", default=200, show_default=True, help="Calls per golden stream.")
def main(model: Path, steps: int) -> None:
    """Calibrate MODEL in three ways, and compare the int8 artifacts over golden streams."""
    sequences = load_checkpoint(model).calibration
    table = Table("calibrated on", "one step p50", "drift, mean", "p50, last quarter", "argmax", "bank p99", box=None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.nsm"
        export(model, ExportOptions(["onnxruntime"], output=path, golden_steps=steps))
        bundle = Bundle(path)
        graph, trace = path / "graphs" / "step.onnx", bundle.trace()
        with nsm.open(path) as session:
            found = {
                "rollouts": calibrate(graph, session, sequences),
                "random states": calibrate_on_random_states(graph, session, sequences),
            }
        found["int8 rollouts"] = calibrate_on_int8(bundle, found["rollouts"], sequences)
        for name, calibration in found.items():
            maker = maker_of(bundle, calibration)
            report = check_artifact(bundle, maker.build({}), trace).report
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
