"""A session over a BufferedRuntime in plain numpy."""

from __future__ import annotations

from collections.abc import Mapping

from nsm.runtimes.backends.buffered import Bind, BoundGraph, BufferedRuntime
from nsm.runtimes.session.session import Session
from nsm.spec import COUNT, StepSpec
from nsm.trace import Array, Arrays
from tests.runtimes.fake import FINGERPRINT, RING, fake_initial, fake_run


class Graph:
    """One entry as a backend runs it: outputs are written in place, states first, as shared memory allows."""

    def __init__(self, spec: StepSpec, entry: str) -> None:
        self.spec, self.entry = spec, spec.entry(entry)
        self.opened = 0
        self.bound: list[tuple[Arrays, Arrays]] = []
        self.ran: list[int] = []

    def open(self) -> Bind:
        self.opened += 1
        return self.bind

    def bind(self, read: Arrays, written: Arrays) -> BoundGraph:
        index = len(self.bound)
        self.bound.append((read, written))
        self.pointed = 0

        def point(name: str, array: Array) -> None:
            self.pointed += 1
            written[name] = array

        reads, writes = self.spec.states_of(self.entry.reads), self.spec.states_of(self.entry.writes)

        def run() -> None:
            self.ran.append(index)
            for state in writes:
                written[state.present][...] = 0  # what an aliased input would lose
            held = {state.name: read[state.past] for state in reads}
            held = {**{name: value for name, value in fake_initial(self.spec).items() if name not in held}, **held}
            outputs, after = fake_run(self.entry.name, read, held)
            for name, value in outputs.items():
                written[name][...] = value
            for state in writes:
                new = after[state.name]
                if state.append_axis is not None:  # all rows, also those of tokens that do not count
                    rows = written[state.present]
                    for lane, count in enumerate(read[self._past(COUNT)]):
                        for row in range(rows.shape[1]):
                            rows[lane, row] = new[lane, (count + row) % RING]
                else:
                    written[state.present][...] = new

        return BoundGraph(run, point)

    def _past(self, name: str) -> str:
        return self.spec.states_of((name,))[0].past


def runtime(spec: StepSpec) -> tuple[BufferedRuntime, Mapping[str, Graph]]:
    graphs = {entry.name: Graph(spec, entry.name) for entry in spec.entries}
    return BufferedRuntime(spec, {name: graph.open for name, graph in graphs.items()}, "fp32"), graphs


def buffered_session(spec: StepSpec) -> tuple[Session, Mapping[str, Graph]]:
    buffered, graphs = runtime(spec)
    return Session(buffered, spec, fake_initial(spec), FINGERPRINT, "buffered"), graphs
