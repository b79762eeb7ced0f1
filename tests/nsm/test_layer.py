"""One layer against a loop that takes one token at a time, with plain lists and slots written one by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nsm.errors import ConfigError
from nsm.layer import LayerState, NSMLayer

CHUNK, DIM, SLOTS = 4, 6, 5

VARIANTS: dict[str, dict[str, Any]] = {
    "gru": {},
    "lstm": {"gate_type": "lstm"},
    "never consolidated": {"consolidate_every": 0},
    "every third chunk": {"consolidate_every": 3},
    "every second chunk, lstm": {"consolidate_every": 2, "gate_type": "lstm", "communication": True},
    "communication": {"communication": True},
    "some slots masked": {"communication": True, "initial_states": 3},
    "two routing heads": {"routing_heads": 2},
    "odd state": {"state_dim": 7, "routing_heads": 2},
    "small state": {"state_dim": 2},
    "wide window, narrow convolution": {"window": 7, "conv_width": 2, "feed_forward": 1},
    "one dense gate": {"gate_blocks": 1},
}


def make_layer(**changes: Any) -> NSMLayer:
    """In float64, so that a difference from the loop is an error and not rounding; with all weights random."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"state_dim": 8, "num_heads": 2, "num_states": SLOTS, "chunk_size": CHUNK, **changes}
    layer = NSMLayer(token_dim=DIM, **arguments)
    stir(layer)
    return layer.double()


@torch.no_grad()
def stir(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)


@pytest.fixture(params=VARIANTS.values(), ids=list(VARIANTS))
def layer(request: pytest.FixtureRequest) -> NSMLayer:
    return make_layer(**request.param)


