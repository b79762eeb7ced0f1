"""What a model declares is what it does: the states that there are, and those that each entry reads and writes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from nsm.models.base import State
from nsm.models.stream import StreamModel
from nsm.spec import CHUNK as CHUNKS
from nsm.spec import FILLED, OFFSET, EntrySpec, StepSpec
from tests.nsm.variants import CHUNK, NOT_CAUSAL, VARIANTS, VOCABULARY, layers_of, make, random_tokens, run

BATCHES = [1, 3]


@pytest.fixture(scope="module", params=[*VARIANTS, *NOT_CAUSAL])
def model(request: pytest.FixtureRequest) -> StreamModel:
    return make(request.param)


@pytest.fixture
def as_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph does not look at the values of what it is given, and refuses nothing."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def changed(model: StreamModel, name: str, value: Tensor) -> Tensor:
    """Another value that this state could have."""
    role = name.rpartition(".")[2]
    if name == OFFSET:
        return (value + 1) % CHUNK
    if name == FILLED:
        return torch.where(value > 0, 0, model.carried_rows)
    if name == CHUNKS:
        return (value + 1) % model.cycle
    if role == "memory_next":
        return (value + 1) % 2
    if role == "mask":
        # Always something active, in every group of a hierarchy.
        return torch.where(torch.arange(value.shape[1]) % 2 == 0, True, ~value)
    return value + 0.3 * (1.0 + torch.rand_like(value))


def situations(model: StreamModel, spec: StepSpec, entry: EntrySpec) -> Iterator[tuple[dict[str, Tensor], State]]:
    """Calls of an entry as they happen: inputs and a state that such a call may find."""
    batch = spec.batch
    for past in (0, 5):
        state = model.initial_state(batch)
        if past:
            _, state = run(model, random_tokens(model, batch, past * CHUNK, seed=past), state)
        if entry.name == "step":
            length = entry.inputs[0].shape[1]
            inputs = {"tokens": random_tokens(model, batch, length, seed=9)}
            if entry.input("valid") is None:
                yield inputs, state
            else:
                for valid in ([length] * batch, [0] * batch, [length - 1, 0, length][:batch]):
                    yield {**inputs, "valid": torch.tensor(valid)}, state
            continue
        for place in range(CHUNK):
            inputs = {"tokens": random_tokens(model, batch, 1, seed=place)}
            if entry.name == "decode":
                if entry.input("valid") is None:
                    yield inputs, state
                else:
                    for one in (1, 0, place % 2):
                        yield {**inputs, "valid": torch.tensor([one, *[1] * (batch - 1)])}, state
            _, state = model.decode(inputs["tokens"], state)
            if entry.name == "commit":
                yield {}, state


def entries_of(model: StreamModel) -> Iterator[tuple[StepSpec, EntrySpec]]:
    for batch in BATCHES:
        for count in (CHUNK, 3 * CHUNK) if batch > 1 else (CHUNK,):
            spec = model.spec(batch, count)
            for entry in spec.entries:
                if entry.name == "step" or count == CHUNK:
                    yield spec, entry


@torch.no_grad()
@pytest.mark.usefixtures("as_a_graph")
def test_an_entry_changes_no_state_but_those_it_writes(model: StreamModel) -> None:
    for spec, entry in entries_of(model):
        touched = set()
        for inputs, state in situations(model, spec, entry):
            outputs, after = model.call(entry.name, inputs, state)
            assert {output.name for output in entry.outputs} <= set(outputs)
            assert all(outputs[output.name].shape == output.shape for output in entry.outputs)
            assert set(after) == set(spec.state_names)
            touched |= {name for name, value in state.items() if not torch.equal(after[name], value)}
        assert touched <= set(entry.writes), (entry.name, spec.batch)
        # And each of those that it writes does change in one of these calls; slots come and go only now and then.
        idle = set(entry.writes) - touched
        assert all(name.endswith(".mask") for name in idle), (entry.name, spec.batch, idle)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.usefixtures("as_a_graph")
def test_a_state_that_an_entry_does_not_read_changes_nothing_that_it_gives(model: StreamModel) -> None:
    for spec, entry in entries_of(model):
        for inputs, state in situations(model, spec, entry):
            other = {
                name: value if name in entry.reads else changed(model, name, value) for name, value in state.items()
            }
            outputs, after = model.call(entry.name, inputs, state)
            other_outputs, other_after = model.call(entry.name, inputs, other)
            for name, value in outputs.items():
                assert torch.equal(value, other_outputs[name]), entry.name
            for name in entry.writes:
                assert torch.equal(after[name], other_after[name]), (entry.name, spec.batch, name)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.usefixtures("as_a_graph")
def test_a_state_that_an_entry_reads_matters_to_what_it_gives(model: StreamModel) -> None:
    """A graph's input that nothing depends on would be lost or left hanging."""
    for spec, entry in entries_of(model):
        idle = set(entry.reads)
        for inputs, state in situations(model, spec, entry):
            if not idle:
                break
            outputs, after = model.call(entry.name, inputs, state)
            for read in sorted(idle):
                other_outputs, other = model.call(
                    entry.name, inputs, {**state, read: changed(model, read, state[read])}
                )
                given = [*outputs.values(), *(after[name] for name in entry.writes)]
                now = [*other_outputs.values(), *(other[name] for name in entry.writes)]
                if any(not torch.equal(one, two) for one, two in zip(given, now, strict=True)):
                    idle.discard(read)
        assert not idle, (entry.name, spec.batch)


