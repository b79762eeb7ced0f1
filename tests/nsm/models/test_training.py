"""Learning over streams: gradients reach every parameter, through pieces as through the whole; and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nsm.errors import InputError, StreamError
from nsm.models.base import State, StepModel
from nsm.models.stream import StreamModel
from tests.nsm.variants import CHUNK, NOT_CAUSAL, VARIANTS, layers_of, make, random_tokens, run

LONG = 7 * CHUNK + 3


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest) -> StreamModel:
    return make(request.param)


@pytest.fixture(scope="module", params=[*VARIANTS, *NOT_CAUSAL])
def any_model(request: pytest.FixtureRequest) -> StreamModel:
    return make(request.param)


def loss_of(outputs: Tensor, seed: int = 0) -> Tensor:
    target = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(seed))
    return (outputs - target).square().mean()


def test_gradients_reach_every_parameter(any_model: StreamModel) -> None:
    model = any_model
    model.zero_grad()
    torch.autograd.backward(loss_of(model(random_tokens(model, 2, LONG))))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
        assert float(parameter.grad.abs().max()) > 0, name
    for layer in layers_of(model):
        if layer.adaptation is not None:
            continue
        bank, importance = layer.manager.bank.grad, layer.manager.importance.grad
        assert bank is not None
        assert importance is not None
        assert torch.equal(bank.abs().sum(-1) > 0, layer.manager.mask)
        assert torch.equal(importance.abs() > 0, layer.manager.mask)


def test_gradients_through_pieces_are_those_of_the_whole(model: StreamModel) -> None:
    tokens = random_tokens(model, 2, LONG)
    model.zero_grad()
    torch.autograd.backward(model(tokens).square().sum())
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    first, state = run(model, tokens[:, :6])
    second, _ = run(model, tokens[:, 6:], state)
    torch.autograd.backward(first.square().sum() + second.square().sum())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        scale = float(whole[name].abs().max())
        # 1e-4 of the largest: sums over lanes and tokens in float32 that cancel, in another order.
        assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-4 * scale)


def test_truncated_backpropagation_learns_over_a_stream() -> None:
    """Pieces that end inside chunks; gradients end where the state is detached, the state itself goes on."""
    model = make("gru")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    tokens = random_tokens(model, 2, 12 * 6)
    losses = []
    for _ in range(4):
        state: State | None = None
        for start in range(0, tokens.shape[1], 6):
            outputs, state = run(model, tokens[:, start : start + 6], state)
            loss = nn.functional.cross_entropy(outputs.flatten(0, 1), tokens[:, start : start + 6].flatten() % 5)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            state = {name: value.detach() for name, value in state.items()}
            losses.append(float(loss.detach()))
    assert sum(losses[-12:]) < 0.6 * sum(losses[:12])


def test_a_detached_state_ends_the_gradient() -> None:
    model = make("gru")
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
def test_a_call_that_is_not_whole_chunks_is_refused(count: int, take: int) -> None:
    with pytest.raises(InputError, match=f"multiple of the model's chunk of 4 tokens; given {count}. Take {take}"):
        make("gru").spec(tokens_per_call=count)


def test_a_step_of_a_broken_chunk_is_refused(model: StreamModel) -> None:
    with pytest.raises(InputError, match=r"step takes a multiple of 4 tokens a lane; given 6. Pad the last chunk"):
        model.step(random_tokens(model, 1, 6), model.initial_state())


@torch.no_grad()
def test_a_step_inside_a_chunk_is_refused(model: StreamModel) -> None:
    _, state = model.step(random_tokens(model, 2, CHUNK), model.initial_state(2), torch.tensor([4, 3]))
    with pytest.raises(StreamError, match=r"step starts at a chunk's beginning, but .* stand at offsets \[0, 3\]"):
        model.step(random_tokens(model, 2, CHUNK), state)


@torch.no_grad()
def test_forward_of_lanes_at_different_offsets_is_refused(model: StreamModel) -> None:
    _, state = model.step(random_tokens(model, 2, CHUNK), model.initial_state(2), torch.tensor([1, 3]))
    with pytest.raises(StreamError, match=r"all lanes at the same offset in their chunk, .* they stand at \[1, 3\]"):
        model(random_tokens(model, 2, 2), state)


@torch.no_grad()
def test_the_longest_sequence_is_a_limit_of_one_call_and_not_of_a_stream() -> None:
    model = make("gru", max_seq_length=6)
    tokens = random_tokens(model, 1, 12)
    with pytest.raises(InputError, match=r"at most max_seq_length=6 tokens in one call; given 7. Call it in pieces"):
        model(tokens[:, :7])
    first, state = run(model, tokens[:, :6])
    second, _ = run(model, tokens[:, 6:], state)
    assert_close(torch.cat([first, second], 1), make("gru")(tokens), rtol=1e-5, atol=1e-5)


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
        ("wider window, vectors", torch.zeros(3), rf"{VECTORS}, .* given shape \[3\]"),
        ("wider window, vectors", torch.zeros(1, 4, 2), rf"{VECTORS}, .* given shape \[1, 4, 2\]"),
        ("wider window, vectors", torch.zeros(1, 1, 4, 3), rf"{VECTORS}, .* given shape \[1, 1, 4, 3\]"),
        (
            "wider window, vectors",
            torch.zeros(1, 4, 3, dtype=torch.int64),
            rf"{VECTORS} of dtype torch.float32; given torch.int64",
        ),
        ("wider window, vectors", torch.zeros(1, 4, 3, dtype=torch.complex64), rf"{VECTORS} .* given torch.complex64"),
        ("wider window, vectors", torch.zeros(1, 4, 3, dtype=torch.float64), rf"{VECTORS} .* given torch.float64"),
    ],
)
def test_tokens_the_model_does_not_take_are_refused(variant: str, tokens: Tensor, message: str) -> None:
    model = make(variant)
    with pytest.raises(InputError, match=message):
        model(tokens)
    with pytest.raises(InputError, match=message):
        model.step(tokens, model.initial_state())


@torch.no_grad()
def test_ids_of_32_bits_are_ids() -> None:
    model = make("gru")
    tokens = random_tokens(model, 2, 9)
    assert torch.equal(model(tokens.int()), model(tokens))


@torch.no_grad()
def test_a_token_for_a_full_chunk_is_refused(model: StreamModel) -> None:
    state = model.initial_state(2)
    for place in range(CHUNK):
        _, state = model.decode(random_tokens(model, 2, 1, seed=place), state, torch.tensor([1, int(place > 0)]))
    message = r"The open chunk has 4 tokens on some lanes \(offsets \[4, 3\]\). Call commit first"
    with pytest.raises(StreamError, match=message):
        model.decode(random_tokens(model, 2, 1), state)
    model.decode(random_tokens(model, 2, 1), state, torch.tensor([0, 1]))


@torch.no_grad()
@pytest.mark.parametrize("count", [2, CHUNK])
def test_decode_takes_one_token(model: StreamModel, count: int) -> None:
    with pytest.raises(InputError, match=f"decode takes one token a lane, of a causal model; given {count} tokens"):
        model.decode(random_tokens(model, 1, count), model.initial_state())


@torch.no_grad()
@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_a_model_that_is_not_causal_takes_whole_chunks(name: str) -> None:
    model = make(name)
    with pytest.raises(InputError, match=r"of a causal model; given 1 tokens, causal=False\. Use step"):
        model.decode(random_tokens(model, 1, 1), model.initial_state())
    _, state = run(model, random_tokens(model, 1, 2))
    with pytest.raises(StreamError, match=r"at its beginning where the model is not causal; they stand at \[2\]"):
        model(random_tokens(model, 1, 2), state)


@pytest.mark.parametrize("name", ["gru", "both ways", "hybrid"])
def test_an_entry_that_there_is_not_is_refused(name: str) -> None:
    model = make(name)
    with pytest.raises(InputError, match=r"There is no entry 'advance'\. Entries: step"):
        model.call("advance", {"tokens": random_tokens(model, 1, 1)}, model.initial_state())


def test_a_step_model_without_more_has_the_one_entry() -> None:
    model = make("gru")
    with pytest.raises(InputError, match=r"There is no entry 'decode'\. Entries: step\."):
        StepModel.call(model, "decode", {}, model.initial_state())


def test_layers_of_different_chunks_are_refused() -> None:
    model = make("gru")
    layers = [*layers_of(model), *layers_of(make("gru", chunk_size=3))]
    with pytest.raises(InputError, match=r"All layers need one chunk size; given \[4, 4, 3, 3\]"):
        StreamModel(model.embed, layers, model.head, model.token_spec, 5)
