"""The savings of `--compact`: the model before and after, measured in turns on a target."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nsm.bundle import GRAPHS, STATE_INIT, Bundle, graph_file
from nsm.export.analysis.roofline import calls_of, measure_call
from nsm.export.graphs import work_of
from nsm.export.pipeline import Plan
from nsm.export.sources import Source, TorchSource
from nsm.export.verify import build_target
from nsm.models import StreamModel, nsm_layers
from nsm.runtimes import find_target
from nsm.runtimes.opening import chosen_threads, entry_files, loader, open_bundle
from nsm.runtimes.session import Session
from nsm.spec import StepSpec

_ROUNDS = 5


@dataclass(frozen=True)
class Savings:
    """Values before and after compaction.

    Args:
        target: the measured target; None if no artifact of the bundle runs here.
        slots: slots of all layers.
        parameters: parameters of the model.
        state_bytes: bytes of state per lane.
        flops: FLOPs per step.
        step_us: microseconds per step; None without a target.
    """

    target: str | None
    slots: tuple[int, int]
    parameters: tuple[int, int]
    state_bytes: tuple[int, int]
    flops: tuple[float, float]
    step_us: tuple[float, float] | None


def measure_savings(planned: Plan, bundle: Bundle) -> Savings:
    """Compare the bundle of a compacted model with the original model.

    Exports the original model to ONNX. If an artifact of the bundle runs here, builds the same target for the original
    model, and measures both in turns.
    """
    old, new = planned.larger, planned.source
    assert isinstance(old, TorchSource)
    assert isinstance(new, TorchSource)
    streams = [source.model for source in (old, new) if isinstance(source.model, StreamModel)]
    after = bundle.manifest.spec
    chunk = after.entry("step").inputs[0].shape[1]
    before = old.spec(after.batch, chunk, planned.options.debug_outputs)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / GRAPHS).mkdir()
        old.write_graphs(before, directory / GRAPHS, planned.options.opset)
        work = [work_of(path / GRAPHS / graph_file("step")) for path in (directory, bundle.path)]
        artifact = next((item for item in bundle.manifest.artifacts if item.parity.status == "passed"), None)
        times = None
        if artifact is not None:
            with (
                _open(old, before, directory, artifact.target, chosen_threads(None, {"step": work[0].total})) as first,
                open_bundle(bundle, artifact.target, precision=artifact.precision) as second,
            ):
                times = _times(first, second)
    slots = [sum(layer.manager.max_states for layer in nsm_layers(model)) for model in streams]
    return Savings(
        None if artifact is None else artifact.target,
        (slots[0], slots[1]),
        (old.parameters, new.parameters),
        (before.state_nbytes // before.batch, after.state_nbytes // after.batch),
        (work[0].flops, work[1].flops),
        times,
    )


def _open(source: Source, spec: StepSpec, directory: Path, name: str, threads: int | None) -> Session:
    """Build a target from the graphs in a directory, and open a session on it."""
    target = find_target(name)
    spec = target.served(spec)
    np.savez(directory / STATE_INIT, allow_pickle=False, **dict(source.initial_arrays(spec.batch)))
    artifact = build_target(directory, spec, target, None)
    found = entry_files(target, spec, [record.path for record in artifact.files], directory)
    files = {entry: directory / path for entry, path in found.items()}
    runtime = loader(target, artifact.options)(files, spec, target.devices[0], threads, "fp32")
    return Session(runtime, spec, source.initial_arrays(spec.batch), "", target.name)


def _times(old: Session, new: Session) -> tuple[float, float]:
    """Return the median microseconds per step of both sessions."""
    calls = [calls_of(session)["step"] for session in (old, new)]
    rounds = [[measure_call(call, rounds=1) for call in calls] for _ in range(_ROUNDS)]
    micro = np.median(np.array(rounds) * 1e6, 0)
    return float(micro[0]), float(micro[1])
