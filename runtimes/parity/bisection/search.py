"""Bisect a parity failure: find the wrong operation, or the state that accumulates errors.

If a single step from the reference's state is over budget, an operation is at fault: see `bisect_operation`. If only
the free run is over budget, a state is at fault: the search repeats the run with one state at a time replaced by the
reference's at every sampled step, and names the state with the most effective replacement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nsm.bundle import Bundle
from nsm.errors import NonFiniteError, UnsupportedError
from nsm.manifest import Artifact
from nsm.results import Quantiles
from nsm.runtimes.base import Progress
from nsm.runtimes.parity.bisection.operation import find_operation
from nsm.runtimes.parity.budgets import Budget
from nsm.runtimes.parity.collector import Findings
from nsm.runtimes.parity.comparison import check_comparable
from nsm.runtimes.parity.mask_decisions import thresholds_of
from nsm.runtimes.parity.metrics import quantile
from nsm.runtimes.parity.replay import free_run, groups, one_step
from nsm.runtimes.parity.report import Bisection
from nsm.runtimes.session import Session
from nsm.runtimes.targets import TARGETS, find_target
from nsm.trace import Trace


def bisect(
    bundle: Bundle,
    artifact: Artifact,
    session: Session,
    trace: Trace,
    budget: Budget,
    progress: Progress | None = None,
) -> Bisection:
    """Find the operation or state at fault in an artifact.

    Args:
        bundle: the verified bundle of the artifact.
        artifact: artifact of a bisectable target.
        session: over the artifact; its streams are reset.
        trace: the bundle's golden trace, or its first steps.
        budget: of the artifact's precision.
        progress: called after every part of the search.

    Raises:
        UnsupportedError: the target shows no intermediate results.
        MissingDependencyError: onnx or onnxruntime is not installed, and an operation is to be named.
        InputError: the trace is not one of the session's model.
    """
    check_bisectable(artifact.target)
    check_comparable(trace, session)
    thresholds = thresholds_of(bundle.manifest.model.get("config", {}))
    found = Findings(trace, session.spec, budget, thresholds)
    try:
        for streams in groups(trace.state_streams, session.batch):
            for _ in one_step(trace, session, streams, found):
                pass
    except NonFiniteError:
        return find_operation(bundle, artifact, trace, budget, float("inf"), progress)
    finally:
        session.reset()
    worst, limit = found.furthest("one_step")
    if not worst.p99 <= limit:
        return find_operation(bundle, artifact, trace, budget, worst.p99, progress, worst.tensor)
    return find_state(trace, session, budget, worst, thresholds, progress)


def check_bisectable(target: str) -> None:
    """Raise `UnsupportedError` for a target that shows no intermediate results."""
    if not find_target(target).bisectable:
        able = ", ".join(item.name for item in TARGETS.values() if item.bisectable)
        raise UnsupportedError(
            f"An artifact of {target} shows no intermediate results, so --bisect does not support it; it supports "
            f"{able}. Bisect one of these in the bundle, for instance: --target onnxruntime"
        )


def find_state(
    trace: Trace,
    session: Session,
    budget: Budget,
    single: Quantiles,
    thresholds: Sequence[float] = (),
    progress: Progress | None = None,
) -> Bisection:
    """Name the state in which the error of the free run adds up, when single steps are within budget.

    Args:
        trace, session, budget, progress: as for `bisect`.
        single: the one-step error of the worst tensor.
        thresholds: of the model's decisions; see `nsm.runtimes.parity.mask_decisions`.
    """

    def run(*replaced: str) -> Findings | None:
        """Free-run the streams with recorded states; return None if the run became non-finite."""
        found = Findings(trace, session.spec, budget, thresholds)
        try:
            for streams in groups(trace.state_streams, session.batch):
                for _ in free_run(trace, session, streams, found, replaced):
                    pass
        except NonFiniteError:
            return None
        finally:
            session.reset()
        return found

    def error_of(found: Findings | None) -> float:
        return float("inf") if found is None else found.furthest("free_run")[0].p99

    whole = run()
    before = error_of(whole)
    limit = budget.free_run_p99 if whole is None else whole.furthest("free_run")[1]
    if whole is not None and before <= limit:
        return _nothing(single, budget)
    names = session.spec.state_names
    if whole is not None:
        # Replacing a state by an equal one has no effect.
        errors = whole.errors("free_run")
        exact = [name for name in names if name not in errors and whole.mismatches]
        names = (*(name for name in names if name in errors and quantile(errors[name], 1.0) > 0), *exact)
    replaced = {}
    for done, name in enumerate(names, 1):
        replaced[name] = error_of(run(name))
        if progress is not None:
            progress(done, len(names) + 1)
    together = error_of(run(*session.spec.state_names))
    if progress is not None:
        progress(len(names) + 1, len(names) + 1)
    best = min(replaced, key=lambda name: replaced[name], default=None)
    return _state(best, before, replaced, together, limit, trace)


def _state(
    best: str | None, before: float, replaced: Mapping[str, float], together: float, limit: float, trace: Trace
) -> Bisection:
    if best is None or not replaced[best] < before:
        explanation = (
            f"Single steps are within budget, the free run is not ({before:.2e}), and no state helps when it is "
            "replaced by the reference's: the target carries something that is not in its states."
        )
        return Bisection("state", best or "", before, limit, explanation, None, None, replaced, together)
    cured = replaced[best] <= limit
    explanation = (
        f"Accumulated state, not one operation: with {best} replaced by the reference's at the {len(trace.sampled)} "
        f"sampled steps the free-run error falls from {before:.2e} to {replaced[best]:.2e}, which is "
        + ("within" if cured else "still over")
        + f" the budget of {limit:.2g}."
    )
    if not cured:
        explanation += f" With all states replaced it is {together:.2e}: residual error accumulated between samples."
    return Bisection("state", best, before, limit, explanation, None, None, replaced, together)


def _nothing(single: Quantiles, budget: Budget) -> Bisection:
    explanation = (
        "Nothing is over budget, neither in one step nor in the free run. The tensor with the largest one-step error "
        f"is {single.tensor}: p99 {single.p99:.2e}, the budget {budget.one_step_p99:.2g}."
    )
    return Bisection("none", single.tensor, single.p99, budget.one_step_p99, explanation)
