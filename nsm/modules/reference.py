"""The Neural State Machine in plain PyTorch, one token of one stream at a time: slow, complete, and easy to check.

Read this file to learn the model. `NSMLayer` computes the same function fast, for many streams, and in a form that
can be exported; the tests compare the two, outputs and state.

Letters
    d   width of a token, `token_dim`          T   tokens of a sequence; t counts them
    D   width of a slot, `state_dim`           C   tokens of a chunk, `chunk_size`
    S   slots of the bank, `num_states`        W   tokens of the attention window, `window`
    S1  slots that tokens write to: S, or the slots of the fastest time scale with a `hierarchy`
    H   attention heads of width e = d / H     R   bank heads of width f = D / (2 R); G = 2 R
    M   rows of the external memory

A bank is [G, S, f]. A slot is one address (the first R of the G parts) and one content (the other R). An inactive
slot takes part in nothing. A stream is cut into chunks of C tokens. Tokens read the *committed* bank, the bank at the
end of the previous chunk, and write to the *pending* bank, which the end of the chunk turns into the committed one.

For each token x_t
     (1) mix         n_t = LayerNorm(x_t);   m_t = SiLU(b + sum_j K_j * n_(t-j)),  j = 0 ... conv_width - 1
     (2) attend      q_t, k_t, v_t = W_qkv m_t
                     a_t = sum_i softmax_i(q_t . k_i / sqrt(e) + B[t - i]) v_i,  i = t - W + 1 ... t, by head  [1, 2]
     (3) read        r_t = sum_s softmax_s(W_r m_t . address_s / sqrt(f) + log sigmoid(rho_s)) content_s, by head  [3]
     (4) recall      c_t = W_c sum_i softmax_i(W_mq m_t . key_i / sqrt(e) + log(filled_i + 1e-6)) value_i, by head
     (5) fuse        y_t = x_t + W_f [a_t; r_t] + c_t
     (6) feed        y_t = y_t + W_2 GELU(W_1 LayerNorm(y_t) + b_1) + b_2
     (7) route       p_t = softmax_s(W_s m_t), by bank head; only the top k scores, or sparsemax, or entmax  [4, 5]
     (8) token gate  g_t = (1 - 2^-10) sigmoid(W_g m_t + b_g), by bank head;   w_t = g_t p_t  [3, 6]
     (9) write       slot_s = (1 - w_ts) slot_s + w_ts W_v m_t
At the end of a chunk
    (10) norm        u = slot / sqrt(mean(slot^2) + 1e-6) * scale
    (11) transition  GRU:     z, r = sigmoid(.);  slot = (1 - z) slot + z tanh(W u + r * (U slot))  [7]
                     LSTM:    i, f, o = sigmoid(.);  cell = f cell + i tanh(.);  slot = (1 - o) slot + o tanh(cell) [8]
                     minGRU:  z = sigmoid(V u);  slot = (1 - z) slot + z W u  [9]
    (12) communicate slot' = slot + sigmoid(l . n) |slot| / sqrt(D) W_o Attention(n),  n = LayerNorm(slot), over the
                     active slots; then slot = slot' |slot| / |slot'|
    (13) lift        with a hierarchy: when a slower time scale is due, the slots of the next faster one are its tokens
                     in (7) - (9)  [10]
    (14) adapt       share_s = w_s N / (w_s N + sum w), N active slots;  trace_s moves towards share_s; a slot below
                     the threshold is pruned, and a free one is allocated if all are busy or the chunk is novel
    (15) memorize    one key and one value, pooled over the chunk, go to the rows that resemble the key or to the oldest

[1] Vaswani et al. 2017. [2] Shaw et al. 2018. [3] Peng et al. 2022 (ABC). [4] Locatello et al. 2020. [5] Martins and
Astudillo 2016; Peters et al. 2019. [6] Zhang et al. 2024 (gated slot attention). [7] Cho et al. 2014. [8] Hochreiter
and Schmidhuber 1997. [9] Feng et al. 2024. [10] Koutnik et al. 2014. Chunks and banks: Hutchins et al. 2022.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, silu

from nsm.modules.bank import Adaptation, Consolidation, StatePropagator, TokenToStateRouter
from nsm.modules.layer import NSMLayer
from nsm.modules.memory import Memory
from nsm.modules.ops import entmax15, sparsemax


class ReferenceLayer:
    """One stream through a layer, from the bank [S, D] and the active slots [S] bool; by default those of the layer."""

    def __init__(self, layer: NSMLayer, bank: Tensor | None = None, mask: Tensor | None = None) -> None:
        self.layer, manager = layer, layer.manager
        learned = torch.where(manager.mask[:, None], manager.bank, 0.0)  # [S, D]
        self.mask = manager.mask if mask is None else mask  # [S]
        self.bank = self._split(learned if bank is None else bank)  # [G, S, f], committed
        self.pending = self.bank  # [G, S, f]
        self.cell = self._split(learned)  # [G, S, f], of an LSTM
        self.importance = torch.sigmoid(manager.importance)  # [S]
        initial = layer.initial_state(1)
        self.memory = None if layer.memory is None else Memory(*(initial[f"memory_{name}"] for name in Memory._fields))
        self.normed: list[Tensor] = []  # n_t [d], from the start of the stream
        self.mixed: list[Tensor] = []  # m_t [d]
        self.weights: list[Tensor] = []  # w_t [R, S1] of the open chunk
        self.chunks = 0

    def run(self, tokens: Tensor) -> Tensor:
        """Tokens [T, d] of a stream that stands at the beginning of a chunk -> outputs [T, d]."""
        outputs = []
        for chunk in tokens.split(self.layer.chunk_size):
            first = len(self.mixed)
            for x in chunk:
                self.write(x)
            for t, x in enumerate(chunk, first):
                # Else a token sees its whole chunk, and the bank after the writes of the chunk.
                after, bank = (t + 1, self.bank) if self.layer.causal else (first + len(chunk), self.pending)
                outputs.append(self.output(x, t, after, bank))
            if len(self.weights) == self.layer.chunk_size:
                self.commit()
        return torch.stack(outputs)

    def write(self, x: Tensor) -> None:
        """(1) and (7) - (9): mix the next token x [d] and write it to the pending bank."""
        layer = self.layer
        self.normed.append(layer.norm(x))
        recent = torch.stack(self.normed[-layer.mixing.width :], 1)  # [d, N], N up to conv_width
        self.mixed.append(silu(layer.mixing.bias + (layer.mixing.kernel[:, 0, -recent.shape[1] :] * recent).sum(1)))
        fast = layer.written_slots  # S1
        written, w = write(layer.router, self.mixed[-1], self.pending[:, :fast], self.mask[:fast])
        self.pending = torch.cat([written, self.pending[:, fast:]], 1)
        self.weights.append(w)

    def output(self, x: Tensor, t: int, after: int, bank: Tensor) -> Tensor:
        """(2) - (6) for token x [d] at place t, which sees the places before `after` and `bank` [G, S, f]."""
        layer = self.layer
        y = x + layer.attention.fuse.weight @ torch.cat([self._attend(t, after), self._read(self.mixed[t], bank)])
        if layer.memory is not None and self.memory is not None:
            y = y + layer.memory.read(self.mixed[t].view(1, 1, -1), self.memory)[0, 0]  # (4)
        return cast("Tensor", y + layer.feed_forward(layer.forward_norm(y)))

    def _attend(self, t: int, after: int) -> Tensor:
        """(2): [d]."""
        local = self.layer.attention.local
        places = list(range(max(0, t - local.window + 1), after))  # N of them
        projected = torch.stack([local.qkv.weight @ self.mixed[i] for i in places])  # [N, 3 d]
        k, v = (part.unflatten(-1, (local.num_heads, -1)) for part in projected.chunk(3, -1)[1:])  # [N, H, e]
        q = (local.qkv.weight @ self.mixed[t]).chunk(3)[0].unflatten(0, (local.num_heads, -1))  # [H, e]
        ahead = 0 if self.layer.causal else self.layer.chunk_size - 1
        bias = torch.stack([local.bias[:, t - i + ahead] for i in places])  # [N, H]
        scores = torch.einsum("he,nhe->nh", q, k) / q.shape[-1] ** 0.5 + bias
        return torch.einsum("nh,nhe->he", scores.softmax(0), v).flatten()

    def _read(self, m: Tensor, bank: Tensor) -> Tensor:
        """(3): [D / 2]."""
        address, content = bank[:, self.mask].chunk(2)  # [R, N, f], of the N active slots
        q = (self.layer.attention.read_query.weight @ m).unflatten(0, (self.layer.heads, -1))  # [R, f]
        prior = logsigmoid(self.layer.manager.importance[self.mask])  # [N]
        scores = torch.einsum("rf,rnf->rn", q, address) / q.shape[-1] ** 0.5 + prior
        return torch.einsum("rn,rnf->rf", scores.softmax(-1), content).flatten()

    def commit(self) -> None:
        """(10) - (15): end the chunk."""
        layer = self.layer
        self.chunks += 1
        self.bank, self.cell = self.pending.clone(), self.cell.clone()
        if layer.consolidation.every and self.chunks % layer.consolidation.every == 0:
            self._consolidate(layer.consolidation)
        for level, period in enumerate(layer.consolidation.hierarchy):
            if self.chunks % period == 0:
                self._lift(level, cast("TokenToStateRouter", layer.consolidation.lift[level]))
        if layer.adaptation is not None:
            w = torch.stack(self.weights, 1)  # [R, C, S]
            self.mask, self.importance, allocated = adapt(layer.adaptation, self.mask, self.importance, w)
            fresh = self._split(layer.manager.bank)
            for bank in (self.bank, self.cell):
                bank[:, ~self.mask], bank[:, allocated] = 0.0, fresh[:, allocated]
        if layer.memory is not None and self.memory is not None:
            chunk = torch.stack(self.mixed[-layer.chunk_size :])  # [C, d]
            self.memory = layer.memory.write(chunk[None], None, self.memory)  # (15)
        self.pending, self.weights = self.bank, []

    def _consolidate(self, part: Consolidation) -> None:
        """(10) - (12), for the active slots of the time scales that are due."""
        periods = torch.tensor([1, *part.hierarchy]).repeat_interleave(part.level_size)  # [S]
        slot, cell = self.bank[:, self.mask], self.cell[:, self.mask]  # [G, N, f]
        u = slot / (slot.square().mean(-1, keepdim=True) + 1e-6).sqrt() * part.bank_norm
        slot, cell = transition(part.propagator, slot, u, cell)
        if part.propagator.enable_communication:
            slot = self._split(communicate(part.propagator, slot.transpose(0, 1).flatten(1)))
        due = (self.chunks % periods == 0)[self.mask]  # [N]
        self.bank[:, self.mask] = torch.where(due[:, None], slot, self.bank[:, self.mask])
        self.cell[:, self.mask] = torch.where(due[:, None], cell, self.cell[:, self.mask])

    def _lift(self, level: int, router: TokenToStateRouter) -> None:
        """(13): the slots of a time scale are tokens for the next slower one."""
        size = self.layer.written_slots
        slower = slice((level + 1) * size, (level + 2) * size)
        for s in range(level * size, (level + 1) * size):
            if self.mask[s]:
                token = self.bank[:, s].flatten()  # [D]
                self.bank[:, slower] = write(router, token, self.bank[:, slower], self.mask[slower])[0]

    def _split(self, states: Tensor) -> Tensor:
        """[S, D] -> [G, S, f]."""
        return states.view(len(states), 2 * self.layer.heads, -1).transpose(0, 1)


def route(router: TokenToStateRouter, m: Tensor, mask: Tensor) -> Tensor:
    """(7) and (8): the write weights w [R, S] of a token m, zero for inactive slots."""
    scores = (router.score.weight @ m).unflatten(0, (router.num_heads, -1))[:, mask]  # [R, N]
    if router.top_k is not None:
        lowest = scores.topk(min(router.top_k, scores.shape[-1])).values[:, -1:]  # [R, 1]
        scores = scores.masked_fill(scores < lowest, -torch.inf)
    p = {"sparsemax": sparsemax, "entmax": entmax15}.get(router.routing, torch.nn.Softmax(-1))(scores)
    g = (1 - 2**-10) * torch.sigmoid(router.gate.weight @ m + router.gate.bias)  # [R]
    w = p.new_zeros(len(p), len(mask))
    w[:, mask] = g[:, None] * p
    return w


def write(router: TokenToStateRouter, m: Tensor, bank: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(7) - (9): token m written to a bank [G, S, f]; the bank after it and w [R, S]."""
    w = route(router, m, mask)
    value = (router.value.weight @ m).unflatten(0, (len(bank), 1, -1))  # [G, 1, f]
    both = torch.cat([w, w])[..., None]  # [G, S, 1]: addresses and contents alike
    return (1 - both) * bank + both * value, w


