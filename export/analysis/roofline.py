"""The share of the roofline that an entry reaches on this machine. Needs onnx, not torch.

The roofline of a graph is the sum over its operations of max(FLOPs / peak, bytes / bandwidth) (Williams et al. 2009).
Linear ops count with all their operands. All other operations could be fused into them, so only the inputs, outputs and
states that they read and write count. The roofline is a lower bound of the time, independent of intermediate results.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from nsm.bundle import GRAPHS, graph_file
from nsm.errors import UnsupportedError
from nsm.export.builders import Built, Request
from nsm.export.graphs import Machine, Work
from nsm.runtimes import Progress, Target
from nsm.runtimes.bench import Calls, times_us
from nsm.runtimes.opening import entry_files
from nsm.runtimes.session import Session
from nsm.spec import EntrySpec, StepSpec, TensorSpec

# Large enough to exceed the caches, and to run longer than threads need to start.
_PEAK_SIDE, _STREAM_BYTES = 1024, 256_000_000


@dataclass(frozen=True)
class Reached:
    """Result of an entry, measured in turns with the MatMuls that measure the machine.

    Args:
        machine: median peak FLOP/s and bandwidth.
        least: the roofline's time in seconds.
        took: median time of a call in seconds.
        share: median over rounds of the roofline's time divided by the entry's time in the same round.
        low, high: quartiles of the share.
    """

    machine: Machine
    least: float
    took: float
    share: float
    low: float
    high: float


@contextlib.contextmanager
def products(target: Target, threads: int | None = None) -> Iterator[Callable[[], Machine]]:
    """Yield a function that measures a large MatMul and a large matrix-vector product on a target.

    Each call of the function runs both a few times.

    Raises:
        UnsupportedError: the target does not run on a CPU.
    """
    side = _PEAK_SIDE
    columns = _STREAM_BYTES // 4 // side
    with _product(target, side, side, 4 * side, threads) as large, _product(target, 1, side, columns, threads) as wide:
        yield lambda: Machine(
            2.0 * side * side * 4 * side / measure_call(large, rounds=1, calls=3),
            4.0 * side * columns / measure_call(wide, rounds=1, calls=5),
        )


def measure_reached(
    work: Mapping[str, Work],
    calls: Mapping[str, Callable[[], object]],
    machine: Callable[[], Machine],
    reset: Callable[[], object],
    rounds: int = 9,
    progress: Progress | None = None,
) -> dict[str, Reached]:
    """Measure the machine and the entries in turns; each entry starts a new stream. Return results by entry."""
    machines, times = [], np.zeros((len(calls), rounds))
    for number in range(rounds):
        machines.append(machine())
        for index, call in enumerate(calls.values()):
            reset()
            times[index, number] = measure_call(call, rounds=1)
        if progress is not None:
            progress(number + 1, rounds)
    typical = Machine(
        float(np.median([item.flops_per_second for item in machines])),
        float(np.median([item.bytes_per_second for item in machines])),
    )
    found = {}
    for entry, took in zip(calls, times, strict=True):
        shares = [work[entry].least_seconds(item) / time for item, time in zip(machines, took, strict=True)]
        low, share, high = (float(value) for value in np.quantile(shares, (0.25, 0.5, 0.75)))
        least = work[entry].least_seconds(typical)
        found[entry] = Reached(typical, least, float(np.median(took)), share, low, high)
    return found


def measure_call(call: Callable[[], object], rounds: int = 9, calls: int = 40) -> float:
    """Return the median over rounds of the mean time of a call, in seconds."""
    times = times_us(call, rounds * calls, settle=calls).reshape(rounds, calls)
    return float(np.median(times.mean(1))) / 1e6


def calls_of(session: Session) -> dict[str, Callable[[], object]]:
    """Return the calls to measure: each entry that takes tokens, on zeros; `decode` includes its commits.

    A call that would exceed the model's capacity resets the streams first.
    """
    tokens = {name: np.zeros(spec.shape, spec.numpy_dtype) for name, spec in _token_inputs(session.spec).items()}

    step = Calls(session, session.step, session.spec.entry("step").tokens)
    calls: dict[str, Callable[[], object]] = {"step": lambda: step(tokens["step"])}
    if "decode" in tokens:
        decode = Calls(session, session.decode, 1)
        calls["decode"] = lambda: decode(tokens["decode"])
    return calls


def _token_inputs(spec: StepSpec) -> dict[str, TensorSpec]:
    return {entry.name: entry.inputs[0] for entry in spec.entries if entry.inputs}


@contextlib.contextmanager
def _product(
    target: Target, rows: int, depth: int, columns: int, threads: int | None
) -> Iterator[Callable[[], object]]:
    """Yield a function that runs x[rows, depth] @ constant[depth, columns] on a target."""
    if "cpu" not in target.devices:
        raise UnsupportedError(
            f"The roofline needs a target that runs on a CPU; given {target.name}, which runs on "
            f"{', '.join(target.devices)}."
        )
    weight = np.random.default_rng(0).standard_normal((depth, columns), np.float32)
    spec = StepSpec(
        (
            EntrySpec(
                "step",
                (TensorSpec("tokens", (1, rows, depth), "float32", 1),),
                # A single output column, so that writing the result takes no time.
                (TensorSpec("outputs", (1, rows, 1), "float32", 1),),
                (),
                (),
            ),
        ),
        (),
        rows,
        1,
    )
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["tokens", "weight"], ["product"], name="product"),
            helper.make_node("ReduceMax", ["product", "axis"], ["outputs"], name="outputs", keepdims=1),
        ],
        "product",
        [helper.make_tensor_value_info("tokens", TensorProto.FLOAT, [1, rows, depth])],
        [helper.make_tensor_value_info("outputs", TensorProto.FLOAT, [1, rows, 1])],
        [onnx.numpy_helper.from_array(weight, "weight"), onnx.numpy_helper.from_array(np.array([-1]), "axis")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / "graphs").mkdir()
        onnx.save(model, str(directory / GRAPHS / graph_file("step")))
        request = Request(directory, directory / target.folder, spec, None)
        built: Built = target.builder_module().build(request)
        path = directory / entry_files(target, spec, built.files, directory)["step"]
        runtime = target.runtime_module().load({"step": path}, spec, target.devices[0], threads, "fp32")
        session = Session(runtime, spec, {}, "", target.name)
        tokens = np.ones((1, rows, depth), np.float32)
        try:
            yield lambda: session.step(tokens)
        finally:
            session.close()
