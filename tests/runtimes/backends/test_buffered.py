from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from nsm.errors import BuildError, RunError, StreamError
from nsm.runtimes.backends import buffered
from nsm.runtimes.backends.buffered import Banks, Bind, BoundGraph, BufferedRuntime, _Ring
from nsm.spec import OFFSET, StateSpec
from nsm.trace import Array, Arrays
from tests.runtimes.buffered import Graph, buffered_session, runtime
from tests.runtimes.fake import (
    CHUNK,
    ENTRIES,
    RING,
    VOCABULARY,
    assert_same,
    fake_initial,
    fake_session,
    fake_spec,
)
from tests.small_models import make_model


def inputs(batch: int = 2, seed: int = 0, length: int = CHUNK) -> dict[str, Array]:
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length))
    return {"tokens": tokens, "valid": np.full(batch, length)}


# -- which memory is read and which is written ------------------------------------------------------------------------


def test_no_state_is_read_from_the_memory_it_is_written_to() -> None:
    spec = fake_spec(ring=True)
    session, graphs = buffered_session(spec)
    random = np.random.default_rng(0)
    for _ in range(12):
        session.feed(random.integers(0, VOCABULARY, (2, 7)), random.integers(0, 8, 2))
    for graph in graphs.values():
        entry = graph.entry
        assert graph.bound, entry.name
        for read, written in graph.bound:
            states = spec.states_of(entry.reads)
            assert set(read) == {item.name for item in entry.inputs} | {state.past for state in states}
            states = spec.states_of(entry.writes)
            assert set(written) == {item.name for item in entry.outputs} | {state.present for state in states}
            assert not any(np.shares_memory(a, b) for a in read.values() for b in written.values())


def test_a_graph_is_bound_once_for_each_way_its_states_can_lie() -> None:
    spec = fake_spec()
    session, graphs = buffered_session(spec)
    for step in range(5):
        session.step(inputs(seed=step)["tokens"])
    assert graphs["step"].ran == [0, 1, 0, 1, 0]
    random = np.random.default_rng(0)
    for _ in range(60):
        session.feed(random.integers(0, VOCABULARY, (2, 9)), random.integers(0, 10, 2))
    touched = {tuple(sorted({*graph.entry.reads, *graph.entry.writes})) for graph in graphs.values()}
    assert len(touched) == 3
    for graph in graphs.values():
        assert len(graph.ran) > len(graph.bound), "a binding is used again"
        assert len(graph.bound) <= 2**3, "of what step, decode and commit turn over"


@pytest.mark.parametrize("ring", [False, True], ids=["", "ring"])
def test_what_one_call_writes_the_next_one_reads_whatever_the_entries(ring: bool) -> None:
    spec = fake_spec(3, ring=ring)
    session, _ = buffered_session(spec)
    honest, random = fake_session(spec), np.random.default_rng(1)
    for turn in range(40):
        tokens, valid = random.integers(0, VOCABULARY, (3, 11)), random.integers(0, 12, 3)
        assert_same(session.feed(tokens, valid), honest.feed(tokens, valid))
        assert_same(session.read_state(), honest.read_state())
        if turn % 7 == 3:
            snapshot = session.snapshot(turn % 3)
            for both in (session, honest):
                both.reset(1)
                both.restore(snapshot, 2)


def test_a_state_that_an_entry_does_not_touch_stays_in_its_place() -> None:
    spec = fake_spec()
    buffered, _ = runtime(spec)
    state = buffered.load_state(fake_initial(spec))
    _, state = buffered.call("step", inputs(), state)
    before = buffered.read_state(state)
    _, state = buffered.call("decode", inputs(length=1), state)
    after = buffered.read_state(state)
    assert_same({"0.written": after["0.written"]}, {"0.written": before["0.written"]})
    assert after[OFFSET].tolist() == [1, 1]
    _, state = buffered.call("commit", {}, state)
    assert_same(buffered.read_state(state), after)


# -- graphs are opened when they are needed ---------------------------------------------------------------------------


def test_a_graph_is_opened_when_it_is_first_used_and_once() -> None:
    spec = fake_spec()
    session, graphs = buffered_session(spec)

    def opened() -> list[int]:
        return [graphs[name].opened for name in ENTRIES]

    assert opened() == [0, 0, 0]
    for _ in range(2):
        session.step(inputs()["tokens"])
    assert opened() == [1, 0, 0]
    session.decode(np.zeros((2, 1), int))
    assert opened() == [1, 1, 0]
    for _ in range(CHUNK):
        session.decode(np.zeros((2, 1), int))
    assert opened() == [1, 1, 1]


