"""EXPERIMENTS: the tests of a foreign step before it is accepted; `examine` runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nsm.adapters.validate import calls, lanes, splits, streams
from nsm.adapters.validate.step import Keeps, Step
from nsm.adapters.validate.subject import Skipped, Subject
from nsm.manifest import Experiment as Result
from nsm.results import Message
from nsm.trace import Array


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Args:
        name: as reports list it.
        shows: property of a step that passes.
        caught: the fault that led to it.
        run: raises where the step fails; gives a reason where there is nothing to show.
    """

    name: str
    shows: str
    caught: str
    run: Callable[[Subject], Skipped | None]


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment("finite", "outputs and states are finite", "a logarithm of negative samples", calls.finite),
    Experiment("shapes", "states keep shape and dtype, outputs are [B, T, ...]", "a cache that grows", calls.shapes),
    Experiment("arguments", "arguments are not written to", "h.mul_(0.9) on the given state", calls.arguments),
    Experiment("random", "no random numbers are drawn", "F.dropout without training=self.training", calls.random),
    Experiment("fill", "states are run until none is filling", "a window that wraps after 256 tokens", streams.fill),
    Experiment("kept", "nothing is kept from call to call", "a cache in a registered buffer", streams.kept),
    Experiment("repeat", "a stream gives the same when run again", "a global that counts calls", streams.repeat),
    Experiment("read", "every state is read", "an exporter that merged two equal inputs", streams.read),
    Experiment("split", "any split of a sequence gives the same", "a length built in by tracing", splits.split),
    Experiment("lanes", "streams side by side are what they are alone", "position[0] for all streams", lanes.lanes),
    Experiment("offline", "steps give the model's own output", "a window kept in a Python number", splits.offline),
)
"""In the order in which they run: later ones rely on what earlier ones showed."""


@dataclass(frozen=True)
class Examination:
    """Results of the experiments on a step.

    Args:
        shapes: of each output, one lane and one token.
        lanes: the only number of streams side by side, None for any number.
        why: the reason, where it is one.
        filled: tokens after which no state was filling any more.
        lent: attributes that are written before they are read; no state.
        experiments: result of each.
        messages: messages for the user.
    """

    shapes: Mapping[str, tuple[int, ...]]
    lanes: int | None
    why: str
    filled: int
    lent: tuple[str, ...]
    experiments: tuple[Result, ...]
    messages: tuple[Message, ...]


def examine(step: Step, samples: Sequence[Array] = ()) -> Examination:
    """Run all experiments on a step.

    Args:
        step: a foreign step.
        samples: real sequences, [T, *token] each, for one that makes nothing finite of made-up tokens.

    Raises:
        InputError: samples that show nothing.
        ConfigError, UnsupportedError: a failed experiment; names the behaviour, the expectation and the remedy.
    """
    subject = Subject(step, samples, reach=step.capacity)
    if isinstance(step, Keeps):
        subject.kept = step.kept()
    results = []
    for experiment in EXPERIMENTS:
        skipped = experiment.run(subject)
        if skipped is None:
            results.append(Result(experiment.name, "passed", experiment.shows))
        else:
            results.append(Result(experiment.name, "skipped", skipped.reason))
    assert subject.trace is not None
    return Examination(
        subject.shapes,
        subject.lanes,
        subject.why,
        subject.trace.filled,
        tuple(subject.lent),
        tuple(results),
        tuple(subject.messages),
    )


def summary(experiments: Sequence[Result]) -> str:
    """Which experiments passed, and which were skipped and why, in a sentence."""
    passed = [item.name for item in experiments if item.status == "passed"]
    left = [f"{item.name} ({item.detail.partition('. ')[0]})" for item in experiments if item.status == "skipped"]
    return f"examined: {', '.join(passed)} passed" + (f"; skipped: {', '.join(left)}" if left else "")
