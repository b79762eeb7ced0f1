from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nsm.errors import RunError, StreamError
from nsm.runtimes.base import State
from nsm.runtimes.buffered import BufferedRuntime, Run
from nsm.runtimes.session import Session
from nsm.spec import StepSpec
from nsm.trace import Array, Arrays
from tests.runtimes.fake import CHUNK, FINGERPRINT, assert_same, fake_initial, fake_session, fake_spec, fake_step


class Graph:
    """A backend that writes its outputs in place, late states first, as one with shared memory may do."""

    def __init__(self, spec: StepSpec) -> None:
        self.spec = spec
        self.bound: list[tuple[Arrays, Arrays]] = []
        self.ran: list[int] = []

    def bind(self, read: Arrays, written: Arrays) -> Run:
        index = len(self.bound)
        self.bound.append((read, written))

        def run() -> None:
            self.ran.append(index)
            for state in self.spec.states:
                written[state.present][...] = 0  # what an aliased input would lose
            outputs, after = fake_step(read["tokens"], read["valid"], {s.name: read[s.past] for s in self.spec.states})
            written["outputs"][...] = outputs["outputs"]
            for state in self.spec.states:
                written[state.present][...] = after[state.name]

        return run


def runtime(spec: StepSpec) -> tuple[BufferedRuntime, Graph]:
    graph = Graph(spec)
    return BufferedRuntime(spec, {"step": graph.bind}, "fp32"), graph


def inputs(batch: int = 2, seed: int = 0) -> dict[str, Array]:
    tokens = np.random.default_rng(seed).integers(0, 11, (batch, CHUNK))
    return {"tokens": tokens, "valid": np.full(batch, CHUNK)}


def test_no_state_is_read_from_the_memory_it_is_written_to() -> None:
    spec = fake_spec()
    _, graph = runtime(spec)
    assert len(graph.bound) == 2
    for read, written in graph.bound:
        assert set(read) == {"tokens", "valid", *(state.past for state in spec.states)}
        assert set(written) == {"outputs", *(state.present for state in spec.states)}
        assert not any(np.shares_memory(a, b) for a in read.values() for b in written.values())


def test_what_one_call_writes_the_next_one_reads() -> None:
    spec = fake_spec()
    buffered, graph = runtime(spec)
    session = Session(buffered, spec, fake_initial(spec), FINGERPRINT, "buffered")
    honest = fake_session(spec)
    for step in range(5):
        tokens = inputs(seed=step)["tokens"]
        assert_same(session.step(tokens), honest.step(tokens))
        assert_same(session.read_state(), honest.read_state())
    assert graph.ran == [0, 1, 0, 1, 0]
    session.reset(1)
    honest.reset(1)
    tokens = inputs(seed=9)["tokens"]
    assert_same(session.step(tokens), honest.step(tokens))


def test_a_consumed_state_is_refused() -> None:
    spec = fake_spec()
    buffered, _ = runtime(spec)
    first = buffered.load_state(fake_initial(spec))
    _, second = buffered.call("step", inputs(), first)
    kept = buffered.read_state(second)
    with pytest.raises(StreamError, match="consumed by an earlier call"):
        buffered.call("step", inputs(), first)
    with pytest.raises(StreamError, match="load_state again"):
        buffered.read_state(first)
    assert_same(buffered.read_state(second), kept)
    buffered.load_state(fake_initial(spec))
    with pytest.raises(StreamError, match="consumed"):
        buffered.read_state(second)


def test_a_state_of_another_runtime_is_refused() -> None:
    spec = fake_spec()
    mine, _ = runtime(spec)
    other, _ = runtime(spec)
    mine.load_state(fake_initial(spec))
    with pytest.raises(StreamError, match="belongs to another runtime"):
        mine.call("step", inputs(), other.load_state(fake_initial(spec)))


def test_a_state_says_its_side_to_its_owner_only() -> None:
    owner = object()
    state = State(owner, 1)
    assert state.side(owner) == 1
    with pytest.raises(StreamError, match="belongs to another runtime"):
        state.side(object())


def test_everything_is_copied_in_and_out() -> None:
    spec = fake_spec()
    buffered, _ = runtime(spec)
    initial = fake_initial(spec)
    state = buffered.load_state(initial)
    for value in initial.values():
        value[...] = 0
    assert_same(buffered.read_state(state), fake_initial(spec))
    for value in buffered.read_state(state).values():
        value[...] = 0
    assert_same(buffered.read_state(state), fake_initial(spec))
    given = inputs()
    outputs, state = buffered.call("step", given, state)
    kept = outputs["outputs"].copy()
    given["tokens"][...] = 0
    buffered.call("step", given, state)
    np.testing.assert_array_equal(outputs["outputs"], kept)


def test_a_call_that_fails_leaves_the_state_in_use() -> None:
    spec = fake_spec()
    graph = Graph(spec)

    def bind(read: Arrays, written: Arrays) -> Run:
        run = graph.bind(read, written)

        def fail_on_demand() -> None:
            run()
            if read["tokens"][0, 0] == 10:
                raise RuntimeError("out of memory")

        return fail_on_demand

    buffered = BufferedRuntime(spec, {"step": bind}, "fp32")
    state = buffered.load_state(fake_initial(spec))
    bad = inputs()
    bad["tokens"][0, 0] = 10
    with pytest.raises(RunError, match="failed while it ran step: out of memory"):
        buffered.call("step", bad, state)
    assert_same(buffered.read_state(state), fake_initial(spec))
    buffered.call("step", inputs(), state)


def test_each_entry_shares_the_one_state() -> None:
    spec = fake_spec()
    twice = replace(spec, entries=(*spec.entries, replace(spec.entry("step"), name="other")))
    first, second = Graph(spec), Graph(spec)
    buffered = BufferedRuntime(twice, {"step": first.bind, "other": second.bind}, "fp32")
    state = buffered.load_state(fake_initial(spec))
    _, state = buffered.call("step", inputs(seed=0), state)
    outputs, state = buffered.call("other", inputs(seed=1), state)
    honest = fake_session(spec)
    honest.step(inputs(seed=0)["tokens"])
    assert_same(outputs, honest.step(inputs(seed=1)["tokens"]))
    assert (first.ran, second.ran) == ([0], [1])
    buffered.close()


def test_a_closed_runtime_says_so() -> None:
    spec = fake_spec()
    buffered = BufferedRuntime(spec, {"step": Graph(spec).bind}, "fp32")
    state = buffered.load_state(fake_initial(spec))
    buffered.close()
    with pytest.raises(StreamError, match="The session is closed"):
        buffered.call("step", inputs(), state)
