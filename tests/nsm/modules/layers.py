"""One layer as a loop that takes one token at a time, with plain lists and slots written one by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nsm.modules.bank.adaptation import Adaptation
from nsm.modules.bank.propagator import BlockLinear
from nsm.modules.bank.router import MAX_WRITE, TokenToStateRouter
from nsm.modules.layer import NSMLayer
from nsm.modules.memory import Memory
from nsm.modules.protocol import Clock, LayerState
from tests.nsm.modules.bank.by_loop import decide_by_loop
from tests.nsm.variants import stir

CHUNK, DIM, SLOTS = 4, 6, 6


LENGTH = 5 * CHUNK + 3


VARIANTS: dict[str, dict[str, Any]] = {
    "gru": {},
    "lstm": {"gate_type": "lstm"},
    "mingru": {"gate_type": "mingru"},
    "never consolidated": {"consolidate_every": 0},
    "every second chunk, lstm, communication": {"consolidate_every": 2, "gate_type": "lstm", "communication": True},
    "communication, some slots masked": {"communication": True, "initial_states": 3},
    "one bank head": {"routing_heads": 1},
    "small state": {"state_dim": 2},
    "top two": {"routing": "topk", "top_k": 2},
    "wide window, narrow convolution": {"window": 7, "conv_width": 2, "feed_forward": 1},
    "hierarchy": {"hierarchy": (2, 3), "consolidate_every": 0},
    "hierarchy, mingru": {"hierarchy": (2,), "gate_type": "mingru"},
    "memory": {"memory_rows": 3},
    "adaptation": {"adaptation": Adaptation(0.3, 0.35, 0.5), "initial_states": 4},
    "adaptation, lstm": {"adaptation": Adaptation(0.3, 0.35, 0.5), "initial_states": 4, "gate_type": "lstm"},
    "both ways": {"causal": False, "window": 6},
    "both ways, memory": {"causal": False, "memory_rows": 2, "initial_states": 4},
}


causal_only = [name for name, changes in VARIANTS.items() if changes.get("causal", True)]


def make_layer(**changes: Any) -> NSMLayer:
    """In float64, so that a difference from the loop is an error and not rounding; with all weights random."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"state_dim": 8, "num_heads": 2, "num_states": SLOTS, "chunk_size": CHUNK, **changes}
    layer = NSMLayer(token_dim=DIM, **arguments)
    stir(layer)
    return layer.double()