def random_tokens(lanes: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(lanes, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class Stream:
    """One lane of one layer, a token at a time. Every part is the component's own, given a single token."""

    layer: NSMLayer
    mask: Tensor
    bank: Tensor
    pending: Tensor
    cell: Tensor
    importance: Tensor
    inputs: list[Tensor] = field(default_factory=list)
    """The normed inputs, from the start of the stream."""
    chunks: int = 0
    written: list[Tensor] = field(default_factory=list)
    """The share that each token of the open chunk wrote to each slot."""

    @classmethod
    def start(cls, layer: NSMLayer, bank: Tensor | None = None, mask: Tensor | None = None) -> Stream:
        manager = layer.manager
        bank = manager.bank if bank is None else bank
        mask = manager.mask if mask is None else mask
        return cls(layer, mask, bank, bank, manager.bank, torch.sigmoid(manager.importance))

    def mixed(self, place: int) -> Tensor:
        """The output of the local mixing at a place, [d]."""
        taps = self.layer.mixing.kernel[:, 0]
        total: Tensor = self.layer.mixing.bias
        for back in range(self.layer.mixing.width):
            if place - back >= 0:
                total = total + taps[:, -1 - back] * self.inputs[place - back]
        return nn.functional.silu(total)

    def take(self, token: Tensor) -> Tensor:
        layer, attention = self.layer, self.layer.attention
        self.inputs.append(layer.norm(token))
        now = len(self.inputs) - 1
        window = torch.stack([self.mixed(place) for place in range(max(0, now - attention.window + 1), now + 1)])
        # The window's tokens alone, from the start of a stream: places are relative, so nothing else matters.
        rows, nothing = token.new_zeros(1, attention.window - 1, DIM), torch.tensor([0])
        local = attention.local(window.unsqueeze(0), rows, rows, nothing, nothing)[0][0, -1]
        mixed = window[-1]
        one = mixed.view(1, 1, DIM)
        read = attention.read(one, self.bank.unsqueeze(0), self.mask.unsqueeze(0), layer.manager.importance)[0, 0]
        token = token + attention.fuse(torch.cat([local, read]))
        token = token + layer.feed_forward(layer.forward_norm(token))
        self.write(mixed)
        if len(self.inputs) % layer.chunk_size == 0:
            self.end_chunk()
        return token

    def write(self, mixed: Tensor) -> None:
        """slot <- (1 - w) * slot + w * value, number by number: head r owns the r-th part of both halves."""
        router = self.layer.router
        weights, gate = router.route(mixed.view(1, 1, DIM), self.mask.unsqueeze(0))
        heads, dim, value = router.num_heads, router.state_dim, router.value(mixed)
        weight = (weights * gate)[0, :, 0]  # [R, S]
        pending = self.pending.clone()
        for number in range(dim):
            head = (number % (dim // 2)) // (dim // 2 // heads) if heads > 1 else 0
            for slot in range(pending.shape[0]):
                w = weight[head, slot]
                pending[slot, number] = (1 - w) * self.pending[slot, number] + w * value[number]
        self.pending = pending
        self.written.append(weight.mean(0))

    def end_chunk(self) -> None:
        """Consolidate where it is time, among the active slots only, and commit."""
        layer = self.layer
        self.chunks += 1
        if layer.consolidate_every and self.chunks % layer.consolidate_every == 0:
            active = [slot for slot in range(SLOTS) if bool(self.mask[slot])]
            # The active slots are a smaller bank: the masked ones are not there at all.
            small = self.pending[active].unsqueeze(0)
            bank, cell = self.pending.clone(), self.cell.clone()
            if layer.has_cell:
                new, new_cell = layer.propagator(small, layer.bank_norm(small), self.cell[active].unsqueeze(0))
                cell[active] = new_cell[0]
            else:
                new = layer.propagator(small, layer.bank_norm(small))
            bank[active] = new[0]
            self.pending, self.cell = bank, cell
        self.bank = self.pending
        mass = torch.stack(self.written).sum(0)
        total = mass.sum()
        share = mass / (total / self.mask.sum())
        rate = 0.1 * total / layer.chunk_size
        self.importance = (1 - rate) * self.importance + rate * share / (1 + share)
        self.written = []


def run(layer: NSMLayer, tokens: Tensor, state: LayerState, pieces: list[int]) -> tuple[Tensor, LayerState]:
    """The layer's own path: `advance` by pieces that end inside or at the end of a chunk, and `commit`."""
    lanes, outputs, start, every = tokens.shape[0], [], 0, layer.consolidate_every
    for count in pieces:
        filled = torch.full((lanes,), min(start, layer.attention.window - 1))
        output, state = layer.advance(tokens[:, start : start + count], state, filled, torch.full((lanes,), count))
        outputs.append(output)
        start += count
        due = bool(every) and (start // CHUNK) % every == 0
        state = layer.commit(state, torch.full((lanes,), start % CHUNK == 0), torch.full((lanes,), due))
    return torch.cat(outputs, 1), state


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[4, 4, 4, 4, 3], [1] * 19, [2, 2, 3, 1, 4, 1, 2, 1, 3]])
def test_a_layer_is_the_loop_over_single_tokens(layer: NSMLayer, pieces: list[int]) -> None:
    tokens = random_tokens(2, 19)
    outputs, state = run(layer, tokens, layer.initial_state(2), pieces)
    for lane in range(2):
        stream = Stream.start(layer)
        expected = torch.stack([stream.take(token) for token in tokens[lane]])
        # 1e-5: the cosines and sines of the window, and the guard of the trace's division, are no better than 1e-6.
        assert_close(outputs[lane], expected, rtol=1e-5, atol=1e-5)
        found = {role: value[lane] for role, value in state.items()}
        assert_close(found["bank"], stream.bank, rtol=1e-5, atol=1e-6)
        assert_close(found["pending"], stream.pending, rtol=1e-5, atol=1e-6)
        assert_close(found["importance"], stream.importance, rtol=1e-5, atol=1e-6)
        assert_close(found["written"], torch.stack(stream.written).sum(0), rtol=1e-9, atol=1e-12)
        assert torch.equal(found["mask"], stream.mask)
        assert_close(found["tail"], torch.stack(stream.inputs[-(layer.mixing.width - 1) :]), rtol=1e-9, atol=1e-12)
        window = range(19 - layer.attention.window + 1, 19)
        carried = [layer.attention.qkv(stream.mixed(place)).split(DIM) for place in window]
        assert_close(found["key"], torch.stack([key for _, key, _ in carried]), rtol=1e-9, atol=1e-12)
        assert_close(found["value"], torch.stack([value for _, _, value in carried]), rtol=1e-9, atol=1e-12)
        assert ("cell" in found) == layer.has_cell
        if layer.has_cell:
            assert_close(found["cell"], stream.cell, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3, 4, 5, 13])
def test_forward_runs_a_sequence_from_the_beginning(layer: NSMLayer, length: int) -> None:
    tokens = random_tokens(2, length)
    output, states = layer(tokens)
    assert output.shape == (2, length, DIM)
    for lane in range(2):
        stream = Stream.start(layer)
        expected = torch.stack([stream.take(token) for token in tokens[lane]])
        assert_close(output[lane], expected, rtol=1e-5, atol=1e-5)
        assert_close(states[lane], stream.pending, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_forward_starts_from_the_bank_and_mask_that_it_is_given(layer: NSMLayer) -> None:
    tokens = random_tokens(2, 9)
    bank = torch.randn(2, *layer.manager.bank.shape).double()
    mask = torch.tensor([[True, False, True, True, False], [False, False, True, False, True]])
    output, states = layer(tokens, bank, mask)
    for lane in range(2):
        stream = Stream.start(layer, bank[lane], mask[lane])
        expected = torch.stack([stream.take(token) for token in tokens[lane]])
        assert_close(output[lane], expected, rtol=1e-5, atol=1e-5)
        assert_close(states[lane], stream.pending, rtol=1e-5, atol=1e-6)
        assert torch.equal(states[lane][~mask[lane]], bank[lane][~mask[lane]])


@torch.no_grad()
def test_what_masked_slots_hold_changes_nothing(layer: NSMLayer) -> None:
    """Bit for bit, in float32 as it is deployed: outputs, and every state of an active slot."""
    layer = layer.float()
    tokens = random_tokens(2, 3 * CHUNK + 1).float()
    clean = layer.initial_state(2)
    clean["mask"] = mask = torch.tensor([[True, False, True, True, False], [False, False, True, False, True]])
    poisoned = dict(clean)
    for role in ("bank", "pending", "cell"):
        if role in clean:
            poisoned[role] = torch.where(mask.unsqueeze(-1), clean[role], 1e30)
    pieces = [4, 4, 2, 2, 1]
    output, state = run(layer, tokens, clean, pieces)
    other_output, other_state = run(layer, tokens, poisoned, pieces)
    assert torch.equal(output, other_output)
    for role, value in state.items():
        per_slot = role in ("bank", "pending", "cell", "importance", "written")
        assert torch.equal(
            value[mask] if per_slot else value, other_state[role][mask] if per_slot else other_state[role]
        )
    for role in ("bank", "pending", "cell"):
        if role in clean:
            assert torch.equal(other_state[role][~mask], poisoned[role][~mask])


@torch.no_grad()
def test_a_commit_leaves_the_lanes_that_are_not_full_bit_for_bit(layer: NSMLayer) -> None:
    _, state = run(layer, random_tokens(3, 6), layer.initial_state(3), [4, 2])
    full = torch.tensor([False, True, False])
    after = layer.commit(state, full)
    for role, value in after.items():
        assert torch.equal(value[~full], state[role][~full]), role
    assert torch.equal(after["bank"][full], after["pending"][full])
    assert not torch.equal(after["bank"][full], state["bank"][full])
    assert bool((after["written"][full] == 0).all())


@torch.no_grad()
def test_a_lane_with_no_valid_token_keeps_its_state_bit_for_bit(layer: NSMLayer) -> None:
    _, state = run(layer, random_tokens(2, 6), layer.initial_state(2), [4, 2])
    filled = torch.full((2,), min(6, layer.attention.window - 1))
    _, after = layer.advance(random_tokens(2, 2, seed=5), state, filled, torch.tensor([0, 2]))
    for role, value in after.items():
        assert torch.equal(value[0], state[role][0]), role
    assert not torch.equal(after["pending"][1], state["pending"][1])


@torch.no_grad()
def test_without_consolidation_a_commit_only_copies() -> None:
    layer = make_layer(consolidate_every=0)
    _, state = run(layer, random_tokens(2, 3), layer.initial_state(2), [3])
    after = layer.commit(state, torch.tensor([True, True]))
    assert torch.equal(after["bank"], state["pending"])
    assert torch.equal(after["pending"], state["pending"])
    assert not [name for name, _ in layer.named_parameters() if "propagator" in name or "bank_norm" in name]


@torch.no_grad()
def test_only_the_lanes_whose_turn_it_is_are_consolidated() -> None:
    layer = make_layer(consolidate_every=3, gate_type="lstm")
    _, state = run(layer, random_tokens(2, 3), layer.initial_state(2), [3])
    after = layer.commit(state, torch.tensor([True, True]), torch.tensor([False, True]))
    assert torch.equal(after["bank"][0], state["pending"][0])
    assert torch.equal(after["cell"][0], state["cell"][0])
    assert not bool((after["bank"][1] == state["pending"][1]).any())
    assert not bool((after["cell"][1] == state["cell"][1]).any())


@torch.no_grad()
def test_the_trace_rises_for_a_slot_that_is_written_and_falls_for_the_others() -> None:
    """Towards x / (1 + x), x the slot's part of what was written over an even share: 5 / 6 and 0 here."""
    layer = make_layer().float()
    layer.manager.importance.zero_()
    state = layer.initial_state(1)
    state["written"] = torch.tensor([[0.0, 4.0, 0.0, 0.0, 0.0]])
    for _ in range(200):
        state = {**layer.commit(state, torch.tensor([True])), "written": state["written"]}
        assert bool((state["importance"] > 0).all())
        assert bool((state["importance"] < 1).all())
    assert_close(state["importance"], torch.tensor([[0.0, 5 / 6, 0.0, 0.0, 0.0]]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_even_share_is_an_importance_of_a_half_and_silence_moves_nothing() -> None:
    layer = make_layer(initial_states=4).float()
    layer.manager.importance.zero_()
    state = layer.initial_state(1)
    state["written"] = torch.tensor([[0.7, 0.7, 0.7, 0.7, 9.0]])  # what a masked slot holds does not count
    after = layer.commit(state, torch.tensor([True]))
    assert_close(after["importance"][:, :4], torch.full((1, 4), 0.5), rtol=1e-5, atol=0)
    after["importance"] = torch.tensor([[0.2, 0.4, 0.6, 0.8, 0.5]])
    silent = layer.commit(after, torch.tensor([True]))
    assert torch.equal(silent["importance"], after["importance"])


@pytest.mark.parametrize("batch", [1, 3])
def test_the_initial_state_is_what_the_specs_declare(layer: NSMLayer, batch: int) -> None:
    layer = layer.float()
    state, specs = layer.initial_state(batch), layer.state_specs("7", batch)
    assert [spec.name for spec in specs] == [f"7.{role}" for role in state]
    learned = {
        "bank": layer.manager.bank,
        "pending": layer.manager.bank,
        "cell": layer.manager.bank,
        "mask": layer.manager.mask,
        "importance": layer.manager.get_importance_scores(),
    }
    for spec, (role, value) in zip(specs, state.items(), strict=True):
        assert value.shape == spec.shape
        assert value.dtype == getattr(torch, spec.dtype)
        assert spec.init == ("learned" if role in learned else "zeros")
        assert torch.equal(value, learned.get(role, torch.zeros((), dtype=value.dtype)).expand(value.shape))


def test_gradients_reach_every_parameter(layer: NSMLayer) -> None:
    tokens = random_tokens(2, 4 * CHUNK + 1)
    output, _ = layer(tokens)
    torch.autograd.backward((output * random_tokens(2, 4 * CHUNK + 1, seed=1)).sum())
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
        assert float(parameter.grad.abs().max()) > 0, name
    bank, importance = layer.manager.bank.grad, layer.manager.importance.grad
    assert bank is not None
    assert importance is not None
    assert torch.equal(bank.abs().sum(-1) > 0, layer.manager.mask)
    assert torch.equal(importance.abs() > 0, layer.manager.mask)


def test_the_learned_part_of_the_initial_state_carries_gradients(layer: NSMLayer) -> None:
    """The trace too, though no output of one layer depends on it: a loss may."""
    state, manager = layer.initial_state(2), layer.manager
    torch.autograd.backward(state["bank"].sum() + state["pending"].sum() + state["importance"].sum())
    bank, importance = manager.bank.grad, manager.importance.grad
    assert bank is not None
    assert importance is not None
    assert_close(bank, torch.full_like(bank, 4.0))
    scores = manager.get_importance_scores()
    assert_close(importance, 2 * scores * (1 - scores))


@torch.no_grad()
def test_forward_changes_nothing_in_the_layer(layer: NSMLayer) -> None:
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer(random_tokens(2, 9))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("state_dim", [2, 3, 31, 33, 64, 97])
def test_any_state_dim_and_blocks_of_at_most_32_numbers(state_dim: int) -> None:
    layer = make_layer(state_dim=state_dim)
    blocks = layer.propagator.from_prev.num_blocks
    assert state_dim % blocks == 0
    assert state_dim // blocks <= 32
    assert all(state_dim % fewer or state_dim // fewer > 32 for fewer in range(1, blocks))
    assert layer(random_tokens(1, 5))[1].shape == (1, SLOTS, state_dim)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk_size": 1}, "chunk_size must be at least 2 and window at least chunk_size.*chunk_size=1, window=1"),
        ({"chunk_size": 8, "window": 7}, "window at least chunk_size.*chunk_size=8, window=7"),
        ({"conv_width": 1}, "conv_width must be >= 2, .*given 1, 4, 1"),
        ({"feed_forward": 0}, "feed_forward >= 1, .*given 4, 0, 1"),
        ({"consolidate_every": -1}, "consolidate_every >= 0; given 4, 4, -1"),
        ({"num_heads": 5}, "num_heads must divide token_dim=6; given 5"),
        ({"gate_type": "rnn"}, "gate_type must be one of gru, lstm; given 'rnn'"),
        ({"gate_type": "rnn", "consolidate_every": 0}, "gate_type must be one of gru, lstm; given 'rnn'"),
        ({"gate_blocks": 3}, "num_blocks must divide state_dim=8; given 3"),
        ({"initial_states": 6}, "initial_states must be between 1 and max_states=5; given 6"),
        ({"num_states": 0}, "num_states=0"),
        ({"state_dim": 1}, "state_dim=1"),
    ],
)
def test_what_makes_no_layer_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_layer(**arguments)