@torch.no_grad()
@pytest.mark.parametrize("batch", BATCHES)
def test_the_spec_declares_exactly_the_states_that_there_are(model: StreamModel, batch: int) -> None:
    spec, state = model.spec(batch), model.initial_state(batch)
    assert list(spec.state_names) == list(state)
    _, after = model.step(random_tokens(model, batch, CHUNK), state)
    assert after.keys() == state.keys()
    for declared in spec.states:
        for values in (state, after):
            assert values[declared.name].shape == declared.shape, declared.name
            assert values[declared.name].dtype == getattr(torch, declared.dtype), declared.name
        assert declared.shape[declared.batch_axis] == batch
        assert declared.append_axis is None
        if declared.init == "zeros":
            assert not bool(state[declared.name].any()), declared.name
        else:
            assert bool(state[declared.name].any()), declared.name


def test_the_states_are_those_that_the_options_need() -> None:
    always = {"bank", "mask", "tail", "open_write", "open_weight", "key", "value", "open_key", "open_value"}
    memory = {"memory_key", "memory_value", "memory_filled", "memory_next", "open_mixed"}
    for name, more in {
        "gru": set(),
        "lstm": {"cell"},
        "memory": memory,
        "adaptive": {"importance"},
        "adaptive, lstm, memory, vectors": {"cell", "importance", *memory},
    }.items():
        state = make(name).initial_state()
        assert {part.partition(".")[2] for part in state if part.startswith("0.")} == always | more
    hybrid = make("hybrid").initial_state()
    assert {part.partition(".")[2] for part in hybrid if part.startswith("0.")} == {
        "key", "value", "open_key", "open_value"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "cycle"),
    [
        ("gru", 1),
        ("never consolidated", 1),
        ("every third chunk, lstm", 3),
        ("hierarchy", 6),
        ("hierarchy, lstm, communication", 2),
    ],
)
def test_chunks_are_counted_as_far_as_something_depends_on_it(name: str, cycle: int) -> None:
    model = make(name)
    assert model.cycle == cycle
    assert (CHUNKS in model.initial_state()) == (cycle > 1)
    _, state = run(model, random_tokens(model, 1, 7 * CHUNK))
    if cycle > 1:
        assert state[CHUNKS].tolist() == [7 % cycle]


def test_the_learned_states_begin_where_the_managers_say(model: StreamModel) -> None:
    state = model.initial_state(2)
    for index, layer in enumerate(model.layers):
        if layer not in layers_of(model):
            continue
        manager, heads = layer.manager, layer.heads
        start = torch.where(manager.mask[:, None], manager.bank, 0.0)
        for role in ("bank", *(["cell"] if f"{index}.cell" in state else [])):
            # [B, G, S, f] -> [B, S, G * f]
            states = state[f"{index}.{role}"].transpose(1, 2).reshape(2, *manager.bank.shape)
            assert torch.equal(states, start.expand(2, -1, -1)), role
            assert state[f"{index}.{role}"].shape[1] == 2 * heads
        assert torch.equal(state[f"{index}.mask"], manager.mask.expand(2, -1))
        if f"{index}.importance" in state:
            assert torch.equal(state[f"{index}.importance"], manager.get_importance_scores().expand(2, -1))


