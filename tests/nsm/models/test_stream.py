"""A stream in any pieces is the stream in one call: outputs and every state. And what else a step model promises."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from nsm.errors import InputError, StreamError
from nsm.layer import NSMLayer
from nsm.models.simple import SimpleNSM
from nsm.models.stream import State

CHUNK = 4
LONGEST = 4 * CHUNK + 3
VOCABULARY = 20

VARIANTS: dict[str, dict[str, Any]] = {
    "gru": {},
    "lstm": {"gate_type": "lstm"},
    "never consolidated": {"consolidate_every": 0, "num_layers": 1},
    "every third chunk, lstm": {"consolidate_every": 3, "gate_type": "lstm"},
    "communication, some slots masked": {"communication": True, "initial_states": 3},
    "wide window, odd state": {"window": 6, "state_dim": 15},
    "vectors": {"vocab_size": None, "input_dim": 3, "state_dim": 16, "d_model": 8},
}

some_examples = settings(max_examples=12, deadline=None)
lengths = st.integers(1, LONGEST)
some_cuts = st.lists(st.integers(1, LONGEST - 1), max_size=6)


@torch.no_grad()
def stir(module: nn.Module) -> None:
    """Make all weights random, so that nothing hides behind a gate that starts near "keep" or a matrix of zeros."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)


@pytest.fixture(scope="module")
def make(model_factory: Callable[..., SimpleNSM]) -> Callable[..., SimpleNSM]:
    def make(**changes: Any) -> SimpleNSM:
        model = model_factory(**{"chunk_size": CHUNK, "d_model": 8, "num_states": 5, **changes})
        stir(model)
        return model

    return make


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=list(VARIANTS))
def model(request: pytest.FixtureRequest, make: Callable[..., SimpleNSM]) -> SimpleNSM:
    return make(**request.param)


