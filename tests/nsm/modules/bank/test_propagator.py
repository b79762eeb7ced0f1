"""The propagator: the gates against their formulas state by state, the start near "keep", and communication."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nsm.errors import ConfigError
from nsm.modules.bank.propagator import GateType, StatePropagator

GATES: list[GateType] = ["gru", "lstm", "mingru"]


def make_propagator(gate_type: GateType = "gru", stirred: bool = True, **changes: Any) -> StatePropagator:
    """In float64, so that a difference from a reference is an error and not rounding; with all weights random."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"state_dim": 12, "enable_communication": False, "num_heads": 3, **changes}
    propagator = StatePropagator(gate_type=gate_type, **arguments).double()
    if stirred:
        stir(propagator)
    return propagator


@torch.no_grad()
def stir(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)


def random_states(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    prev, new, cell = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    return prev, new, cell


def one_transition(propagator: StatePropagator, prev: Tensor, new: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """The formulas for a single state [D], block by block and gate by gate."""
    next_state, next_cell = torch.empty_like(prev), torch.empty_like(prev)
    blocks = propagator.num_blocks
    width = propagator.state_dim // blocks
    for block in range(blocks):
        here = slice(block * width, (block + 1) * width)

        def project(which: Any, x: Tensor, gate: int, block: int = block, here: slice = here) -> Tensor:
            columns = slice(gate * width, (gate + 1) * width)
            result: Tensor = which.weight[block][:, columns].T @ x[here] + which.bias[block, 0, columns]
            return result

        def both(gate: int, project: Any = project) -> Tensor:
            result: Tensor = project(propagator.from_new, new, gate) + project(propagator.from_prev, prev, gate)
            return result

        if propagator.gate_type == "gru":
            r, z = torch.sigmoid(both(1)), torch.sigmoid(both(2))
            candidate = torch.tanh(project(propagator.from_new, new, 0) + r * project(propagator.from_prev, prev, 0))
            next_state[here] = (1 - z) * prev[here] + z * candidate
        elif propagator.gate_type == "mingru":
            z = torch.sigmoid(project(propagator.update, new, 0))
            next_state[here] = (1 - z) * prev[here] + z * project(propagator.candidate, new, 0)
        else:
            i, f, o = torch.sigmoid(both(1)), torch.sigmoid(both(2) + 3), torch.sigmoid(both(3))
            next_cell[here] = f * cell[here] + i * torch.tanh(both(0))
            next_state[here] = (1 - o) * prev[here] + o * torch.tanh(next_cell[here])
    return next_state, next_cell


def communicate_slot_by_slot(propagator: StatePropagator, bank: Tensor, active: list[int]) -> Tensor:
    """Every slot of bank [S, D] asks the active slots, head by head, listens as much as it will, and keeps its norm."""
    dim, heads = propagator.state_dim, propagator.num_heads
    width = dim // heads
    result = torch.empty_like(bank)
    query, key, value = propagator.qkv(propagator.norm(bank)).split(dim, -1)
    for slot in range(bank.shape[0]):
        answer = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = torch.stack([query[slot, part] @ key[other, part] for other in active]) / width**0.5
            answer.append(sum(w * value[other, part] for w, other in zip(scores.softmax(0), active, strict=True)))
        said = propagator.out(torch.cat([torch.as_tensor(part) for part in answer]))
        listens = torch.sigmoid(propagator.listen(propagator.norm(bank[slot])))
        turned = bank[slot] + listens * bank[slot].square().mean().sqrt() * said
        result[slot] = turned / turned.norm() * bank[slot].norm()
    return result


@pytest.mark.parametrize("num_blocks", [1, 3, 12])
@pytest.mark.parametrize("shape", [(4, 12), (2, 5, 12), (1, 1, 12)])
@pytest.mark.parametrize("gate_type", GATES)
def test_gates_are_their_formulas_state_by_state(gate_type: GateType, shape: tuple[int, ...], num_blocks: int) -> None:
    propagator = make_propagator(gate_type, num_blocks=num_blocks)
    prev, new, cell = random_states(*shape)
    rows = [x.reshape(-1, 12) for x in (prev, new, cell)]
    pairs = [one_transition(propagator, *row) for row in zip(*rows, strict=True)]
    if gate_type != "lstm":
        state = propagator(prev, new)
    else:
        state, next_cell = propagator(prev, new, cell)
        assert_close(next_cell, torch.stack([pair[1] for pair in pairs]).view(shape), rtol=1e-10, atol=1e-12)
    assert_close(state, torch.stack([pair[0] for pair in pairs]).view(shape), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 12), (2, 5, 12)])
