"""The external memory: against loops over rows, what was written is found again, and rows are overwritten in turn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nsm.errors import ConfigError
from nsm.modules.memory import ExternalMemory, Memory

DIM, KEY, ROWS = 6, 4, 3


def make_memory(rows: int = ROWS, num_heads: int = 2, token_dim: int = DIM, key_dim: int = KEY) -> ExternalMemory:
    torch.manual_seed(0)
    memory = ExternalMemory(token_dim, rows, key_dim, num_heads)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.normal_(std=0.7)
    return memory.double()


def empty(memory: ExternalMemory, lanes: int = 1) -> Memory:
    zeros = torch.zeros(lanes, memory.rows, dtype=torch.float64)
    return Memory(
        zeros.unsqueeze(-1).expand(-1, -1, memory.key_dim),
        zeros.unsqueeze(-1).expand(-1, -1, memory.value.out_features),
        zeros,
        torch.zeros(lanes, dtype=torch.int64),
    )


def random_memory(memory: ExternalMemory, lanes: int, seed: int = 0) -> Memory:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((memory.rows, memory.key_dim), (memory.rows, memory.value.out_features))
    keys, values = (torch.randn(lanes, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    filled = torch.rand(lanes, memory.rows, generator=generator, dtype=torch.float64)
    return Memory(keys, values, filled, torch.arange(lanes) % memory.rows)


def random_tokens(lanes: int, length: int, seed: int = 1) -> Tensor:
    return torch.randn(lanes, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def read_row_by_row(memory: ExternalMemory, token: Tensor, keys: Tensor, values: Tensor, filled: Tensor) -> Tensor:
    """One token [d] of one lane."""
    query, heads = memory.query.weight @ token, memory.num_heads
    answer = []
    for head in range(heads):
        part = slice(head * KEY // heads, (head + 1) * KEY // heads)
        wide = slice(head * DIM // heads, (head + 1) * DIM // heads)
        weights = [
            (query[part] @ keys[row, part] / (KEY // heads) ** 0.5).exp() * (filled[row] + 1e-6)
            for row in range(memory.rows)
        ]
        total = torch.stack(weights).sum()
        answer.append(torch.stack([w / total * values[row, wide] for row, w in enumerate(weights)]).sum(0))
    return memory.out.weight @ torch.cat(answer)


def write_row_by_row(memory: ExternalMemory, tokens: list[Tensor], state: Memory, lane: int) -> tuple[Tensor, ...]:
    """One lane, and only the tokens that count."""
    keys, values, filled, oldest = (part[lane] for part in state)
    made = [memory.pool.weight @ token + memory.pool.bias for token in tokens]
    shares = torch.stack([part[0] for part in made]).softmax(0)
    key = sum((s * (memory.key.weight @ x) for s, x in zip(shares, tokens, strict=True)), torch.zeros(KEY))
    value = sum((s * (memory.value.weight @ x) for s, x in zip(shares, tokens, strict=True)), torch.zeros(DIM))
    gate, fresh = (
        torch.sigmoid(torch.stack([s * m[i] for s, m in zip(shares, made, strict=True)]).sum()) for i in (1, 2)
    )
    likeness = torch.stack(
        [
            (8 * (row @ key) / ((row @ row + 1e-6).sqrt() * (key @ key + 1e-6).sqrt())).exp() * (full + 1e-6)
            for row, full in zip(keys, filled, strict=True)
        ]
    )
    weights = [
        gate * (fresh * float(row == int(oldest)) + (1 - fresh) * likeness[row] / likeness.sum())
        for row in range(memory.rows)
    ]
    return (
        torch.stack([(1 - w) * row + w * key for w, row in zip(weights, keys, strict=True)]),
        torch.stack([(1 - w) * row + w * value for w, row in zip(weights, values, strict=True)]),
        torch.stack([1 - (1 - w) * (1 - full) for w, full in zip(weights, filled, strict=True)]),
        (oldest + 1) % memory.rows,
    )


@torch.no_grad()
@pytest.mark.parametrize("num_heads", [1, 2])
def test_reading_is_the_loop_over_rows(num_heads: int) -> None:
    memory = make_memory(num_heads=num_heads)
    state, tokens = random_memory(memory, 2), random_tokens(2, 5)
    read = memory.read(tokens, state)
    assert read.shape == (2, 5, DIM)
    for lane in range(2):
        for place in range(5):
            expected = read_row_by_row(memory, tokens[lane, place], *(part[lane] for part in state[:3]))
            assert_close(read[lane, place], expected, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_writing_is_the_loop_over_rows() -> None:
    """Lanes of which all, some and one of the tokens count; an empty memory, too."""
    memory = make_memory()
    tokens, valid = random_tokens(3, 4), [4, 2, 1]
    counts = torch.arange(4) < torch.tensor(valid)[:, None]
    for state in (random_memory(memory, 3), empty(memory, 3)):
        after = memory.write(tokens, counts, state)
        for lane, count in enumerate(valid):
            expected = write_row_by_row(memory, list(tokens[lane, :count]), state, lane)
            for got, want in zip(after, expected, strict=True):
                assert_close(got[lane], want, rtol=1e-9, atol=1e-9)
    every = memory.write(tokens, None, state)
    for got, want in zip(every, memory.write(tokens, torch.ones(3, 4, dtype=torch.bool), state), strict=True):
        assert torch.equal(got, want)


@torch.no_grad()
def test_an_empty_memory_gives_exactly_nothing() -> None:
    memory = make_memory()
    assert torch.equal(memory.read(random_tokens(2, 5), empty(memory, 2)), torch.zeros(2, 5, DIM).double())


@torch.no_grad()
def test_an_empty_row_is_nothing_and_not_zeros() -> None:
    """One row is written in full: what is found is its value, not a mean with the zeros of the others."""
    memory = make_memory()
    keys, values, filled, oldest = (part.clone() for part in empty(memory))
    keys[0, 1], values[0, 1], filled[0, 1] = 0.1, torch.arange(1.0, 1.0 + DIM), 1.0
    found = memory.read(random_tokens(1, 5), Memory(keys, values, filled, oldest))
    assert_close(found, memory.out(values[:, 1]).expand(1, 5, DIM), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_fresh_memory_changes_nothing_until_it_is_trained() -> None:
    memory = ExternalMemory(DIM, ROWS, KEY, 2).double()
    assert not bool(memory.read(random_tokens(2, 5), random_memory(memory, 2)).any())


def plain_memory(rows: int, fresh: float = 20.0) -> ExternalMemory:
    """Keys and values are the tokens themselves; every write has full strength and goes to the oldest row."""
    memory = ExternalMemory(8, rows, 8, 1).double()
    with torch.no_grad():
        for linear in (memory.query, memory.key, memory.value, memory.out):
            linear.weight.copy_(torch.eye(8))
        memory.query.weight.mul_(50.0)
        memory.pool.weight.zero_()
        memory.pool.bias.copy_(torch.tensor([0.0, 20.0, fresh]))
    return memory


@torch.no_grad()
def test_what_was_written_can_be_found_again() -> None:
    memory = plain_memory(5)
    facts = torch.eye(8, dtype=torch.float64)[:5]
    state = empty(memory)
    for fact in facts:
        state = memory.write(fact.view(1, 1, 8), None, state)
    assert_close(memory.read(facts.unsqueeze(0), state)[0], facts, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_oldest_row_is_overwritten_in_turn() -> None:
    memory, facts = plain_memory(3), torch.eye(8, dtype=torch.float64)
    state = empty(memory)
    for number in range(8):
        assert state[3].tolist() == [number % 3]
        state = memory.write(facts[number].view(1, 1, 8), None, state)
        held = [max(place for place in range(number + 1) if place % 3 == row) for row in range(min(3, number + 1))]
        assert_close(state[1][0, : len(held)], facts[held], rtol=1e-6, atol=1e-6)
        assert not bool(state[2][0, len(held) :].gt(1e-6).any())


@torch.no_grad()
def test_a_key_that_is_known_goes_to_its_own_row() -> None:
    """Without novelty content decides: the row that is alike takes the new value, the others keep theirs."""
    memory, facts = plain_memory(3), torch.eye(8, dtype=torch.float64)
    state = empty(memory)
    for number in range(3):
        state = memory.write(facts[number].view(1, 1, 8), None, state)
    memory.pool.bias[2] = -20.0
    after = memory.write(2.0 * facts[1].view(1, 1, 8), None, state)
    assert_close(after[1][0, 1], 2.0 * facts[1], rtol=1e-2, atol=1e-2)
    for row in (0, 2):
        assert_close(after[1][0, row], state[1][0, row], rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_a_closed_gate_writes_nothing_and_the_turn_goes_on() -> None:
    memory = make_memory()
    memory.pool.weight.zero_()
    memory.pool.bias[1] = -1e4
    state = random_memory(memory, 2)
    after = memory.write(random_tokens(2, 4), None, state)
    for got, before in zip(after[:3], state[:3], strict=True):
        assert torch.equal(got, before)
    assert after[3].tolist() == [1, 2]


@torch.no_grad()
def test_tokens_that_do_not_count_are_not_felt() -> None:
    memory, tokens = make_memory(), random_tokens(1, 4)
    counts = torch.tensor([[True, True, False, False]])
    changed = torch.where(counts.unsqueeze(-1), tokens, 1e6)
    state = random_memory(memory, 1)
    for got, want in zip(memory.write(changed, counts, state), memory.write(tokens, counts, state), strict=True):
        assert torch.equal(got, want)


def test_gradients_reach_every_parameter_through_a_write_and_a_read() -> None:
    memory = make_memory()
    state = memory.write(random_tokens(2, 4), None, random_memory(memory, 2))
    torch.autograd.backward(memory.read(random_tokens(2, 4, seed=2), state).square().sum())
    for name, parameter in memory.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
        assert float(parameter.grad.abs().max()) > 0, name


def test_an_empty_memory_has_finite_gradients() -> None:
    memory = make_memory()
    state = memory.write(random_tokens(2, 4), None, empty(memory, 2))
    torch.autograd.backward(memory.read(random_tokens(2, 4, seed=2), state).square().sum())
    assert all(bool(torch.isfinite(p.grad).all()) for p in memory.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("sizes", "shown"),
    [
        ({"rows": 1}, "rows=1"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": 4}, "token_dim=6, key_dim=4, num_heads=4"),
        ({"key_dim": 0}, "key_dim=0"),
        ({"key_dim": 3}, "key_dim=3, num_heads=2"),
    ],
)
def test_sizes_that_make_no_memory_are_refused(sizes: dict[str, int], shown: str) -> None:
    with pytest.raises(ConfigError, match=f"A memory needs at least 2 rows, .*{shown}"):
        make_memory(**sizes)