def test_a_graph_that_cannot_be_opened_leaves_the_state_in_use() -> None:
    spec = fake_spec()

    def refuse() -> Bind:
        raise BuildError("no such file")

    buffered = BufferedRuntime(spec, {"step": Graph(spec, "step").open, "decode": refuse}, "fp32")
    state = buffered.load_state(fake_initial(spec))
    with pytest.raises(BuildError, match="no such file"):
        buffered.call("decode", inputs(length=1), state)
    assert_same(buffered.read_state(state), fake_initial(spec))
    buffered.call("step", inputs(), state)


# -- handles ----------------------------------------------------------------------------------------------------------


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
    with pytest.raises(StreamError, match="load_state again"):
        buffered.finite(first)
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


def test_what_goes_in_is_copied_and_what_comes_out_is_the_callers_own() -> None:
    spec = fake_spec(ring=True)
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
    for _ in range(4):
        _, state = buffered.call("step", given, state)
        np.testing.assert_array_equal(outputs["outputs"], kept)


# -- outputs are not copied -------------------------------------------------------------------------------------------


def test_outputs_stay_as_they_are_for_as_long_as_anything_refers_to_them() -> None:
    """Against the honest recurrence, with whatever a caller may keep: all of it, views, views of views."""
    spec, random = fake_spec(), np.random.default_rng(0)
    session, _ = buffered_session(spec)
    honest = fake_session(spec)
    keep: list[Callable[[Array], Any]] = [
        lambda value: value,
        lambda value: value[0, -1:][..., :1],
        lambda value: value.T.reshape(-1, order="F"),
        lambda value: value.data,
        iter,
        lambda value: None,
    ]
    kept: list[tuple[Any, Any]] = []
    for _ in range(400):
        tokens, which = random.integers(0, VOCABULARY, (2, CHUNK)), random.integers(len(keep))
        kept.append((keep[which](honest.step(tokens)["outputs"]), keep[which](session.step(tokens)["outputs"])))
        if random.random() < 0.3:
            kept.pop(random.integers(len(kept)))
    assert len(kept) > 200
    for wanted, found in kept:
        if wanted is not None:
            first, second = (list(value) if isinstance(value, Iterator) else value for value in (wanted, found))
            np.testing.assert_array_equal(first, second)


def test_memory_of_outputs_that_nobody_refers_to_is_used_again() -> None:
    session, graphs = buffered_session(fake_spec())
    places = set()
    for step in range(50):
        places.add(session.step(inputs(seed=step)["tokens"])["outputs"].ctypes.data)
    assert len(places) == 2, "one for each side of the state"
    assert graphs["step"].pointed == 0


