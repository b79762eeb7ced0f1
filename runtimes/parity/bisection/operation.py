"""The operation at fault: the first one whose result differs from that of the portable graph.

Both run on the same inputs and states of the reference, with intermediate results as outputs. The result is the first
operation whose output differs although its inputs agree. Tensors that the artifact does not expose are skipped. Tensors
have their names in the portable graph.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from nsm.bundle import GRAPHS, Bundle, graph_file
from nsm.errors import NonFiniteError
from nsm.manifest import Artifact
from nsm.runtimes.base import Progress
from nsm.runtimes.parity.bisection.probes import Node, Probe, onnx_probe, openvino_probe, read_nodes
from nsm.runtimes.parity.budgets import Budget
from nsm.runtimes.parity.collector import Findings
from nsm.runtimes.parity.metrics import probed_error, quantile
from nsm.runtimes.parity.replay import groups, one_step
from nsm.runtimes.parity.report import Bisection
from nsm.runtimes.session import Session
from nsm.runtimes.targets import find_target
from nsm.trace import Arrays, Trace


def find_operation(
    bundle: Bundle,
    artifact: Artifact,
    trace: Trace,
    budget: Budget,
    error: float,
    progress: Progress | None = None,
    tensor: str = "",
) -> Bisection:
    """Name the operation at fault, when single steps are over budget.

    Args:
        bundle, artifact, trace, budget, progress: as for `bisect`.
        error, tensor: error and name of the worst output or state, for the case that no operation is found.
    """
    graph = bundle.locate(f"{GRAPHS}/{graph_file('step')}")
    nodes = read_nodes(graph)
    limit = budget.one_step_p99
    wrong = _portable_errors(bundle, trace, budget)
    graph_is_wrong = [name for name, value in wrong.items() if value > limit]
    if graph_is_wrong:
        places = {name: place for place, node in enumerate(nodes) for name in node.outputs}
        name = min(graph_is_wrong, key=lambda name: places[name])
        node = nodes[places[name]]
        explanation = (
            f"The portable graph itself, run by unoptimized ONNX Runtime, does not match the recorded trace: of its "
            f"outputs and states {name} is the first over budget. So the graph or its weights differ from the "
            "reference, and the target is not at fault. Export the bundle again."
        )
        return Bisection("operation", name, wrong[name], limit, explanation, node.op, node.name)
    portable, shown = onnx_probe(graph, optimise=False), _probe(bundle, artifact, nodes)
    errors = compare_probes(portable, shown, feeds_of(bundle, trace), progress)
    spec = bundle.manifest.spec
    step = spec.entry("step")
    ends = [*(item.name for item in step.outputs), *(item.present for item in spec.states_of(step.writes))]
    fault = first_at_fault(nodes, errors, ends, limit)
    if fault is None:
        explanation = (
            f"{tensor or 'An output or state'} is over budget, but with every intermediate result exposed no "
            "operation is. So the error comes from how the backend fuses operations."
        )
        return Bisection("operation", tensor or ends[0], error, limit, explanation)
    node, name, unseen = fault
    hidden = f" The target does not expose {unseen} tensors before it; their operations may be at fault instead."
    explanation = (
        f"One operation, not accumulation: {node.op} {node.name} gives {name} with an error of {errors[name]:.2e}, and "
        f"its inputs agree with the portable graph within {limit:.2g}."
    )
    explanation += hidden if unseen else ""
    return Bisection("operation", name, errors[name], limit, explanation, node.op, node.name)


def first_at_fault(
    nodes: Sequence[Node], errors: Mapping[str, float], ends: Collection[str], limit: float
) -> tuple[Node, str, int] | None:
    """Return the first operation before a faulty output with good inputs and a result over the limit.

    Args:
        nodes: in topological order.
        errors: errors of the exposed tensors; the search passes through the others.
        ends: outputs of the graph.
        limit: largest allowed error.

    Returns:
        The operation, its faulty result, and how many unknown tensors lie before it;
        None if no end is over the limit.
    """
    producers = {name: node for node in nodes for name in node.outputs}

    def upstream(names: Collection[str]) -> set[str]:
        """These tensors and those before them, as far as they are faulty or unknown."""
        reached: set[str] = set()
        pending = list(names)
        while pending:
            name = pending.pop()
            if name in producers and name not in reached and not errors.get(name, np.inf) <= limit:
                reached.add(name)
                pending += producers[name].inputs
        return reached

    chain = upstream([name for name in ends if name in errors])
    for node in nodes:
        for name in node.outputs:
            if name in chain and name in errors:
                return node, name, len(upstream(node.inputs))
    return None


def compare_probes(
    portable: Probe, shown: Probe, feeds: Sequence[Arrays], progress: Progress | None = None
) -> dict[str, float]:
    """The 99th percentile over calls of the relative error of every tensor that both show in the same shape."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for done, feed in enumerate(feeds, 1):
        given, wanted = shown(feed), portable(feed)
        for name in given.keys() & wanted.keys():
            if given[name].shape == wanted[name].shape:
                pairs.setdefault(name, []).append(probed_error(given[name], wanted[name]))
        if progress is not None:
            progress(done, len(feeds))
    errors = {}
    for name, measured in pairs.items():
        difference, scale = np.array(measured).T
        usual = float(np.sqrt(np.mean(scale**2)))
        with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0, inf / inf
            relative = np.where(difference == 0.0, 0.0, difference / np.maximum(scale, usual))
        errors[name] = quantile(np.where(np.isnan(relative), np.inf, relative), 0.99)
    return errors