def transition(gates: StatePropagator, slot: Tensor, u: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """(11), in blocks: slot, u and cell [G, N, f] -> slot and cell."""
    if gates.gate_type == "mingru":
        z = torch.sigmoid(gates.update(u))
        return (1 - z) * slot + z * gates.candidate(u), cell
    if gates.gate_type == "gru":
        (wu, ru, zu), (us, rs, zs) = gates.from_new(u).chunk(3, -1), gates.from_prev(slot).chunk(3, -1)
        z, r = torch.sigmoid(zu + zs), torch.sigmoid(ru + rs)
        return (1 - z) * slot + z * torch.tanh(wu + r * us), cell
    g, i, f, o = (gates.from_new(u) + gates.from_prev(slot)).chunk(4, -1)
    i, f, o = torch.sigmoid(i), torch.sigmoid(f + 3), torch.sigmoid(o)  # + 3: an untrained cell is kept
    cell = f * cell + i * torch.tanh(g)
    return (1 - o) * slot + o * torch.tanh(cell), cell


def communicate(gates: StatePropagator, slots: Tensor) -> Tensor:
    """(12): the N active slots [N, D] attend to each other."""
    n = gates.norm(slots)
    q, k, v = gates.qkv(n).unflatten(-1, (3, gates.num_heads, -1)).unbind(1)  # [N, heads, D / heads]
    scores = torch.einsum("qhe,khe->hqk", q, k) / q.shape[-1] ** 0.5
    heard = torch.einsum("hqk,khe->qhe", scores.softmax(-1), v).flatten(1)  # [N, D]
    norm: Tensor = torch.linalg.vector_norm(slots, dim=-1, keepdim=True)
    turned = slots + torch.sigmoid(gates.listen(n)) * norm / slots.shape[-1] ** 0.5 * gates.out(heard)
    return cast("Tensor", norm * turned / (torch.linalg.vector_norm(turned, dim=-1, keepdim=True) + 1e-6))


def adapt(rule: Adaptation, mask: Tensor, importance: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(14), from the write weights w [R, C, S] of a chunk: mask, importance, and the allocated slot, [S] each."""
    mass = w.mean(0).sum(0)  # [S]
    total, active = mass.sum(), int(mask.sum())
    share = mass * active / (mass * active + total + 1e-6)
    trace = importance + torch.where(mask, 0.1 * total / w.shape[1] * (share - importance), 0.02 * (0.5 - importance))
    kept = mask & (trace >= rule.prune_threshold)
    kept[torch.where(mask, trace, -1.0).argmax()] = True  # the most important slot always stays
    busy = bool(trace[kept].min() > rule.allocate_threshold)
    novel = bool(w.amax(-1).mean(0).sum() < (1 - rule.novelty_threshold) * total) and bool(total > 1e-3)
    allocated = torch.zeros_like(mask)
    rested = (~mask & (trace > 0.4)).nonzero().flatten()
    if len(rested) and (busy or novel):
        allocated[rested[0]] = True
    return kept | allocated, torch.where(allocated, 0.5, trace), allocated


def run_stack(embed: torch.nn.Module, layers: list[NSMLayer], head: torch.nn.Module, tokens: Tensor) -> Tensor:
    """A whole model on one stream: embed tokens [T] or [T, input_dim], each layer in turn, norm and linear head."""
    x: Tensor = embed(tokens)
    for layer in layers:
        x = ReferenceLayer(layer).run(x)
    return cast("Tensor", head(x))