def test_an_lstm_without_a_cell_starts_it_from_prev(shape: tuple[int, ...]) -> None:
    propagator = make_propagator("lstm")
    prev, new, _ = random_states(*shape)
    without = propagator(prev, new)
    assert isinstance(without, Tensor)
    assert torch.equal(without, propagator(prev, new, prev)[0])


@pytest.mark.parametrize("gate_type", GATES)
def test_a_single_state_is_a_bank_of_one_slot(gate_type: GateType) -> None:
    """It has nobody to talk to, so with communication nothing but the gates acts on [B, D]."""
    talking = make_propagator(gate_type, enable_communication=True)
    silent = make_propagator(gate_type)
    silent.load_state_dict(talking.state_dict(), strict=False)
    prev, new, _ = random_states(4, 12)
    assert torch.equal(talking(prev, new), silent(prev, new))
    assert_close(silent(prev, new), silent(prev.unsqueeze(1), new.unsqueeze(1)).squeeze(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate_type", GATES)
def test_a_block_diagonal_gate_is_the_dense_gate_with_that_matrix(gate_type: GateType) -> None:
    blocks = make_propagator(gate_type, num_blocks=3)
    dense = make_propagator(gate_type)
    gates, width = {"gru": 3, "lstm": 4, "mingru": 1}[gate_type], 4
    with torch.no_grad():
        for name in ("candidate", "update") if gate_type == "mingru" else ("from_new", "from_prev"):
            small, large = getattr(blocks, name), getattr(dense, name)
            large.weight.zero_()
            for block in range(3):
                rows = slice(block * width, (block + 1) * width)
                for gate in range(gates):
                    columns = slice(gate * 12 + block * width, gate * 12 + (block + 1) * width)
                    own = slice(gate * width, (gate + 1) * width)
                    large.weight[0, rows, columns] = small.weight[block, :, own]
                    large.bias[0, 0, columns] = small.bias[block, 0, own]
    prev, new, _ = random_states(2, 5, 12)
    assert_close(blocks(prev, new), dense(prev, new), rtol=1e-10, atol=1e-12)
    assert sum(p.numel() for p in blocks.parameters()) < sum(p.numel() for p in dense.parameters()) / 2


@pytest.mark.parametrize("num_blocks", [1, 3])
@pytest.mark.parametrize("communication", [False, True])
@pytest.mark.parametrize("gate_type", GATES)
def test_an_untrained_propagator_nearly_keeps_what_was_there(
    gate_type: GateType, communication: bool, num_blocks: int
) -> None:
    propagator = make_propagator(gate_type, stirred=False, enable_communication=communication, num_blocks=num_blocks)
    prev, new, _ = random_states(8, 5, 12)
    with torch.no_grad():
        handed_on = float((propagator(prev, new) * prev).sum() / (prev * prev).sum())
    # sigmoid(3) = 95 % at an input of zero; random inputs move single gates around that.
    assert 0.90 < handed_on < 0.99


@pytest.mark.parametrize("active", [[0, 1, 2, 3, 4], [0, 2, 3], [4]])
def test_communication_is_attention_among_the_active_slots(active: list[int]) -> None:
    talking = make_propagator(enable_communication=True)
    silent = make_propagator()
    silent.load_state_dict(talking.state_dict(), strict=False)
    prev, new, _ = random_states(2, 5, 12)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[:, active] = True
    gated, result = silent(prev, new), talking(prev, new, mask=mask)
    expected = torch.stack([communicate_slot_by_slot(talking, bank, active) for bank in gated])
    # 1e-5: the norm that is divided by carries a guard of 1e-6 against zero.
    assert_close(result, expected, rtol=1e-5, atol=1e-7)
    assert bool((result - gated).abs().amax() > 0.1)


@pytest.mark.parametrize("gate_type", GATES)
def test_communication_keeps_the_norm_of_every_slot(gate_type: GateType) -> None:
    talking = make_propagator(gate_type, enable_communication=True)
    silent = make_propagator(gate_type)
    silent.load_state_dict(talking.state_dict(), strict=False)
    prev, new, _ = random_states(2, 5, 12)
    assert_close(talking(prev, new).norm(dim=-1), silent(prev, new).norm(dim=-1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [1.0, 0.1, 0.01])
def test_what_others_say_is_measured_by_what_a_slot_holds(size: float) -> None:
    """However little a bank holds, an untrained gate lets its slots be turned by a twentieth of what is said."""
    propagator = make_propagator(stirred=False, enable_communication=True)
    with torch.no_grad():
        propagator.out.weight.normal_()
    bank = size * random_states(2, 5, 12)[0]
    turned = propagator.communicate(bank, None)
    assert ((turned - bank).norm(dim=-1) < 0.25 * bank.norm(dim=-1)).all()
    assert ((turned - bank).norm(dim=-1) > 0.005 * bank.norm(dim=-1)).all()


def test_communication_without_a_mask_is_among_all_slots() -> None:
    propagator = make_propagator(enable_communication=True)
    prev, new, _ = random_states(2, 5, 12)
    assert torch.equal(propagator(prev, new), propagator(prev, new, mask=torch.ones(2, 5, dtype=torch.bool)))


@pytest.mark.parametrize("gate_type", GATES)
def test_what_a_masked_slot_holds_reaches_no_active_slot(gate_type: GateType) -> None:
    propagator = make_propagator(gate_type, enable_communication=True).float()
    prev, new, _ = (x.float() for x in random_states(2, 5, 12))
    mask = torch.tensor([[True, False, True, True, False], [False, True, True, False, True]])
    poisoned = torch.where(mask.unsqueeze(-1), prev, 1e30)
    assert torch.equal(propagator(poisoned, new, mask=mask)[mask], propagator(prev, new, mask=mask)[mask])
    assert not torch.equal(propagator(prev, new)[mask], propagator(prev, new, mask=mask)[mask])


@pytest.mark.parametrize("communication", [False, True])
@pytest.mark.parametrize("gate_type", GATES)
def test_gradients_reach_every_parameter(gate_type: GateType, communication: bool) -> None:
    propagator = make_propagator(gate_type, enable_communication=communication, num_blocks=3)
    prev, new, _ = random_states(2, 5, 12)
    torch.autograd.backward((propagator(prev, new) * torch.randn(2, 5, 12)).sum())
    for name, parameter in propagator.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def test_only_communication_needs_heads_that_divide_the_state() -> None:
    state = StatePropagator(state_dim=6, enable_communication=False, num_heads=4)(torch.ones(1, 6), torch.ones(1, 6))
    assert state.shape == (1, 6)
    with pytest.raises(ConfigError, match="num_heads must divide state_dim=6; given 4"):
        StatePropagator(state_dim=6, num_heads=4)


@pytest.mark.parametrize(("state_dim", "heads"), [(128, 4), (126, 2), (127, 1), (1, 1)])
def test_any_width_communicates_with_the_heads_that_divide_it(state_dim: int, heads: int) -> None:
    propagator = StatePropagator(state_dim=state_dim)
    assert propagator.num_heads == heads
    state = torch.randn(2, 3, state_dim)
    assert propagator(state, state).shape == state.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gate_type": "rnn"}, "gate_type must be one of gru, lstm, mingru; given 'rnn'"),
        ({"num_blocks": 5}, "num_blocks must divide state_dim=12; given 5"),
        ({"num_blocks": 0}, "num_blocks must divide state_dim=12; given 0"),
        ({"num_heads": 0, "enable_communication": True}, "num_heads must divide state_dim=12; given 0"),
        ({"state_dim": 0}, "state_dim"),
    ],
)
def test_sizes_that_make_no_propagator_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_propagator(**arguments)


@pytest.mark.parametrize(
    ("prev", "new"),
    [((2, 12), (3, 12)), ((2, 5, 12), (2, 12)), ((2, 11), (2, 11)), ((12,), (12,)), ((1, 2, 5, 12), (1, 2, 5, 12))],
)
def test_states_of_the_wrong_shape_are_refused(prev: tuple[int, ...], new: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"prev and new must both be \[B, 12\] or \[B, S, 12\]; given"):
        make_propagator()(torch.zeros(prev).double(), torch.zeros(new).double())


@pytest.mark.parametrize("gate_type", ["gru", "mingru"])
def test_a_cell_for_a_gate_that_has_none_is_refused(gate_type: GateType) -> None:
    prev, new, cell = random_states(2, 12)
    with pytest.raises(ConfigError, match=f"A {gate_type} has no cell"):
        make_propagator(gate_type)(prev, new, cell)


def test_a_mingru_is_linear_in_prev_and_has_a_fraction_of_the_weights() -> None:
    """Its gate looks at `new` alone, so a bank is handed on by a map that is the same whatever the bank holds."""
    light, heavy = make_propagator("mingru"), make_propagator("gru")
    prev, new, other = random_states(2, 5, 12)
    middle = light(0.25 * prev + 0.75 * other, new)
    assert_close(middle, 0.25 * light(prev, new) + 0.75 * light(other, new), rtol=1e-10, atol=1e-12)
    assert 3 * sum(p.numel() for p in light.parameters()) == sum(p.numel() for p in heavy.parameters())


@pytest.mark.parametrize("shape", [(1, 12), (2, 1, 12), (5, 12), (2, 5, 11)])
def test_a_cell_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    """A cell of one row would otherwise be broadcast to every slot of every lane without a word."""
    prev, new, _ = random_states(2, 5, 12)
    with pytest.raises(ConfigError, match="cell"):
        make_propagator("lstm")(prev, new, torch.zeros(shape).double())
