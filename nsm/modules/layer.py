"""NSMLayer: mix, attend, read, feed forward, route and write tokens; consolidate at the end of a chunk.

Equations (1) - (15) of the reference, which computes the same token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nsm.errors import ConfigError, InputError
from nsm.modules.attention import Heads, HybridAttention
from nsm.modules.bank import Adaptation, Consolidation, GateType, Routing, StateManager, TokenToStateRouter
from nsm.modules.memory import ExternalMemory, Memory
from nsm.modules.mixing import LocalMixing
from nsm.modules.ops import (
    FusedLinear,
    chunks,
    clear_lanes,
    count_tokens,
    keep_open,
    merge_chunks,
    select_lanes,
    slots_of,
    to_bank,
    to_states,
)
from nsm.modules.protocol import Clock, LayerState, Routed
from nsm.spec import StateSpec


class _Projected(NamedTuple):
    """Projections of N runs of T tokens."""

    mixed: Tensor  # [N, T, d]
    heads: Heads  # [N, H, T, e]
    query: Tensor  # [N, R, T, f]
    values: Tensor  # [N, G, T, f]
    scores: Tensor  # [N, R, T, S1]
    gate: Tensor  # [N, R, T, 1]


class NSMLayer(nn.Module):
    """One layer of a Neural State Machine.

    Letters: B lanes, T tokens, C = `chunk_size`, n chunks, W = `window`, S = `num_states`, D = `state_dim`,
    d = `token_dim`, H heads of e = d / H, R bank heads of f = D / (2 R), G = 2 R, P the carried rows of the window.

    Tokens read the *committed* bank, the bank at the end of the previous chunk. Their writes are stored in the open
    chunk until it is full; then they are applied, the bank is consolidated, and the result is the committed bank. So
    the state does not depend on how a stream is split into calls. `scan` processes whole chunks, `decode` one token,
    `commit` ends a chunk after its decodes. The layer is causal by default. With `causal=False`, tokens see their
    whole chunk and the bank after its writes, and there is no `decode`.

    State by role, B lanes on axis 0 each:
        bank [B, G, S, f]; mask [B, S] bool; key, value [B, H, P, e]; tail [B, conv_width - 1, d];
        the open chunk, zero from its offset on: open_key, open_value [B, H, C, e]; open_write [B, G, C, f], the
        values to write; open_weight [B, R, C, S], the write weights;
        cell like bank for gate_type="lstm"; importance [B, S] with `adaptation`; memory_* with `memory_rows`,
        and open_mixed [B, C, d] then.

    Args:
        routing_heads: R, bank heads, for routing, writing and reading.
        routing, top_k: the map from scores to weights; see `TokenToStateRouter`.
        consolidate_every: chunks between two runs of the propagator; 0 disables it.
        communication: whether active slots attend to each other in consolidation.
        feed_forward: width of the feed-forward part as a multiple of d.
        hierarchy: periods, in chunks, of slower time scales. Tokens write to the slots of the fastest time scale and
            read all slots; see `Consolidation`.
        adaptation: thresholds for pruning and allocating slots at run time (default: the mask is fixed).
        memory_rows: rows of an external memory, 0 for none.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    def __init__(
        self,
        state_dim: int = 128,
        token_dim: int = 64,
        num_heads: int = 8,
        num_states: int = 16,
        *,
        gate_type: GateType = "gru",
        chunk_size: int = 16,
        window: int | None = None,
        routing_heads: int = 4,
        routing: Routing = "softmax",
        top_k: int | None = None,
        consolidate_every: int = 1,
        communication: bool = False,
        conv_width: int = 4,
        feed_forward: float = 4.0,
        initial_states: int | None = None,
        prune_threshold: float = 0.1,
        hierarchy: Sequence[int] = (),
        adaptation: Adaptation | None = None,
        memory_rows: int = 0,
        causal: bool = True,
    ) -> None:
        super().__init__()
        window = chunk_size if window is None else window
        if chunk_size < 2:
            raise ConfigError(f"chunk_size must be at least 2; given {chunk_size}.")
        if routing_heads < 1:
            raise ConfigError(f"routing_heads must be at least 1; given {routing_heads}.")
        if conv_width < 2 or not isfinite(feed_forward * token_dim) or feed_forward <= 0 or memory_rows < 0:
            raise ConfigError(
                "conv_width must be >= 2, feed_forward finite and > 0, memory_rows >= 0; given "
                f"{conv_width}, {feed_forward}, {memory_rows}."
            )
        if hierarchy and adaptation is not None:
            raise ConfigError("A hierarchy has banks of fixed sizes: leave either hierarchy or adaptation out.")
        self.chunk_size = chunk_size
        self.causal = causal
        self.adaptation = adaptation
        self.norm = nn.LayerNorm(token_dim)
        self.mixing = LocalMixing(token_dim, conv_width)
        self.attention = HybridAttention(
            token_dim, state_dim, num_heads, window, chunk_size, bank_heads=routing_heads, causal=causal
        )
        self.heads = self.attention.bank_heads
        hidden = max(1, round(feed_forward * token_dim))
        self.forward_norm = nn.LayerNorm(token_dim)
        self.feed_forward = nn.Sequential(nn.Linear(token_dim, hidden), nn.GELU(), nn.Linear(hidden, token_dim))
        self.consolidation = Consolidation(
            state_dim,
            num_states,
            self.heads,
            every=consolidate_every,
            hierarchy=hierarchy,
            gate_type=gate_type,
            communication=communication,
        )
        self.written_slots = self.consolidation.level_size
        self.router = TokenToStateRouter(
            token_dim, state_dim, self.written_slots, self.heads, routing=routing, top_k=top_k
        )
        self.projection = FusedLinear()
        self.manager = StateManager(state_dim, num_states, initial_states, prune_threshold)
        self.memory = ExternalMemory(token_dim, memory_rows, token_dim, num_heads) if memory_rows else None

    # -- declaration ---------------------------------------------------------------------------------------------

    @property
    def carried_rows(self) -> int:
        """P, rows of the window before the open chunk."""
        return self.attention.local.rows

    @property
    def periods(self) -> tuple[int, ...]:
        """The periods, in chunks, that are longer than one chunk."""
        return self.consolidation.periods

    @property
    def routing_shape(self) -> tuple[int, int]:
        """R and S1: bank heads, and the slots of the fastest time scale, which tokens write to."""
        return self.heads, self.written_slots

    @property
    def adapts(self) -> bool:
        """Whether the mask changes at run time."""
        return self.adaptation is not None

    def state_specs(self, prefix: str, batch: int) -> list[StateSpec]:
        """The layer's states, named `{prefix}.{role}`."""
        slots, dim = self.manager.bank.shape
        width, d = self.mixing.width - 1, self.norm.normalized_shape[0]
        chunk, bank = self.chunk_size, (batch, 2 * self.heads, slots, dim // (2 * self.heads))
        shapes: list[tuple[str, tuple[int, ...], str, bool]] = [
            ("bank", bank, "float32", True),
            ("mask", (batch, slots), "bool", True),
            ("tail", (batch, width, d), "float32", False),
            ("open_write", (*bank[:2], chunk, bank[-1]), "float32", False),
            ("open_weight", (batch, self.heads, chunk, self.written_slots), "float32", False),
        ]
        if self.consolidation.has_cell:
            shapes.append(("cell", bank, "float32", True))
        if self.adaptation is not None:
            shapes.append(("importance", (batch, slots), "float32", True))
        if self.memory is not None:
            memory = self.memory
            shapes += [
                ("memory_key", (batch, memory.rows, memory.key_dim), "float32", False),
                ("memory_value", (batch, memory.rows, d), "float32", False),
                ("memory_filled", (batch, memory.rows), "float32", False),
                ("memory_next", (batch,), "int64", False),
                ("open_mixed", (batch, chunk, d), "float32", False),
            ]
        own = [
            StateSpec(f"{prefix}.{role}", shape, dtype, init="learned" if learned else "zeros")
            for role, shape, dtype, learned in shapes
        ]
        return own + self.attention.local.state_specs(prefix, batch)

    def touched(self, entry: str, roles: Sequence[str], partial: bool) -> tuple[list[str], list[str]]:
        """Roles that an entry reads and writes; `partial`: whether `step` may end inside a chunk."""
        opened = [role for role in roles if role.startswith("open_")]
        settled = [role for role in roles if role not in (*opened, "tail")]
        changed = [role for role in settled if self.adaptation is not None or role != "mask"]
        if entry == "decode":
            return [role for role in roles if role not in ("cell", "importance", "memory_next")], ["tail", *opened]
        if entry == "commit":
            return [*settled, *opened], [*changed, *opened]
        return [*settled, "tail", *(opened if partial else ())], [*changed, "tail", *(opened if partial else ())]

    def initial_state(self, batch: int) -> LayerState:
        """The state at the beginning of a stream; gradients reach the learned part."""
        manager = self.manager
        bank = to_bank(manager.bank.unsqueeze(0), self.heads)
        learned = {
            "bank": torch.where(manager.mask[:, None], bank, 0.0),
            "mask": manager.mask.unsqueeze(0),
            "importance": manager.initial_importance().unsqueeze(0),
            "cell": torch.where(manager.mask[:, None], bank, 0.0),
        }
        state = {}
        for spec in self.state_specs("", batch):
            role = spec.name[1:]
            dtype = torch.int64 if spec.dtype == "int64" else manager.bank.dtype
            state[role] = (
                learned[role].expand(spec.shape)
                if spec.init == "learned"
                else torch.zeros(spec.shape, dtype=dtype, device=manager.bank.device)
            )
        return state

    # -- running -------------------------------------------------------------------------------------------------

    def scan(
        self, tokens: Tensor, state: LayerState, clock: Clock, valid: Tensor | None = None
    ) -> tuple[Tensor, LayerState, Routed]:
        """Process whole chunks, from the beginning of a chunk.

        Args:
            tokens: [B, n * C, d].
            state: by role.
            clock: positions of the lanes.
            valid: [B], the number of valid tokens of each lane (default: all). A lane that ends inside a chunk leaves
                the chunk open; a lane with 0 keeps its state.

        Returns:
            The output [B, n * C, d], the new state, and the routing.
        """
        batch, length, dim = tokens.shape
        size = self.chunk_size
        count = length // size
        counted = None if valid is None else count_tokens(valid, count, size)
        mixed, tail = self.mixing(self.norm(tokens), state["tail"], valid)
        made = self._project(mixed.reshape(batch * count, size, dim))
        local, window = self.attention.local.scan(made.heads, state, clock.filled, counted)

        # From here, one chunk after the other: a chunk reads the bank that the previous one left.
        settled = {role: value for role, value in state.items() if not role.startswith("open_")}
        mixed_chunks, *chunked = (chunks(part, count) for part in (made.mixed, made.values, made.scores, made.gate))
        routed = None
        if self.adaptation is None:
            mask = self._routed_mask(state)
            mask = mask if count == 1 else mask.repeat_interleave(count, 0)
            routed = chunks(self.router.weights(made.scores, mask), count)
        banks, masks_read, recalled, routings, writes = [], [], [], [], []
        for index, (values, scores, gate) in enumerate(zip(*chunked, strict=True)):
            routing = routed[index] if routed is not None else self.router.weights(scores, settled["mask"])
            weights = routing * gate
            if counted is not None:
                weights = torch.where(counted.tokens[:, index, None, :, None], weights, 0.0)
            routings.append(routing)
            writes.append(weights)
            before = settled
            settled = self._settle(
                before,
                weights,
                values,
                None if clock.chunk is None else clock.chunk + index + 1,
                None if counted is None else counted.full[:, index],
                mixed_chunks[index],
                None if counted is None else counted.tokens[:, index],
            )
            read_from = before if self.causal else self._written(before, weights, values)
            banks.append(read_from["bank"])
            masks_read.append(before["mask"])
            if self.memory is not None:
                recalled.append(self.memory.read(mixed_chunks[index], _memory_of(before)))

        bank, mask = merge_chunks(banks), merge_chunks(masks_read)
        read = self.attention.read(made.query, bank, mask, self.manager.importance)
        output = self.attention.combine(local, read).reshape(batch, length, dim)
        if recalled:
            output = output + torch.cat(recalled, 1)
        result = {**state, **settled, **window, "tail": tail}
        if counted is not None:
            opened = {"open_write": made.values, "open_weight": merge_chunks(writes)}
            if self.memory is not None:
                opened["open_mixed"] = made.mixed
            result |= {role: keep_open(counted.opened, part, state[role]) for role, part in opened.items()}
        routed_by = Routed(torch.stack(routings, 1), torch.stack(masks_read, 1))
        return self._feed_forward(tokens + output), result, routed_by

    def decode(
        self, tokens: Tensor, state: LayerState, clock: Clock, valid: Tensor | None = None
    ) -> tuple[Tensor, LayerState, Tensor]:
        """Process one token per lane, in a chunk that is not full.

        Args:
            tokens: [B, 1, d].
            state, clock: as for `scan`.
            valid: [B], 1 for a lane with a token, 0 for a lane without (default: 1).

        Returns:
            The output [B, 1, d], the new state, and the routing weights [B, R, 1, S1].
        """
        mixed, tail = self.mixing(self.norm(tokens), state["tail"], valid)
        made = self._project(mixed)
        attended, opened = self.attention.local.decode(made.heads, state, clock.filled, clock.offset, valid)
        routing = self.router.weights(made.scores, self._routed_mask(state))
        here = torch.arange(self.chunk_size, device=tokens.device) == clock.offset[:, None]
        if valid is not None:
            here = here & (valid > 0)[:, None]
        row = here[:, None, :, None]
        opened["open_write"] = torch.where(row, made.values, state["open_write"])
        opened["open_weight"] = torch.where(row, routing * made.gate, state["open_weight"])
        read = self.attention.read(made.query, state["bank"], state["mask"], self.manager.importance)
        output = self.attention.combine(attended, read)
        if self.memory is not None:
            output = output + self.memory.read(mixed, _memory_of(state))
            opened["open_mixed"] = torch.where(here.unsqueeze(-1), mixed, state["open_mixed"])
        return self._feed_forward(tokens + output), {**state, **opened, "tail": tail}, routing

    def commit(self, state: LayerState, full: Tensor, clock: Clock) -> LayerState:
        """End the chunk on the lanes [B] bool where it is full; the other lanes keep their state."""
        settled = {role: value for role, value in state.items() if not role.startswith("open_")}
        settled = self._settle(
            settled,
            state["open_weight"],
            state["open_write"],
            None if clock.chunk is None else clock.chunk + 1,
            full,
            state.get("open_mixed"),
            None,
        )
        opened = {role: part for role, part in state.items() if role in ("open_write", "open_weight", "open_mixed")}
        opened = {role: clear_lanes(full, part) for role, part in opened.items()}
        return {**state, **settled, **opened, **self.attention.local.commit(state, full)}

    def forward(
        self, tokens: Tensor, states: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Process a whole sequence from the beginning of a stream.

        Args:
            tokens: [B, T, d].
            states: [B, S, D], the initial bank (default: the learned one).
            mask: [B, S] bool, the active slots (default: the manager's).

        Returns:
            output [B, T, d]; states [B, S, D], the bank after the last token.

        Raises:
            InputError: wrong shape of tokens, states or mask, or a mask that is not bool.
        """
        self._check_forward(tokens, states, mask)
        batch, length, dim = tokens.shape
        state = self.initial_state(batch)
        if states is not None:
            state["bank"] = to_bank(states, self.heads)
        if mask is not None:
            state["mask"] = mask
        missing = -length % self.chunk_size
        padded = torch.cat([tokens, tokens.new_zeros(batch, missing, dim)], 1)
        zero = torch.zeros(batch, dtype=torch.int64, device=tokens.device)
        clock = Clock(zero, zero, zero if self.periods else None)
        valid = torch.full_like(zero, length) if missing else None
        output, state, _ = self.scan(padded, state, clock, valid)
        if missing:
            state = self._written(state, state["open_weight"], state["open_write"])
        return output[:, :length], to_states(state["bank"])

    def _check_forward(self, tokens: Tensor, states: Tensor | None, mask: Tensor | None) -> None:
        (slots, state_dim), (dim,) = self.manager.bank.shape, self.norm.normalized_shape
        if tokens.dim() != 3 or tokens.shape[-1] != dim or 0 in tokens.shape:
            raise InputError(
                f"Expected tokens [B, T, token_dim] = [B, T, {dim}] with B, T >= 1; given {list(tokens.shape)}."
            )
        batch = tokens.shape[0]
        if states is not None and states.shape != (batch, slots, state_dim):
            raise InputError(
                f"Expected states [B, num_states, state_dim] = [{batch}, {slots}, {state_dim}]; given "
                f"{list(states.shape)}."
            )
        if mask is not None and (mask.shape != (batch, slots) or mask.dtype != torch.bool):
            raise InputError(
                f"Expected a bool mask [B, num_states] = [{batch}, {slots}], True for an active slot; given "
                f"{list(mask.shape)} of {mask.dtype}."
            )

    # -- parts ---------------------------------------------------------------------------------------------------

    def _project(self, mixed: Tensor) -> _Projected:
        """Project tokens [N, T, d] to queries, keys, values and write values with one MatMul."""
        attention, router = self.attention, self.router
        made = self.projection(mixed, attention.local.qkv.weight, attention.read_query.weight, router.value.weight)
        return _Projected(mixed, *attention.heads(made), *router.scores(mixed))

    def _routed_mask(self, state: LayerState) -> Tensor:
        """The active slots that tokens write to, [B, S1]: all, or those of the fastest time scale."""
        return state["mask"][:, : self.written_slots] if self.consolidation.hierarchy else state["mask"]

    def _written(self, state: LayerState, weights: Tensor, values: Tensor) -> LayerState:
        """The state after the writes of a chunk, before consolidation."""
        keep, update = self.router.transition(weights, values)
        # The values of inactive slots, however large, are dropped here.
        keep = torch.where(slots_of(self._routed_mask(state)), keep, 0.0)
        bank = state["bank"]
        if self.consolidation.hierarchy:
            slower = torch.where(
                slots_of(state["mask"][:, self.written_slots :]), bank[..., self.written_slots :, :], 0.0
            )
            bank = torch.cat([keep * bank[..., : self.written_slots, :] + update, slower], -2)
        else:
            bank = keep * bank + update
        return {**state, "bank": bank}

    def _settle(
        self,
        state: LayerState,
        weights: Tensor,
        values: Tensor,
        turn: Tensor | None,
        full: Tensor | None,
        mixed: Tensor | None,
        counts: Tensor | None,
    ) -> LayerState:
        """The state after a full chunk: write, consolidate, lift to slower time scales, adapt, write the memory.

        Args:
            weights, values: the write weights [B, R, C, S1] and values [B, G, C, f] of the chunk.
            turn: [B], the index of the chunk, from 1, within the cycle of the model's periods.
            full: [B] bool, the lanes with a full chunk (default: all).
            mixed, counts: the mixed tokens of the chunk [B, C, d] and the valid ones [B, C], for the memory.
        """
        result = self._written(state, weights, values)
        mask = state["mask"]
        bank, cell = self.consolidation(result["bank"], result.get("cell"), mask, turn)
        result |= {"bank": bank} if cell is None else {"bank": bank, "cell": cell}
        if self.adaptation is not None:
            decided = self.adaptation.decide(mask, state["importance"], weights)
            result["mask"], result["importance"], allocated = decided
            fresh = to_bank(self.manager.bank.unsqueeze(0), self.heads)
            for role in ("bank", "cell") if self.consolidation.has_cell else ("bank",):
                kept = torch.where(slots_of(result["mask"]), result[role], 0.0)
                result[role] = torch.where(slots_of(allocated), fresh, kept)
        if self.memory is not None and mixed is not None:
            memory = self.memory.write(mixed, counts, _memory_of(state))
            result |= {f"memory_{name}": part for name, part in memory._asdict().items()}
        if full is None:
            return result
        return {
            role: value if value is state[role] else select_lanes(full, value, state[role])
            for role, value in result.items()
        }

    def _feed_forward(self, tokens: Tensor) -> Tensor:
        # backend: ONNX Runtime fuses the bias of a MatMul with two dimensions only, so tokens are rows [B * T, d].
        fed: Tensor = self.feed_forward(self.forward_norm(tokens).flatten(0, 1))
        return tokens + fed.reshape(tokens.shape)


def _memory_of(state: LayerState) -> Memory:
    return Memory(*(state[f"memory_{name}"] for name in Memory._fields))