def feeds_of(bundle: Bundle, trace: Trace) -> list[Arrays]:
    """Inputs of the graph `step` at every sampled step, by name: states of the reference, all lanes filled."""
    spec = bundle.manifest.spec
    entry = spec.entry("step")
    whole = {
        item.name: np.full(item.shape, item.maximum, item.numpy_dtype)
        for item in entry.inputs
        if item.name not in trace.inputs
    }
    feeds = []
    for streams in groups(trace.state_streams, spec.batch):
        lanes = np.resize(streams, spec.batch)
        for index, step in enumerate(trace.sampled.tolist()):
            inputs = {name: value[lanes, step] for name, value in trace.inputs.items()}
            states = {state.past: trace.before[state.name][lanes, index] for state in spec.states_of(entry.reads)}
            feeds.append({**whole, **inputs, **states})
    return feeds


def _portable_errors(bundle: Bundle, trace: Trace, budget: Budget) -> dict[str, float]:
    """One-step error (p99) of the portable graph, by the names of its outputs; infinite where it is not finite."""
    spec = bundle.manifest.spec
    files = {entry.name: bundle.locate(f"{GRAPHS}/{graph_file(entry.name)}") for entry in spec.entries}
    runtime = find_target("onnx").runtime_module().load(files, spec, "cpu", None)
    found = Findings(trace, spec, budget)
    finite = True
    with Session(runtime, spec, bundle.state_init(), bundle.manifest.fingerprint, "onnx") as session:
        try:
            for streams in groups(trace.state_streams, spec.batch):
                for _ in one_step(trace, session, streams, found):
                    pass
        except NonFiniteError:
            finite = False
    names = {state.name: state.present for state in spec.states}
    return {
        names.get(name, name): quantile(errors, 0.99) if finite else float("inf")
        for name, errors in found.errors("one_step").items()
        if name not in names or name in spec.entry("step").writes
    }


def _probe(bundle: Bundle, artifact: Artifact, nodes: Sequence[Node]) -> Probe:
    target = find_target(artifact.target)
    target.require()
    names = [record.path for record in artifact.files if PurePosixPath(record.path).name == target.file("step")]
    # An artifact may use the portable graphs for some entries and its own graph for others.
    path: Path = bundle.locate(next((name for name in names if not name.startswith(f"{GRAPHS}/")), names[0]))
    if target.name == "openvino":
        names_of_results = {name for node in nodes for name in node.outputs}
        return openvino_probe(path, names_of_results, artifact.precision, artifact.options)
    return onnx_probe(path, optimise=target.name != "onnx")