def random_tokens(model: SimpleNSM, lanes: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if model.token_spec.shape:
        return torch.randn(lanes, length, *model.token_spec.shape, generator=generator)
    return torch.randint(0, VOCABULARY, (lanes, length), generator=generator)


def other_tokens(model: SimpleNSM, tokens: Tensor) -> Tensor:
    """Tokens that differ from the given ones at every place."""
    return tokens + 1.0 if model.token_spec.shape else (tokens + 7) % VOCABULARY


def run(model: SimpleNSM, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    outputs, after = model(tokens, state, return_state=True)
    return outputs, after


def layers_of(model: SimpleNSM) -> list[NSMLayer]:
    return [layer for layer in model.layers if isinstance(layer, NSMLayer)]


def lane_of(model: SimpleNSM, state: State, lane: int) -> State:
    return {spec.name: state[spec.name][spec.lane_index(lane)].unsqueeze(0) for spec in model.spec().states}


def same_bits(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def same_numbers(one: State, other: State) -> None:
    """1e-5: a piece of another length is another matrix product, which rounds differently, in float32."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert_close(value, other[name], rtol=1e-5, atol=1e-5, msg=f"{name}: {value} is not {other[name]}")


# -- one stream, many ways --------------------------------------------------------------------------------------


@some_examples
@given(length=lengths, cuts=some_cuts, seed=st.integers(0, 100))
def test_any_split_is_the_sequence_in_one_call(model: SimpleNSM, length: int, cuts: list[int], seed: int) -> None:
    with torch.no_grad():
        tokens = random_tokens(model, 2, length, seed)
        whole, whole_state = run(model, tokens)
        state, outputs = model.initial_state(2), []
        for start, end in pairwise(sorted({0, length, *(cut for cut in cuts if cut < length)})):
            output, state = run(model, tokens[:, start:end], state)
            outputs.append(output)
    assert_close(torch.cat(outputs, 1), whole, rtol=1e-5, atol=1e-5)
    same_numbers(state, whole_state)


@some_examples
@given(valid=st.tuples(*3 * [st.integers(0, 3 * CHUNK)]), chunks=st.integers(1, 3), seed=st.integers(0, 100))
def test_a_step_with_a_partial_chunk_is_forward_of_just_those_tokens(
    model: SimpleNSM, valid: tuple[int, ...], chunks: int, seed: int
) -> None:
    """Each lane by itself, from a state that is not the initial one."""
    counts = [min(count, chunks * CHUNK) for count in valid]
    with torch.no_grad():
        _, state = run(model, random_tokens(model, 3, CHUNK, seed + 1))
        tokens = random_tokens(model, 3, chunks * CHUNK, seed)
        outputs, after = model.step(tokens, state, torch.tensor(counts))
        assert outputs.shape == (3, chunks * CHUNK, model.output_dim)
        for lane, count in enumerate(counts):
            expected_state = lane_of(model, state, lane)
            if count:
                expected, expected_state = run(model, tokens[lane : lane + 1, :count], expected_state)
                assert_close(outputs[lane : lane + 1, :count], expected, rtol=1e-5, atol=1e-5)
            same_numbers(lane_of(model, after, lane), expected_state)


@torch.no_grad()
def test_a_step_without_valid_takes_all_tokens(model: SimpleNSM) -> None:
    tokens = random_tokens(model, 2, 2 * CHUNK)
    outputs, state = model.step(tokens, model.initial_state(2))
    explicit, explicit_state = model.step(tokens, model.initial_state(2), torch.tensor([2 * CHUNK, 2 * CHUNK]))
    expected, expected_state = run(model, tokens)
    assert torch.equal(outputs, explicit)
    same_bits(state, explicit_state)
    assert torch.equal(outputs, expected)
    same_bits(state, expected_state)


@some_examples
@given(
    turns=st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=LONGEST),
    seed=st.integers(0, 100),
)
def test_lanes_that_get_a_token_now_and_then_are_streams_of_their_own(
    model: SimpleNSM, turns: list[tuple[bool, ...]], seed: int
) -> None:
    """Tokens one at a time through `advance` and `commit`; the lanes drift apart in their chunks."""
    tokens = random_tokens(model, 3, len(turns), seed)
    seen: list[list[int]] = [[], [], []]
    got: list[list[Tensor]] = [[], [], []]
    with torch.no_grad():
        state = model.initial_state(3)
        for now, turn in enumerate(turns):
            output, state = model.advance(tokens[:, now : now + 1], state, torch.tensor(turn).long())
            state = model.commit(state)
            for lane, has_token in enumerate(turn):
                if has_token:
                    seen[lane].append(now)
                    got[lane].append(output[lane])
        for lane in range(3):
            if not seen[lane]:
                same_bits(lane_of(model, state, lane), model.initial_state(1))
                continue
            expected, expected_state = run(model, tokens[lane : lane + 1, seen[lane]])
            assert_close(torch.cat(got[lane]).unsqueeze(0), expected, rtol=1e-5, atol=1e-5)
            same_numbers(lane_of(model, state, lane), expected_state)


# -- what does not matter ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("lane", range(3))
def test_what_one_lane_is_given_changes_no_bit_of_another(model: SimpleNSM, lane: int) -> None:
    others = [other for other in range(3) if other != lane]
    tokens = random_tokens(model, 3, LONGEST)
    changed = tokens.clone()
    changed[lane] = other_tokens(model, tokens)[lane]
    outputs, state = run(model, tokens)
    changed_outputs, changed_state = run(model, changed)
    assert torch.equal(outputs[others], changed_outputs[others])
    for other in others:
        same_bits(lane_of(model, state, other), lane_of(model, changed_state, other))
    assert not bool((outputs[lane] == changed_outputs[lane]).all(-1).any())


@torch.no_grad()
def test_a_lane_of_many_is_the_stream_alone(model: SimpleNSM) -> None:
    tokens = random_tokens(model, 3, LONGEST)
    outputs, state = run(model, tokens)
    for lane in range(3):
        alone, state_alone = run(model, tokens[lane : lane + 1])
        assert_close(outputs[lane : lane + 1], alone, rtol=1e-5, atol=1e-5)
        same_numbers(lane_of(model, state, lane), state_alone)


@torch.no_grad()
@pytest.mark.parametrize("before", [0, CHUNK, 3 * CHUNK])
def test_a_lane_with_no_valid_token_keeps_its_state_bit_for_bit(model: SimpleNSM, before: int) -> None:
    state = model.initial_state(2)
    if before:
        _, state = run(model, random_tokens(model, 2, before), state)
    _, after = model.step(random_tokens(model, 2, 2 * CHUNK, seed=1), state, torch.tensor([2 * CHUNK, 0]))
    same_bits(lane_of(model, after, 1), lane_of(model, state, 1))
    assert not torch.equal(after["0.pending"][0], state["0.pending"][0])


@torch.no_grad()
@pytest.mark.parametrize("valid", [1, CHUNK - 1, CHUNK, CHUNK + 2])
def test_what_stands_after_the_valid_tokens_changes_no_bit(model: SimpleNSM, valid: int) -> None:
    tokens = random_tokens(model, 1, 2 * CHUNK)
    padded = tokens.clone()
    padded[:, valid:] = other_tokens(model, tokens)[:, valid:]
    outputs, state = model.step(tokens, model.initial_state(1), torch.tensor([valid]))
    other_outputs, other_state = model.step(padded, model.initial_state(1), torch.tensor([valid]))
    assert torch.equal(outputs[:, :valid], other_outputs[:, :valid])
    same_bits(state, other_state)


@some_examples
@given(
    masks=st.lists(st.lists(st.booleans(), min_size=5, max_size=5).filter(any), min_size=2, max_size=2),
    poison=st.sampled_from([1e30, -1e30]),
)
def test_what_masked_slots_hold_changes_no_bit(model: SimpleNSM, masks: list[list[bool]], poison: float) -> None:
    mask = torch.tensor(masks)
    tokens = random_tokens(model, 2, LONGEST)
    with torch.no_grad():
        clean = model.initial_state(2)
        poisoned = dict(clean)
        for name in clean:
            if name.endswith(".mask"):
                clean[name] = poisoned[name] = mask
            elif name.endswith((".bank", ".pending", ".cell")):
                poisoned[name] = torch.where(mask.unsqueeze(-1), clean[name], poison)
        outputs, state = run(model, tokens, clean)
        other_outputs, other_state = run(model, tokens, poisoned)
    assert torch.equal(outputs, other_outputs)
    for name, value in other_state.items():
        if name.endswith((".bank", ".pending", ".cell")):
            assert torch.equal(value[mask], state[name][mask]), name
            assert bool((value[~mask] == poison).all()), name
        else:
            assert torch.equal(value, state[name]), name


@torch.no_grad()
@pytest.mark.parametrize("place", [0, 1, CHUNK - 1, CHUNK, 2 * CHUNK + 2, LONGEST - 1])
def test_no_output_sees_a_later_token(model: SimpleNSM, place: int) -> None:
    tokens = random_tokens(model, 2, LONGEST)
    changed = tokens.clone()
    changed[:, place] = other_tokens(model, tokens)[:, place]
    same = (model(tokens) == model(changed)).all(-1)
    assert bool(same[:, :place].all())
    assert not bool(same[:, place].any())


@torch.no_grad()
def test_what_left_the_window_is_remembered_by_the_bank(model: SimpleNSM) -> None:
    """The first token reaches the last output only through the bank: the convolution and windows are too short."""
    tokens = random_tokens(model, 1, 40)
    changed = tokens.clone()
    changed[:, 0] = other_tokens(model, tokens)[:, 0]
    reach = len(model.layers) * (model.carried_rows + 3)
    assert reach < 39
    assert not torch.equal(model(tokens)[:, -1], model(changed)[:, -1])


# -- the state ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_reset_is_a_fresh_stream(model: SimpleNSM) -> None:
    """Whatever ran before: the initial state is the same, and so is all that follows from it."""
    tokens = random_tokens(model, 2, LONGEST)
    fresh = {name: value.clone() for name, value in model.initial_state(2).items()}
    outputs, state = run(model, tokens)
    run(model, random_tokens(model, 2, LONGEST, seed=1), state)
    same_bits(model.initial_state(2), fresh)
    again, state_again = run(model, tokens, model.initial_state(2))
    assert torch.equal(again, outputs)
    same_bits(state_again, state)


@torch.no_grad()
def test_running_changes_neither_the_model_nor_the_state_it_was_given(model: SimpleNSM) -> None:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    _, state = run(model, random_tokens(model, 2, CHUNK))
    given_state = {name: value.clone() for name, value in state.items()}
    run(model, random_tokens(model, 2, LONGEST), state)
    model.step(random_tokens(model, 2, 2 * CHUNK), state, torch.tensor([2 * CHUNK, 3]))
    same_bits(state, given_state)
    same_bits(dict(model.state_dict()), weights)


@torch.no_grad()
@pytest.mark.parametrize("length", [0, 2, LONGEST])
def test_pruning_and_allocation_leave_running_streams_alone(make: Callable[..., SimpleNSM], length: int) -> None:
    """State is an argument and a result: a manager changes where streams start, not those under way."""
    model = make(initial_states=3)
    state = model.initial_state(1)
    if length:
        _, state = run(model, random_tokens(model, 1, length), state)
    before = {name: value.clone() for name, value in state.items()}
    manager = layers_of(model)[0].manager
    manager.importance[0] = -9.0
    assert manager.prune_low_importance_states() == 1
    same_bits(state, before)
    assert manager.allocate_states(2) == 2
    same_bits(state, before)
    assert model.initial_state(1)["0.mask"].tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize("batch", [1, 3])
def test_the_spec_declares_exactly_the_states_that_there_are(model: SimpleNSM, batch: int) -> None:
    spec, state = model.spec(batch), model.initial_state(batch)
    assert list(spec.state_names) == list(state)
    with torch.no_grad():
        _, after = model.step(random_tokens(model, batch, CHUNK), state)
    assert after.keys() == state.keys()
    for declared in spec.states:
        for values in (state, after):
            assert values[declared.name].shape == declared.shape, declared.name
            assert values[declared.name].dtype == getattr(torch, declared.dtype), declared.name
        assert declared.shape[declared.batch_axis] == batch
        if declared.init == "zeros":
            assert not bool(state[declared.name].any()), declared.name
        else:
            assert bool(state[declared.name].any()), declared.name


def test_the_learned_states_begin_where_the_managers_say(model: SimpleNSM) -> None:
    state = model.initial_state(2)
    for index, layer in enumerate(layers_of(model)):
        manager = layer.manager
        for role in ("bank", "pending", *(["cell"] if f"{index}.cell" in state else [])):
            assert torch.equal(state[f"{index}.{role}"], manager.bank.expand(2, -1, -1)), role
        assert torch.equal(state[f"{index}.mask"], manager.mask.expand(2, -1))
        assert torch.equal(state[f"{index}.importance"], manager.get_importance_scores().expand(2, -1))


def test_the_spec_of_the_step(make: Callable[..., SimpleNSM]) -> None:
    spec = make().spec(batch=3, tokens_per_call=2 * CHUNK)
    (entry,) = spec.entries
    assert (entry.name, spec.chunk_size, spec.batch) == ("step", CHUNK, 3)
    tokens, valid = entry.inputs
    assert (tokens.name, tokens.shape, tokens.dtype, tokens.time_axis) == ("tokens", (3, 2 * CHUNK), "int64", 1)
    assert (tokens.minimum, tokens.maximum) == (0, VOCABULARY - 1)
    assert (valid.name, valid.shape, valid.dtype, valid.time_axis) == ("valid", (3,), "int64", None)
    assert (valid.minimum, valid.maximum) == (0, 2 * CHUNK)
    (outputs,) = entry.outputs
    assert (outputs.name, outputs.shape, outputs.dtype, outputs.time_axis) == ("outputs", (3, 8, 5), "float32", 1)


def test_the_spec_of_a_step_over_vectors(make: Callable[..., SimpleNSM]) -> None:
    tokens = make(**VARIANTS["vectors"]).spec(batch=2).entry("step").input("tokens")
    assert (tokens.shape, tokens.dtype, tokens.minimum, tokens.maximum) == ((2, CHUNK, 3), "float32", None, None)


@torch.no_grad()
@pytest.mark.parametrize(("every", "counts"), [(2, [1, 0, 1, 0, 1, 0]), (3, [1, 2, 0, 1, 2, 0])])
def test_consolidation_runs_at_its_chunk_and_the_count_is_state(
    make: Callable[..., SimpleNSM], every: int, counts: list[int]
) -> None:
    """Where it does not run, the committed bank is the pending one as it was written."""
    model = make(consolidate_every=every)
    plain = make(consolidate_every=0)
    plain.load_state_dict(model.state_dict(), strict=False)
    state = model.initial_state(1)
    for number, count in enumerate(counts, 1):
        tokens = random_tokens(model, 1, CHUNK, seed=number)
        unconsolidated = {name: value for name, value in state.items() if name != "lane.chunk"}
        _, only_written = plain.step(tokens, unconsolidated)
        _, state = model.step(tokens, state)
        assert state["lane.chunk"].tolist() == [count]
        copied = torch.equal(state["0.bank"], only_written["0.bank"])
        assert copied == (number % every != 0)


@pytest.mark.parametrize("every", [0, 1])
def test_no_chunks_are_counted_where_nothing_depends_on_it(make: Callable[..., SimpleNSM], every: int) -> None:
    assert "lane.chunk" not in make(consolidate_every=every).initial_state()


# -- learning ----------------------------------------------------------------------------------------------------


def loss_of(outputs: Tensor, seed: int = 0) -> Tensor:
    target = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(seed))
    return (outputs - target).square().mean()


def test_gradients_reach_every_parameter(model: SimpleNSM) -> None:
    model.zero_grad()
    torch.autograd.backward(loss_of(model(random_tokens(model, 2, LONGEST))))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
        assert float(parameter.grad.abs().max()) > 0, name
    for layer in layers_of(model):
        bank, importance = layer.manager.bank.grad, layer.manager.importance.grad
        assert bank is not None
        assert importance is not None
        assert torch.equal(bank.abs().sum(-1) > 0, layer.manager.mask)
        assert torch.equal(importance.abs() > 0, layer.manager.mask)


def test_gradients_through_pieces_are_those_of_the_whole(model: SimpleNSM) -> None:
    tokens = random_tokens(model, 2, LONGEST)
    model.zero_grad()
    torch.autograd.backward(model(tokens).square().sum())
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    first, state = run(model, tokens[:, :6])
    second, _ = run(model, tokens[:, 6:], state)
    torch.autograd.backward(first.square().sum() + second.square().sum())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        scale = float(whole[name].abs().max())
        # 1e-4 of the largest: sums over lanes and tokens in float32 that cancel, in another order.
        assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-4 * scale)


def test_truncated_backpropagation_learns_over_a_stream(make: Callable[..., SimpleNSM]) -> None:
    """Pieces that end inside chunks; gradients end where the state is detached, the state itself goes on."""
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    tokens = random_tokens(model, 2, 12 * 6)
    losses = []
    for _ in range(3):
        state: State | None = None
        for start in range(0, tokens.shape[1], 6):
            outputs, state = run(model, tokens[:, start : start + 6], state)
            loss = nn.functional.cross_entropy(outputs.flatten(0, 1), tokens[:, start : start + 6].flatten() % 5)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            state = {name: value.detach() for name, value in state.items()}
            losses.append(float(loss.detach()))
    assert sum(losses[-12:]) < 0.5 * sum(losses[:12])


def test_a_detached_state_ends_the_gradient(make: Callable[..., SimpleNSM]) -> None:
    model = make()
    tokens = random_tokens(model, 1, 12)
    _, state = run(model, tokens[:, :6])
    cut = {name: value.detach() for name, value in state.items()}
    for start, reaches in ((state, True), (cut, False)):
        model.zero_grad()
        torch.autograd.backward(loss_of(run(model, tokens[:, 6:], start)[0]))
        grads = [layer.manager.bank.grad for layer in layers_of(model)]
        assert all((grad is not None and bool(grad.any())) == reaches for grad in grads)


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "take"), [(0, 4), (-4, 4), (3, 4), (6, 8), (9, 8)])
def test_a_call_that_is_not_whole_chunks_is_refused(make: Callable[..., SimpleNSM], count: int, take: int) -> None:
    with pytest.raises(InputError, match=f"multiple of the model's chunk of 4 tokens; given {count}. Take {take}"):
        make().spec(tokens_per_call=count)


def test_a_step_of_a_broken_chunk_is_refused(model: SimpleNSM) -> None:
    with pytest.raises(InputError, match=r"step takes a multiple of 4 tokens a lane; given 6. Pad the last chunk"):
        model.step(random_tokens(model, 1, 6), model.initial_state())


@torch.no_grad()
def test_a_step_inside_a_chunk_is_refused(model: SimpleNSM) -> None:
    _, state = model.step(random_tokens(model, 2, CHUNK), model.initial_state(2), torch.tensor([4, 3]))
    with pytest.raises(StreamError, match=r"step starts at a chunk's beginning, but .* stand at offsets \[0, 3\]"):
        model.step(random_tokens(model, 2, CHUNK), state)


@torch.no_grad()
def test_forward_of_lanes_at_different_offsets_is_refused(model: SimpleNSM) -> None:
    _, state = model.step(random_tokens(model, 2, CHUNK), model.initial_state(2), torch.tensor([1, 3]))
    with pytest.raises(StreamError, match=r"all lanes at the same offset in their chunk; they stand at \[1, 3\]"):
        model(random_tokens(model, 2, 2), state)


@torch.no_grad()
def test_the_longest_sequence_is_a_limit_of_one_call_and_not_of_a_stream(make: Callable[..., SimpleNSM]) -> None:
    model = make(max_seq_length=6)
    tokens = random_tokens(model, 1, 12)
    with pytest.raises(InputError, match=r"at most max_seq_length=6 tokens in one call; given 7. Call it in pieces"):
        model(tokens[:, :7])
    first, state = run(model, tokens[:, :6])
    second, _ = run(model, tokens[:, 6:], state)
    assert_close(torch.cat([first, second], 1), make()(tokens), rtol=1e-5, atol=1e-5)


IDS, VECTORS = r"The model takes ids \[B, T\]", r"The model takes vectors \[B, T, 3\]"


@pytest.mark.parametrize(
    ("variant", "tokens", "message"),
    [
        ("gru", torch.zeros(4, dtype=torch.int64), rf"{IDS}, at least one token; given shape \[4\]"),
        ("gru", torch.zeros(1, 4, 3, dtype=torch.int64), rf"{IDS}, .* given shape \[1, 4, 3\]"),
        ("gru", torch.zeros(1, 0, dtype=torch.int64), rf"{IDS}, .* given shape \[1, 0\]"),
        ("gru", torch.zeros(0, 4, dtype=torch.int64), rf"{IDS}, .* given shape \[0, 4\]"),
        ("gru", torch.zeros(1, 4), rf"{IDS} of dtype torch.int64; given torch.float32"),
        ("gru", torch.zeros(1, 4, dtype=torch.bool), rf"{IDS} .* given torch.bool"),
        ("gru", torch.zeros(1, 4, dtype=torch.uint8), rf"{IDS} .* given torch.uint8"),
        ("gru", torch.full((1, 4), 20), r"Token ids must lie in 0 \.\. 19; given 20 \.\. 20"),
        ("gru", torch.tensor([[3, -1, 5, 0]]), r"Token ids must lie in 0 \.\. 19; given -1 \.\. 5"),
        ("vectors", torch.zeros(3), rf"{VECTORS}, .* given shape \[3\]"),
        ("vectors", torch.zeros(1, 4, 2), rf"{VECTORS}, .* given shape \[1, 4, 2\]"),
        ("vectors", torch.zeros(1, 1, 4, 3), rf"{VECTORS}, .* given shape \[1, 1, 4, 3\]"),
        ("vectors", torch.zeros(1, 4, 3, dtype=torch.int64), rf"{VECTORS} of dtype torch.float32; given torch.int64"),
        ("vectors", torch.zeros(1, 4, 3, dtype=torch.complex64), rf"{VECTORS} .* given torch.complex64"),
        ("vectors", torch.zeros(1, 4, 3, dtype=torch.float64), rf"{VECTORS} .* given torch.float64"),
    ],
)
def test_tokens_the_model_does_not_take_are_refused(
    make: Callable[..., SimpleNSM], variant: str, tokens: Tensor, message: str
) -> None:
    model = make(**VARIANTS[variant])
    with pytest.raises(InputError, match=message):
        model(tokens)
    with pytest.raises(InputError, match=message):
        model.step(tokens, model.initial_state())


@torch.no_grad()
def test_ids_of_32_bits_are_ids(make: Callable[..., SimpleNSM]) -> None:
    model = make()
    tokens = random_tokens(model, 2, 9)
    assert torch.equal(model(tokens.int()), model(tokens))