def test_without_exact_reference_counts_each_call_writes_to_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in free-threaded builds of Python."""
    monkeypatch.setattr(buffered, "COUNTED", False)
    session, graphs = buffered_session(fake_spec())
    honest = fake_session(fake_spec())
    for step in range(10):
        tokens = inputs(seed=step)["tokens"]
        assert_same(session.step(tokens), honest.step(tokens))
    assert graphs["step"].pointed == 9  # the first call has its memory


def test_only_what_is_held_is_replaced() -> None:
    session, graphs = buffered_session(fake_spec())
    held = [session.step(inputs(seed=step)["tokens"])["outputs"] for step in range(6)]
    assert len({array.ctypes.data for array in held}) == 6
    pointed = graphs["step"].pointed
    last = [held.pop(), held.pop()]
    del held
    for step in range(20):
        session.step(inputs(seed=step)["tokens"])
    assert graphs["step"].pointed == pointed + len(last)


def test_what_a_caller_does_to_its_outputs_is_its_own_affair() -> None:
    spec = fake_spec()
    session, _ = buffered_session(spec)
    honest = fake_session(spec)
    for step in range(6):
        tokens = inputs(seed=step)["tokens"]
        found = session.step(tokens)["outputs"]
        np.testing.assert_array_equal(found, honest.step(tokens)["outputs"])
        found[...] = np.nan
        found.shape = (-1,)
        found.flags.writeable = False
        del found


def test_a_bare_loop_leaves_the_outputs_of_calls_before_it_alone() -> None:
    spec = fake_spec()
    session, _ = buffered_session(spec)
    outputs = [session.step(inputs(seed=step)["tokens"])["outputs"] for step in range(2)]
    kept = [value.copy() for value in outputs]
    assert isinstance(session.runtime, BufferedRuntime)
    bare = session.runtime.bare("step")
    for _ in range(4):
        bare()
    for value, wanted in zip(outputs, kept, strict=True):
        np.testing.assert_array_equal(value, wanted)


@pytest.mark.parametrize("ring", [False, True], ids=["", "ring"])
def test_a_call_that_fails_leaves_the_state_in_use(ring: bool) -> None:
    spec = fake_spec(ring=ring)
    graph = Graph(spec, "step")

    def bind(read: Arrays, written: Arrays) -> BoundGraph:
        run, point, _ = graph.bind(read, written)

        def fail_on_demand() -> None:
            run()
            if read["tokens"][0, 0] == 10:
                raise RuntimeError("out of memory")

        return BoundGraph(fail_on_demand, point)

    buffered = BufferedRuntime(spec, {"step": lambda: bind}, "fp32")
    state = buffered.load_state(fake_initial(spec))
    bad = inputs()
    bad["tokens"][0, 0] = 10
    with pytest.raises(RunError, match="failed while it ran step: out of memory"):
        buffered.call("step", bad, state)
    assert_same(buffered.read_state(state), fake_initial(spec))
    buffered.call("step", inputs(), state)


@pytest.mark.parametrize(("value", "finite"), [(np.nan, False), (np.inf, False), (3e38, True)])
def test_what_is_put_in_is_looked_at_for_numbers_that_are_not_finite(value: float, finite: bool) -> None:
    spec = fake_spec(ring=True)
    for name in ("0.bank", "0.tail", "0.written", "0.recent"):
        buffered, _ = runtime(spec)
        arrays = fake_initial(spec)
        arrays[name][1, -1] = value
        assert buffered.finite(buffered.load_state(arrays)) == finite, name


class Spoiled(Graph):
    """Writes `value` at the end of a state where one is named."""

    spoiled: str | None = None
    value = 0.0

    def bind(self, read: Arrays, written: Arrays) -> BoundGraph:
        run, point, _ = super().bind(read, written)

        def run_and_spoil() -> None:
            run()
            if self.spoiled is not None:
                written[self.spoiled][-1, -1] = self.value

        return BoundGraph(run_and_spoil, point)


@pytest.mark.parametrize(("value", "finite"), [(np.nan, False), (-np.inf, False), (3e38, True)])
@pytest.mark.parametrize("entry", ["step", "decode", "commit"])
def test_what_a_call_writes_is_looked_at_wherever_it_lies(entry: str, value: float, finite: bool) -> None:
    spec = fake_spec(ring=True)
    given = {"step": inputs(), "decode": inputs(length=1), "commit": {}}
    looked = 0
    for state in spec.states_of(spec.entry(entry).writes):
        if state.dtype != "float32":
            continue
        graphs = {name: Spoiled(spec, name) for name in ENTRIES}
        buffered = BufferedRuntime(spec, {name: graph.open for name, graph in graphs.items()}, "fp32")
        handle = buffered.load_state(fake_initial(spec))
        for name in ("decode", "step", "commit", "decode", "commit", "step"):  # sides come apart
            _, handle = buffered.call(name, given[name], handle)
            assert buffered.finite(handle)
        graphs[entry].spoiled, graphs[entry].value = state.present, value
        _, handle = buffered.call(entry, given[entry], handle)
        assert buffered.finite(handle) == finite, state.name
        looked += 1
    assert looked


def test_all_states_are_one_array_to_look_at() -> None:
    spec = fake_spec()
    banks = Banks(spec)
    names = [state.name for state in spec.states if state.dtype == "float32"]
    assert len(names) > 2
    (whole,) = banks.flat(names, dict.fromkeys(spec.state_names, 1))
    for name in names:
        assert np.shares_memory(whole, banks.buffers[name][1])
        assert not np.shares_memory(whole, banks.buffers[name][0])
        assert banks.buffers[name][0].ctypes.data % 64 == 0


def test_what_a_step_writes_is_one_array_although_it_does_not_write_all() -> None:
    spec = make_model().spec(1)
    written = [state.name for state in spec.states_of(spec.entry("step").writes) if state.dtype == "float32"]
    others = [state.name for state in spec.states if state.dtype == "float32" and state.name not in written]
    assert written
    assert others
    sides = {name: int(name in written) for name in spec.state_names}
    banks = Banks(spec)
    (whole,) = banks.flat(written, sides)
    assert all(np.shares_memory(whole, banks.buffers[name][1]) for name in written)
    assert not any(np.shares_memory(whole, banks.buffers[name][1]) for name in others)


@pytest.mark.parametrize("pattern", range(8))
def test_states_that_lie_on_two_sides_are_all_looked_at(pattern: int) -> None:
    spec = fake_spec()
    banks = Banks(spec)
    names = [state.name for state in spec.states if state.dtype == "float32"]
    sides = {name: pattern >> index & 1 for index, name in enumerate(names)}
    for number, name in enumerate(names, 1):
        banks.buffers[name][sides[name]][...] = number
        banks.buffers[name][1 - sides[name]][...] = -1
    parts = banks.flat(names, {**dict.fromkeys(spec.state_names, 0), **sides})
    found = np.concatenate(parts)
    for number, name in enumerate(names, 1):
        assert (found == number).sum() == banks.buffers[name][0].size
    assert (found >= 0).all(), "and nothing of the other side"


def test_a_closed_runtime_says_so() -> None:
    spec = fake_spec()
    buffered, _ = runtime(spec)
    state = buffered.load_state(fake_initial(spec))
    _, state = buffered.call("step", inputs(), state)
    buffered.close()
    for entry in ENTRIES:
        with pytest.raises(StreamError, match=r"The session is closed\. Open the bundle again"):
            buffered.call(entry, inputs(), state)
    calls: list[Callable[[], object]] = [
        lambda: buffered.load_state(fake_initial(spec)),
        lambda: buffered.read_state(state),
        lambda: buffered.finite(state),
    ]
    for call in calls:
        with pytest.raises(StreamError, match=r"The session is closed\. Open the bundle again"):
            call()
    buffered.close()


def test_a_closed_runtime_lets_go_of_its_memory() -> None:
    """Except for the outputs that a caller holds, which stay as they are."""
    spec = fake_spec(ring=True)
    session, graphs = buffered_session(spec)
    outputs = session.step(inputs()["tokens"])["outputs"]
    kept = outputs.copy()
    session.step(inputs()["tokens"])
    assert isinstance(session.runtime, BufferedRuntime)
    banks = session.runtime._banks
    memory = [weakref.ref(array) for pair in banks.buffers.values() for array in pair]
    memory += [weakref.ref(arena) for arena in banks._arenas]
    for graph in graphs.values():
        graph.bound.clear()
    session.close()
    assert memory
    assert not [found for found in memory if found() is not None]
    np.testing.assert_array_equal(outputs, kept)


# -- states that are appended to --------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [(0, 1), (0, 2), (1, 0), (2, 0)], ids=str)
@pytest.mark.parametrize("length", [1, 3, 5, 6])
def test_rows_are_written_as_a_ring(axes: tuple[int, int], length: int) -> None:
    """Against the obvious loop, for lanes at all places of the ring, and all numbers of rows that count."""
    lanes, random = 4 * (length + 1), np.random.default_rng(0)
    order = (axes[0], axes[1])
    shape = np.moveaxis(np.empty((lanes, RING, 2)), (0, 1), order).shape
    spec = StateSpec("0.ring", shape, "float32", batch_axis=axes[0], append_axis=axes[1])
    count = random.integers(0, 3 * RING, lanes)
    valid = np.arange(lanes) % (length + 1)
    before = random.standard_normal((lanes, RING, 2)).astype(np.float32)
    rows = random.standard_normal((lanes, length, 2)).astype(np.float32)
    for counts in (valid, None):
        wanted = before.copy()
        for lane in range(lanes):
            for row in range(length if counts is None else counts[lane]):
                wanted[lane, (count[lane] + row) % RING] = rows[lane, row]
        buffer = np.moveaxis(before, (0, 1), order).copy()
        _Ring(spec, np.moveaxis(rows, (0, 1), order).copy(), buffer).append(count, counts)
        np.testing.assert_array_equal(np.moveaxis(buffer, order, (0, 1)), wanted)


def test_of_more_rows_than_the_ring_has_the_last_ones_stay() -> None:
    spec = StateSpec("0.ring", (1, RING, 1), "float32", append_axis=1)
    for length in (RING + 1, 2 * RING, 2 * RING + 5):
        rows = np.arange(length, dtype=np.float32).reshape(1, length, 1)
        wanted = np.zeros((1, RING, 1), np.float32)
        for row in range(length):
            wanted[0, (4 + row) % RING] = row
        buffer = np.full((1, RING, 1), -1, np.float32)
        _Ring(spec, rows, buffer).append(np.array([4]), None)
        np.testing.assert_array_equal(buffer, wanted)


def test_a_state_that_is_appended_to_is_held_once_and_never_copied() -> None:
    spec = fake_spec(ring=True)
    session, graphs = buffered_session(spec)
    for _ in range(3):
        session.feed(inputs(length=7)["tokens"])
    (ring,) = (state for state in spec.states if state.append_axis is not None)
    reads = [read[ring.past] for graph in graphs.values() for read, _ in graph.bound if ring.past in read]
    assert len(reads) > 2
    assert len({array.ctypes.data for array in reads}) == 1
    for name, length in (("step", CHUNK), ("decode", 1)):
        for _, written in graphs[name].bound:
            assert written[ring.present].shape == ring.present_shape(length)