def test_the_entries_of_a_causal_model() -> None:
    spec = make("gru").spec(batch=3, tokens_per_call=2 * CHUNK)
    assert [entry.name for entry in spec.entries] == ["step", "decode", "commit"]
    assert (spec.chunk_size, spec.batch) == (CHUNK, 3)
    for entry, length in zip(spec.entries[:2], (2 * CHUNK, 1), strict=True):
        tokens, valid = entry.inputs
        assert (tokens.name, tokens.shape, tokens.dtype, tokens.time_axis) == ("tokens", (3, length), "int64", 1)
        assert (tokens.minimum, tokens.maximum) == (0, VOCABULARY - 1)
        assert (valid.name, valid.shape, valid.dtype, valid.time_axis) == ("valid", (3,), "int64", None)
        assert (valid.minimum, valid.maximum) == (0, length)
        (outputs,) = entry.outputs
        assert (outputs.name, outputs.shape, outputs.dtype, outputs.time_axis) == (
            "outputs",
            (3, length, 5),
            "float32",
            1,
        )
    assert spec.entry("commit").inputs == spec.entry("commit").outputs == ()


@pytest.mark.parametrize(
    ("name", "batch", "chunks", "with_valid"),
    [
        ("gru", 1, 1, []),
        ("gru", 1, 2, ["step"]),
        ("gru", 2, 1, ["step", "decode"]),
        ("both ways", 1, 1, ["step"]),
        ("both ways", 2, 3, ["step"]),
    ],
)
def test_valid_is_an_input_where_lanes_may_have_different_numbers_of_tokens(
    name: str, batch: int, chunks: int, with_valid: list[str]
) -> None:
    spec = make(name).spec(batch, chunks * CHUNK)
    assert [entry.name for entry in spec.entries if entry.input("valid")] == with_valid
    assert spec.has("decode") == spec.has("commit") == (name == "gru")


def test_the_tokens_of_a_model_over_vectors() -> None:
    tokens = make("wider window, vectors").spec(batch=2).entry("step").input("tokens")
    assert tokens is not None
    assert (tokens.shape, tokens.dtype, tokens.minimum, tokens.maximum) == ((2, CHUNK, 3), "float32", None, None)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gru", "adaptive", "hybrid"])
def test_a_call_by_name_is_the_method(name: str) -> None:
    model = make(name)
    tokens, valid, state = random_tokens(model, 2, CHUNK), torch.tensor([CHUNK, 2]), model.initial_state(2)
    for call in (model.call, model.graph):
        given, after = call("step", {"tokens": tokens, "valid": valid}, state)
        expected, expected_state = model.step(tokens, state, valid)
        assert torch.equal(given["outputs"], expected)
        given, after = call("decode", {"tokens": tokens[:, :1], "valid": torch.tensor([0, 1])}, after)
        expected, expected_state = model.decode(tokens[:, :1], expected_state, torch.tensor([0, 1]))
        assert torch.equal(given["outputs"], expected)
        given, after = call("commit", {}, after)
        assert given == {}
        expected_state = model.commit(expected_state)
        assert all(torch.equal(after[key], value) for key, value in expected_state.items())


@torch.no_grad()
@pytest.mark.parametrize("name", ["gru", "hierarchy", "adaptive", "hybrid", "both ways"])
def test_with_debug_outputs_a_step_declares_all_that_it_gives(name: str) -> None:
    model = make(name)
    entry = model.spec(2, 2 * CHUNK, debug_outputs=True).entry("step")
    outputs, _ = model.call("step", {"tokens": random_tokens(model, 2, 2 * CHUNK)}, model.initial_state(2))
    assert [output.name for output in entry.outputs] == list(outputs)
    routings = [output for output in entry.outputs if output.name.startswith("routing.")]
    assert len(routings) == len(layers_of(model))
    masks = [output for output in entry.outputs if output.name.startswith("mask.")]
    assert [output.name for output in masks] == ([f"mask.{index}" for index in (0, 1)] if name == "adaptive" else [])
    for mask, routing in zip(masks, routings, strict=False):
        assert outputs[mask.name].shape == mask.shape
        assert torch.equal(outputs[mask.name] > 0, (outputs[routing.name] > 0).all(2))
    for output in routings:
        found = outputs[output.name]
        assert found.shape == output.shape
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]), rtol=1e-5, atol=1e-5)
