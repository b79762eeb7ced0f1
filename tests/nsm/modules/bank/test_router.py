"""The router: what a routing is, and that a chunk written at once is its tokens written one after the other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from nsm.errors import ConfigError
from nsm.modules.bank.router import MAX_WRITE, TokenToStateRouter, log_of_rest
from nsm.modules.ops.layout import to_bank, to_states

# state_dim, num_heads asked for, heads used: the largest divisor of num_heads that splits both halves evenly
HEADS = [(8, 1, 1), (8, 2, 2), (8, 4, 4), (12, 4, 2), (10, 4, 1), (24, 6, 6), (2, 4, 1)]
ROUTINGS: list[dict[str, Any]] = [
    {},
    {"routing": "sparsemax"},
    {"routing": "entmax"},
    {"routing": "topk", "top_k": 2},
]


def make_router(seed: int = 0, **changes: Any) -> TokenToStateRouter:
    torch.manual_seed(seed)
    return TokenToStateRouter(**{"token_dim": 5, "state_dim": 8, "num_states": 6, "num_heads": 2, **changes})


def route(router: TokenToStateRouter, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [B, R, T, S] and token gates [B, R, T, 1]."""
    scores, gate = router.scores(tokens)
    return router.weights(scores, mask), gate


def write(router: TokenToStateRouter, bank: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """A run at once: bank [B, S, D], weights [B, R, T, S], values [B, T, D]."""
    keep, update = router.transition(weights, to_bank(values, router.num_heads))
    return to_states(keep * to_bank(bank, router.num_heads) + update)


def owner_of_each_number(router: TokenToStateRouter) -> Tensor:
    """[D]: the routing head that writes this number of a slot."""
    half = router.state_dim // 2
    return torch.tensor([(number % half) // (half // router.num_heads) for number in range(router.state_dim)])


def write_one_by_one(router: TokenToStateRouter, bank: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """slot <- (1 - w) * slot + w * value, token after token: the definition."""
    owner = owner_of_each_number(router)
    bank = bank.clone()
    for lane in range(bank.shape[0]):
        for token in range(values.shape[1]):
            for slot in range(bank.shape[1]):
                weight = weights[lane, owner, token, slot]
                bank[lane, slot] = (1 - weight) * bank[lane, slot] + weight * values[lane, token]
    return bank


def random_write(
    router: TokenToStateRouter, length: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """A bank, weights from 0 up to the strongest that there are, and values."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, router.num_heads, length, router.num_states)
    weights = torch.rand(shape, generator=generator, dtype=dtype) ** 3 * MAX_WRITE
    weights[torch.rand(shape, generator=generator) < 0.2] = 0.0
    weights[torch.rand(shape, generator=generator) < 0.1] = MAX_WRITE
    bank = torch.randn(2, router.num_states, router.state_dim, generator=generator, dtype=dtype)
    values = torch.randn(2, length, router.state_dim, generator=generator, dtype=dtype)
    return bank, weights, values


@pytest.mark.parametrize(("state_dim", "asked", "used"), HEADS)
def test_heads_used_is_the_largest_divisor_that_splits_both_halves(state_dim: int, asked: int, used: int) -> None:
    assert make_router(state_dim=state_dim, num_heads=asked).num_heads == used


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("state_dim", "asked"), [pair[:2] for pair in HEADS])
@pytest.mark.parametrize("length", [1, 2, 16])
def test_write_is_the_tokens_one_after_the_other(
    state_dim: int, asked: int, length: int, dtype: torch.dtype, tolerance: float
) -> None:
    router = make_router(state_dim=state_dim, num_heads=asked)
    bank, weights, values = random_write(router, length, dtype)
    expected = write_one_by_one(router, bank, weights, values)
    assert_close(write(router, bank, weights, values), expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 12), cuts=st.lists(st.integers(0, 12), max_size=4), seed=st.integers(0, 2**16))
def test_any_split_of_a_run_writes_the_same_bank(length: int, cuts: list[int], seed: int) -> None:
    router = make_router()
    bank, weights, values = random_write(router, length, torch.float64, seed)
    places = sorted({0, length, *(cut for cut in cuts if cut < length)})
    pieces = bank
    for start, end in pairwise(places):
        pieces = write(router, pieces, weights[:, :, start:end], values[:, start:end])
    assert_close(pieces, write(router, bank, weights, values), rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 12), seed=st.integers(0, 2**16))
def test_write_is_non_expansive(length: int, seed: int) -> None:
    """Two banks that differ come no further apart in any number, and an error shrinks as its slot is written."""
    router = make_router()
    bank, weights, values = random_write(router, length, torch.float64, seed)
    other = bank + torch.randn(bank.shape, generator=torch.Generator().manual_seed(seed), dtype=bank.dtype)
    before = (bank - other).abs()
    after = (write(router, bank, weights, values) - write(router, other, weights, values)).abs()
    assert bool((after <= before + 1e-12).all())
    kept = (1 - weights).prod(2)[:, owner_of_each_number(router)].transpose(1, 2)
    assert_close(after, before * kept, rtol=1e-9, atol=1e-12)


def test_a_weight_of_zero_leaves_the_bank_bit_for_bit() -> None:
    router = make_router()
    bank, weights, values = random_write(router, 5, torch.float32)
    assert torch.equal(write(router, bank, torch.zeros_like(weights), values), bank)


def test_a_long_run_of_the_strongest_writes_stays_finite_and_ends_at_the_last_value() -> None:
    router = make_router(num_heads=1)
    bank, weights, values = random_write(router, 300, torch.float32)
    written = write(router, bank, torch.full_like(weights, MAX_WRITE), values)
    expected = values[:, -1:] + (1 - MAX_WRITE) * (values[:, -2:-1] - values[:, -1:])
    # What the third last token left is (1 - w)^2 = 2^-20 of a value, under the tolerance.
    assert_close(written, expected.expand_as(written), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
@settings(max_examples=20, deadline=None)
@given(
    masks=st.lists(st.lists(st.booleans(), min_size=6, max_size=6).filter(any), min_size=2, max_size=2),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_a_routing_is_a_distribution_over_the_active_slots(
    routing: dict[str, Any], masks: list[list[bool]], scale: float, seed: int
) -> None:
    router = make_router(seed=seed, **routing)
    mask = torch.tensor(masks)
    tokens = scale * torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        weights, gate = route(router, tokens, mask)
    assert weights.shape == (2, 2, 7, 6)
    assert gate.shape == (2, 2, 7, 1)
    assert bool((weights >= 0).all())
    assert_close(weights.sum(-1), torch.ones(2, 2, 7), rtol=1e-5, atol=1e-5)
    # Strong enough for any write: log(1 - w) stays finite.
    assert bool((weights * gate < 1).all())
    assert bool((weights.movedim(-1, 1)[~mask] == 0.0).all())
    assert bool((gate >= 0).all())
    assert bool((gate <= MAX_WRITE).all())


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_the_only_active_slot_gets_everything(routing: dict[str, Any]) -> None:
    router = make_router(**routing)
    mask = torch.zeros(1, 6, dtype=torch.bool)
    mask[0, 3] = True
    weights, _ = route(router, torch.randn(1, 4, 5), mask)
    assert torch.equal(weights, mask.float().expand(1, 2, 4, 6))


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 2, 4, 6])
def test_top_k_is_softmax_over_the_best_active_slots(top_k: int) -> None:
    router = make_router(routing="topk", top_k=top_k)
    mask = torch.tensor([[True, False, True, True, False, True], [False, True, True, True, True, True]])
    scores, _ = router.scores(torch.randn(2, 7, 5))
    weights = router.weights(scores, mask)
    for lane in range(2):
        active = [slot for slot in range(6) if bool(mask[lane, slot])]
        for head in range(2):
            for token in range(7):
                row = scores[lane, head, token]
                best = sorted(active, key=[-float(score) for score in row].__getitem__)[:top_k]
                expected = torch.zeros(6)
                expected[best] = row[best].softmax(0)
                assert_close(weights[lane, head, token], expected)


def test_scores_and_gates_are_linear_maps_of_the_token() -> None:
    router = make_router().double()
    tokens = torch.randn(2, 3, 5).double()
    scores, gate = router.scores(tokens)
    for head in range(2):
        for slot in range(6):
            assert_close(scores[:, head, :, slot], tokens @ router.score.weight[head * 6 + slot])
        strength = torch.sigmoid(tokens @ router.gate.weight[head] + router.gate.bias[head])
        assert_close(gate[:, head, :, 0], MAX_WRITE * strength)


def test_the_token_gate_never_reaches_one() -> None:
    """However sure the gate is: log(1 - w) stays finite."""
    router = make_router()
    with torch.no_grad():
        router.gate.bias.fill_(1e9)
        _, gate = route(router, torch.randn(1, 4, 5), torch.ones(1, 6, dtype=torch.bool))
    assert torch.equal(gate, torch.full_like(gate, 1 - 2.0**-10))


def test_forward_writes_the_gated_routing_and_returns_the_mean_over_heads() -> None:
    router = make_router().double()
    tokens, bank = torch.randn(2, 7, 5).double(), torch.randn(2, 6, 8).double()
    mask = torch.tensor([[True, False, True, True, False, True], [True] * 6])
    routed, shown = router(tokens, bank, mask)
    weights, gate = route(router, tokens, mask)
    expected = write_one_by_one(router, bank, weights * gate, router.value(tokens))
    assert_close(routed, expected, rtol=1e-10, atol=1e-12)
    assert_close(shown, (weights[:, 0] + weights[:, 1]) / 2)


def test_without_a_mask_every_slot_is_active() -> None:
    router = make_router()
    tokens, bank = torch.randn(2, 7, 5), torch.randn(2, 6, 8)
    everything = torch.ones(2, 6, dtype=torch.bool)
    for default, explicit in zip(router(tokens, bank), router(tokens, bank, everything), strict=True):
        assert torch.equal(default, explicit)


def test_masked_slots_are_neither_written_nor_felt() -> None:
    router = make_router()
    tokens, bank = torch.randn(2, 7, 5), torch.randn(2, 6, 8)
    mask = torch.tensor([[True, False, True, True, False, True], [False, True, True, False, False, True]])
    poisoned = torch.where(mask.unsqueeze(-1), bank, 1e30)
    clean_bank, clean_weights = router(tokens, bank, mask)
    bank_after, weights = router(tokens, poisoned, mask)
    assert torch.equal(bank_after[mask], clean_bank[mask])
    assert torch.equal(weights, clean_weights)
    assert torch.equal(bank_after[~mask], poisoned[~mask])
    assert torch.equal(clean_bank[~mask], bank[~mask])
    assert not bool((clean_bank[mask] == bank[mask]).any())


@pytest.mark.parametrize(
    ("sizes", "shown"),
    [
        ({"token_dim": 0}, "token_dim=0"),
        ({"state_dim": 1}, "state_dim=1"),
        ({"num_states": 0}, "num_states=0"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"state_dim": 7}, "state_dim=7"),
    ],
)
def test_sizes_that_make_no_router_are_refused(sizes: dict[str, int], shown: str) -> None:
    with pytest.raises(ConfigError, match=f"A router needs .* given .*{shown}"):
        make_router(**sizes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"routing": "hard"}, "routing must be one of softmax, topk, sparsemax, entmax; given 'hard'"),
        ({"routing": "topk"}, "routing='topk' goes with top_k in 1 .. num_states=6.*routing='topk', top_k=None"),
        ({"routing": "topk", "top_k": 0}, "top_k=0"),
        ({"routing": "topk", "top_k": 7}, "top_k=7"),
        ({"top_k": 2}, "and only it; given routing='softmax', top_k=2"),
        ({"routing": "entmax", "top_k": 2}, "given routing='entmax', top_k=2"),
    ],
)
def test_routings_that_there_are_not_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_router(**arguments)


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_gradients_are_finite_with_masked_slots(routing: dict[str, Any]) -> None:
    router = make_router(**routing)
    mask = torch.tensor([[True, False, True, True, False, True], [False, False, True, False, False, False]])
    routed, _ = router(torch.randn(2, 7, 5), torch.randn(2, 6, 8), mask)
    torch.autograd.backward(routed.square().sum())
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
        assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_log_of_the_rest_is_right_to_the_last_bits(dtype: torch.dtype) -> None:
    small = torch.logspace(-7 if dtype == torch.float16 else -12, -1, 400, dtype=torch.float64)
    # 1 - 2^-10 is no bf16: the nearest is 1, whose logarithm is infinite.
    largest = 0.99 if dtype == torch.bfloat16 else MAX_WRITE
    weights = torch.cat([small, torch.linspace(0.1, largest, 400, dtype=torch.float64)]).to(dtype)
    wanted = torch.log1p(-weights.double())
    error = ((log_of_rest(weights).double() - wanted) / wanted).abs()
    assert error.max() < 4 * torch.finfo(dtype).eps
    assert log_of_rest(torch.zeros(1, dtype=dtype)).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_log_of_the_rest_has_the_gradient_of_the_logarithm(dtype: torch.dtype) -> None:
    weights = torch.cat([torch.zeros(1), torch.logspace(-12, -1, 400), torch.tensor([0.5, MAX_WRITE])])
    weights = weights.to(dtype).requires_grad_()
    log_of_rest(weights).sum().backward()
    # Never better than eps / (1 - w), which is 1024 eps at MAX_WRITE.
    assert_close(weights.grad, -1.0 / (1.0 - weights.detach()), rtol=1e-5, atol=0.0)
