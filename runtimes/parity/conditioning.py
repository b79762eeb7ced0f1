"""The conditioning floor: the error that any fp32 implementation of the model must be expected to have.

The reference runs again with every input, state and constant weight multiplied by 1 + r * 2^-24, r drawn from
{-1, 0, 1}: a relative change by half a unit in the last place, as fp32 rounding makes anyway (backward error; Higham
2002, chapter 1). The floor of a tensor is the 99th percentile of the change of its results, in the measure of the
comparison. It needs no fp64, so every reference has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from nsm.errors import NonFiniteError
from nsm.runtimes.base import Runtime, State
from nsm.runtimes.parity.budgets import find_budget
from nsm.runtimes.parity.collector import Findings
from nsm.runtimes.parity.metrics import quantile
from nsm.runtimes.parity.replay import free_run, groups, one_step
from nsm.runtimes.session import Session
from nsm.trace import Array, Arrays, Trace

DRAWS = 3
"""Number of perturbed runs."""
STREAMS = 2
"""Minimum number of streams in a perturbed run; all lanes of a call are used."""
KINDS = ("one_step", "free_run")


class Perturbation:
    """Multiplies fp32 numbers by 1 + r * 2^-24, with r drawn from {-1, 0, 1}; other arrays stay unchanged.

    Args:
        seed: seed of the draws.
    """

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def __call__(self, array: Array) -> Array:
        if array.dtype != np.float32:
            return array
        drawn = self._generator.integers(-1, 2, array.shape, np.int8)
        with np.errstate(over="ignore"):  # the largest float32, as masks have it, stays unchanged
            found = (array * (1.0 + drawn * 2.0**-24)).astype(np.float32)
        return np.where(np.isfinite(found), found, array)

    def runtime(self, runtime: Runtime) -> Runtime:
        """Return a runtime that perturbs the inputs and the state of every call."""
        return _Perturbed(runtime, self)


class _Perturbed:
    """A runtime with perturbed inputs and states; see `nsm.runtimes.base.Runtime`."""

    def __init__(self, runtime: Runtime, perturbation: Perturbation) -> None:
        self._runtime, self._perturbation = runtime, perturbation
        self.effective_precision = runtime.effective_precision
        self.load_state, self.read_state = runtime.load_state, runtime.read_state
        self.finite, self.close = runtime.finite, runtime.close

    def call(self, entry: str, inputs: Mapping[str, Array], state: State) -> tuple[Arrays, State]:
        held = {name: self._perturbation(value) for name, value in self._runtime.read_state(state).items()}
        given = {name: self._perturbation(value) for name, value in inputs.items()}
        return self._runtime.call(entry, given, self._runtime.load_state(held))


def conditioning_calls(streams: int, steps: int, state_streams: int, samples: int, batch: int) -> int:
    """Return the number of calls that `conditioning_floor` makes on a trace of these sizes; see `Trace`."""
    return DRAWS * (len(_some(streams, batch)) * steps + len(_some(state_streams, batch)) * samples)


def conditioning_floor(
    trace: Trace,
    open_perturbed: Callable[[Perturbation], Session],
    thresholds: Sequence[float] = (),
    advance: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Return the conditioning floor by kind of error ("one_step", "free_run") and tensor.

    Args:
        trace: golden trace of the reference, without floors.
        open_perturbed: opens a session over the reference with perturbed weights, inputs and states.
        thresholds: thresholds of the model's mask decisions; see `nsm.runtimes.parity.mask_decisions`.
        advance: called after every call.

    Returns:
        The floors; infinity for all tensors if a perturbed run produces NaN or infinity.
    """
    drawn: list[dict[str, Arrays]] = []
    for seed in range(DRAWS):
        with open_perturbed(Perturbation(seed)) as session:
            found = Findings(trace, session.spec, find_budget("fp32"), thresholds)
            runs = [free_run(trace, session, part, found) for part in _some(trace.streams, session.batch)]
            runs += [one_step(trace, session, part, found) for part in _some(trace.state_streams, session.batch)]
            try:
                for run in runs:
                    for _ in run:
                        advance()
            except NonFiniteError:
                return {kind: dict.fromkeys(found.errors(kind), np.inf) for kind in KINDS}
            drawn.append({kind: found.errors(kind) for kind in KINDS})
    return {kind: _pooled(item[kind] for item in drawn) for kind in KINDS}


def _some(streams: int, batch: int) -> list[Array]:
    """Return the groups of streams that a perturbed run takes."""
    return groups(streams, batch)[: -(-STREAMS // batch)]


def _pooled(draws: Iterable[Arrays]) -> dict[str, float]:
    """Return the 99th percentile by tensor over all draws; tensors that were not compared are left out."""
    parts = list(draws)
    found = {name: quantile(np.stack([part[name] for part in parts]), 0.99) for name in parts[0]}
    return {name: value for name, value in found.items() if not np.isnan(value)}