def random_tokens(lanes: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(lanes, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def routed(router: TokenToStateRouter, token: Tensor, allowed: list[bool]) -> Tensor:
    """Write weights [R, S] of one token: gate times softmax over the slots that are allowed."""
    slots, rows = router.num_states, []
    for head in range(router.num_heads):
        scores = [float(router.score.weight[head * slots + slot] @ token) for slot in range(slots)]
        chosen = [slot for slot in range(slots) if allowed[slot]]
        if router.top_k is not None:
            chosen = sorted(chosen, key=[-score for score in scores].__getitem__)[: router.top_k]
        gate = MAX_WRITE * torch.sigmoid(router.gate.weight[head] @ token + router.gate.bias[head])
        row = token.new_zeros(slots)
        row[chosen] = gate * torch.tensor([scores[slot] for slot in chosen], dtype=token.dtype).softmax(0)
        rows.append(row)
    return torch.stack(rows)


def written(bank: Tensor, weights: Tensor, value: Tensor) -> Tensor:
    """slot <- (1 - w) * slot + w * value, number by number: head r owns the r-th part of both halves."""
    dim, heads = bank.shape[1], weights.shape[0]
    owner = [(number % (dim // 2)) // (dim // 2 // heads) for number in range(dim)]
    result = bank.clone()
    for slot in range(bank.shape[0]):
        for number in range(dim):
            w = weights[owner[number], slot]
            result[slot, number] = (1 - w) * bank[slot, number] + w * value[number]
    return result


@dataclass
class Stream:
    """One lane of one layer, chunk by chunk and token by token."""

    layer: NSMLayer
    mask: list[bool]
    bank: Tensor
    cell: Tensor
    importance: list[float]
    memory: Memory | None
    inputs: list[Tensor] = field(default_factory=list)
    """The normed inputs, from the start of the stream."""
    mixed: list[Tensor] = field(default_factory=list)
    chunks: int = 0

    @classmethod
    def start(cls, layer: NSMLayer, bank: Tensor | None = None, mask: Tensor | None = None) -> Stream:
        manager = layer.manager
        active = manager.mask if mask is None else mask
        initial = torch.where(manager.mask[:, None], manager.bank, 0.0)
        memory: Memory | None = None
        if layer.memory is not None:
            zeros = initial.new_zeros(1, layer.memory.rows)
            empty = zeros.unsqueeze(-1).expand(-1, -1, DIM)
            memory = (empty, empty, zeros, torch.zeros(1, dtype=torch.int64))
        importance = torch.sigmoid(manager.importance).tolist()
        return cls(layer, active.tolist(), initial if bank is None else bank, initial, importance, memory)

    def run(self, tokens: Tensor) -> Tensor:
        """A sequence [T, d], whose last chunk may stay open."""
        return torch.cat([self.take(list(chunk)) for chunk in tokens.split(CHUNK)])

    def take(self, chunk: list[Tensor]) -> Tensor:
        layer, first = self.layer, len(self.inputs)
        for token in chunk:
            self.inputs.append(layer.norm(token))
            self.mixed.append(self.mix(len(self.inputs) - 1))
        mixed = self.mixed[first:]
        fast = self.mask[: layer.written_slots]
        weights = [routed(layer.router, token, fast) for token in mixed]
        bank = self.bank
        for token, weight in zip(mixed, weights, strict=True):
            fastest = written(bank[: layer.written_slots], weight, layer.router.value.weight @ token)
            bank = torch.cat([fastest, bank[layer.written_slots :]])
        outputs = []
        for place, token in enumerate(chunk, first):
            last = place if layer.causal else first + len(chunk) - 1
            found = self.read(self.mixed[place], self.bank if layer.causal else bank)
            fused = layer.attention.fuse.weight @ torch.cat([self.attend(place, last), found])
            if layer.memory is not None and self.memory is not None:
                fused = fused + layer.memory.read(self.mixed[place].view(1, 1, DIM), self.memory)[0, 0]
            output = token + fused
            outputs.append(output + layer.feed_forward(layer.forward_norm(output)))
        self.opened = bank
        if len(chunk) == CHUNK:
            self.bank = bank
            self.end_chunk(torch.stack(weights, 1), mixed)
            self.opened = self.bank
        return torch.stack(outputs)

    def mix(self, place: int) -> Tensor:
        """The output of the local mixing at a place, [d]."""
        taps = self.layer.mixing.kernel[:, 0]
        total: Tensor = self.layer.mixing.bias
        for back in range(min(place + 1, self.layer.mixing.width)):
            total = total + taps[:, -1 - back] * self.inputs[place - back]
        return nn.functional.silu(total)

    def attend(self, now: int, last: int) -> Tensor:
        """Over the tokens from the window's first to `last`."""
        local = self.layer.attention.local
        width = DIM // local.num_heads
        seen = list(range(max(0, now - local.window + 1), last + 1))
        made = {place: (local.qkv.weight @ self.mixed[place]).split(DIM) for place in {*seen, now}}
        ahead = 0 if self.layer.causal else CHUNK - 1
        answer = []
        for head in range(local.num_heads):
            part = slice(head * width, (head + 1) * width)
            scores = [
                made[now][0][part] @ made[place][1][part] / width**0.5 + local.bias[head, now - place + ahead]
                for place in seen
            ]
            shares = torch.stack(scores).softmax(0)
            answer.append(torch.stack([s * made[p][2][part] for s, p in zip(shares, seen, strict=True)]).sum(0))
        return torch.cat(answer)

    def read(self, mixed: Tensor, bank: Tensor) -> Tensor:
        attention, half = self.layer.attention, bank.shape[1] // 2
        query, width = attention.read_query.weight @ mixed, half // self.layer.heads
        active = [slot for slot in range(len(self.mask)) if self.mask[slot]]
        prior = torch.sigmoid(self.layer.manager.importance).log()
        answer = []
        for head in range(self.layer.heads):
            part = slice(head * width, (head + 1) * width)
            scores = [query[part] @ bank[slot, :half][part] / width**0.5 + prior[slot] for slot in active]
            shares = torch.stack(scores).softmax(0)
            answer.append(torch.stack([s * bank[n, half:][part] for s, n in zip(shares, active, strict=True)]).sum(0))
        return torch.cat(answer)

    def end_chunk(self, weights: Tensor, mixed: list[Tensor]) -> None:
        """weights [R, C, S1]."""
        layer = self.layer
        self.chunks += 1
        if layer.consolidation.every and self.chunks % layer.consolidation.every == 0:
            self.consolidate()
        for level, (period, router) in enumerate(
            zip(layer.consolidation.hierarchy, layer.consolidation.lift, strict=True)
        ):
            if self.chunks % period == 0:
                assert isinstance(router, TokenToStateRouter)
                self.lift(level, router)
        if layer.adaptation is not None:
            before = self.mask
            self.mask, self.importance, allocated = decide_by_loop(layer.adaptation, before, self.importance, weights)
            for slot, fresh in enumerate(allocated):
                value = layer.manager.bank[slot] if fresh else 0.0 * self.bank[slot]
                if fresh or not self.mask[slot]:
                    self.bank = self.bank.index_put((torch.tensor([slot]),), value)
                    self.cell = self.cell.index_put((torch.tensor([slot]),), value)
        if layer.memory is not None and self.memory is not None:
            self.memory = layer.memory.write(torch.stack(mixed).unsqueeze(0), None, self.memory)

    def consolidate(self) -> None:
        """The gates block by block (a half of a bank head), slot by slot, among the active slots only."""
        propagator, width = self.layer.consolidation.propagator, self.bank.shape[1] // (2 * self.layer.heads)
        bank, cell = self.bank.clone(), self.cell.clone()
        periods = (1, *self.layer.consolidation.hierarchy)
        due = [self.chunks % periods[slot // self.layer.written_slots] == 0 for slot in range(len(self.mask))]
        for slot in (slot for slot, active in enumerate(self.mask) if active and due[slot]):
            for block in range(2 * self.layer.heads):
                here = slice(block * width, (block + 1) * width)
                prev = self.bank[slot, here]
                new = prev / (prev.square().mean() + 1e-6).sqrt() * self.layer.consolidation.bank_norm[block, 0]

                def gates(which: BlockLinear, x: Tensor, block: int = block) -> list[Tensor]:
                    return list((x @ which.weight[block] + which.bias[block, 0]).split(width))

                if propagator.gate_type == "mingru":
                    z = torch.sigmoid(gates(propagator.update, new)[0])
                    bank[slot, here] = (1 - z) * prev + z * gates(propagator.candidate, new)[0]
                    continue
                a, b = gates(propagator.from_new, new), gates(propagator.from_prev, prev)
                if propagator.gate_type == "gru":
                    z = torch.sigmoid(a[2] + b[2])
                    bank[slot, here] = (1 - z) * prev + z * torch.tanh(a[0] + torch.sigmoid(a[1] + b[1]) * b[0])
                    continue
                g, i, f, o = (one + two for one, two in zip(a, b, strict=True))
                kept = torch.sigmoid(f + 3) * self.cell[slot, here]
                cell[slot, here] = kept + torch.sigmoid(i) * torch.tanh(g)
                bank[slot, here] = prev + torch.sigmoid(o) * (torch.tanh(cell[slot, here]) - prev)
        if propagator.enable_communication:
            # The active slots are a smaller bank: the masked ones are not there at all.
            bank[self.mask] = propagator.communicate(bank[self.mask].unsqueeze(0), None)[0]
        self.bank, self.cell = bank, cell

    def lift(self, level: int, router: TokenToStateRouter) -> None:
        """The active slots of one time scale are written, one after the other, into the next slower one."""
        size = self.layer.written_slots
        slower = slice((level + 1) * size, (level + 2) * size)
        result = self.bank[slower]
        for slot in range(level * size, (level + 1) * size):
            if self.mask[slot]:
                token = self.bank[slot]
                result = written(result, routed(router, token, self.mask[slower]), router.value.weight @ token)
        self.bank = torch.cat([self.bank[: slower.start], result, self.bank[slower.stop :]])


def clock(layer: NSMLayer, tokens: int, lanes: int) -> Clock:
    """After so many tokens, with the chunks that are full committed."""
    whole, offset = divmod(tokens, CHUNK)
    values = (min(layer.carried_rows, whole * CHUNK), offset, whole)
    return Clock(*(torch.full((lanes,), value) for value in values))


def scan(layer: NSMLayer, tokens: Tensor, chunks: int) -> tuple[Tensor, LayerState]:
    """Whole chunks, so many a call; the last one may be open."""
    lanes, length = tokens.shape[:2]
    tokens = torch.cat([tokens, random_tokens(lanes, -length % CHUNK, seed=7)], 1)
    state, outputs = layer.initial_state(lanes), []
    for start in range(0, tokens.shape[1], chunks * CHUNK):
        piece = tokens[:, start : start + chunks * CHUNK]
        valid = torch.full((lanes,), min(length - start, piece.shape[1]))
        before = state["mask"]
        output, state, routed_by = layer.scan(piece, state, clock(layer, start, lanes), valid)
        count = piece.shape[1] // CHUNK
        assert routed_by.weights.shape == (lanes, count, layer.heads, CHUNK, layer.written_slots)
        assert routed_by.mask.shape == (lanes, count, SLOTS)
        assert torch.equal(routed_by.mask[:, 0], before)
        outputs.append(output)
    return torch.cat(outputs, 1)[:, :length], state
