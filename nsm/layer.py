"""NSMLayer: mix, attend, read, feed forward, route, write; and consolidate when a chunk is full."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nsm.attention import HybridAttention
from nsm.errors import ConfigError
from nsm.manager import StateManager
from nsm.mixing import LocalMixing
from nsm.propagator import GATE_TYPES, GateType, StatePropagator
from nsm.router import TokenToStateRouter
from nsm.spec import StateSpec

# The importance trace moves this share of the way at a commit in which every token wrote with full strength.
TRACE_RATE = 0.1

LayerState = dict[str, Tensor]
"""A layer's part of the state by role: bank, pending, mask, importance, written, key, value, tail (and cell)."""


class NSMLayer(nn.Module):
    """One layer of a Neural State Machine.

    Letters: B lanes, T tokens, C = `chunk_size`, W = `window`, S = `num_states`, D = `state_dim`, d = `token_dim`.

    Tokens read the *committed* bank, the bank as it was when the last chunk ended, and are written into the
    *pending* bank. `advance` does this for a run of tokens inside one chunk; `commit` turns the pending bank into
    the committed one when the chunk is full. No token sees a later one.

    State by role, B lanes on axis 0 each:
        bank, pending [B, S, D]; mask [B, S] bool; importance [B, S], the running trace in (0, 1);
        written [B, S], mass written since the last commit; key, value [B, W - 1, d]; tail [B, conv_width - 1, d];
        cell [B, S, D] for gate_type="lstm".

    Args:
        routing_heads: heads of the router. One is cheapest; several learn sooner to keep apart what they remember.
        consolidate_every: the propagator runs every so many chunks; 0 means never (then a commit only copies).
        communication: whether active slots attend to each other when they are consolidated.
        gate_blocks: diagonal blocks of the propagator's matrices; default: blocks of at most 32 numbers.

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
        consolidate_every: int = 1,
        communication: bool = False,
        gate_blocks: int | None = None,
        conv_width: int = 4,
        feed_forward: int = 4,
        initial_states: int | None = None,
        prune_threshold: float = 0.1,
    ) -> None:
        super().__init__()
        window = chunk_size if window is None else window
        if chunk_size < 2 or window < chunk_size:
            raise ConfigError(
                f"chunk_size must be at least 2 and window at least chunk_size, so that what is not yet committed "
                f"is still in the window; given chunk_size={chunk_size}, window={window}."
            )
        if conv_width < 2 or feed_forward < 1 or consolidate_every < 0:
            raise ConfigError(
                "conv_width must be >= 2, feed_forward >= 1, consolidate_every >= 0; given "
                f"{conv_width}, {feed_forward}, {consolidate_every}."
            )
        if communication and not consolidate_every:
            raise ConfigError(
                "Slots communicate when they are consolidated: communication needs consolidate_every >= 1."
            )
        if gate_type not in GATE_TYPES:
            raise ConfigError(f"gate_type must be one of {', '.join(GATE_TYPES)}; given {gate_type!r}.")
        self.chunk_size = chunk_size
        self.consolidate_every = consolidate_every
        self.norm = nn.LayerNorm(token_dim)
        self.mixing = LocalMixing(token_dim, conv_width)
        self.attention = HybridAttention(token_dim, state_dim, num_heads, window, chunk_size)
        self.forward_norm = nn.LayerNorm(token_dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(token_dim, feed_forward * token_dim),
            nn.GELU(),
            nn.Linear(feed_forward * token_dim, token_dim),
        )
        self.router = TokenToStateRouter(token_dim, state_dim, num_states, routing_heads)
        self.manager = StateManager(state_dim, num_states, initial_states, prune_threshold)
        if consolidate_every:
            self.bank_norm = nn.LayerNorm(state_dim)
            self.propagator = StatePropagator(
                state_dim,
                gate_type,
                enable_communication=communication,
                num_heads=self.attention.read_heads,
                num_blocks=_blocks(state_dim) if gate_blocks is None else gate_blocks,
            )
        self.has_cell = bool(consolidate_every) and gate_type == "lstm"

    def state_specs(self, prefix: str, batch: int) -> list[StateSpec]:
        """The layer's states, named `{prefix}.{role}`."""
        slots, dim = self.manager.bank.shape
        width, token_dim = self.mixing.width - 1, self.norm.normalized_shape[0]
        rows = self.attention.window - 1
        bank, per_slot = (batch, slots, dim), (batch, slots)
        shapes: list[tuple[str, tuple[int, ...], str, bool]] = [
            ("bank", bank, "float32", True),
            ("pending", bank, "float32", True),
            ("mask", per_slot, "bool", True),
            ("importance", per_slot, "float32", True),
            ("written", per_slot, "float32", False),
            ("key", (batch, rows, token_dim), "float32", False),
            ("value", (batch, rows, token_dim), "float32", False),
            ("tail", (batch, width, token_dim), "float32", False),
        ]
        if self.has_cell:
            shapes.append(("cell", bank, "float32", True))
        return [
            StateSpec(f"{prefix}.{role}", shape, dtype, init="learned" if learned else "zeros")
            for role, shape, dtype, learned in shapes
        ]

    def initial_state(self, batch: int) -> LayerState:
        """The state at the beginning of a stream; gradients reach the learned part."""
        manager = self.manager
        learned = {
            "bank": manager.bank,
            "pending": manager.bank,
            "mask": manager.mask,
            "importance": torch.sigmoid(manager.importance),
            "cell": manager.bank,
        }
        state = {}
        for spec in self.state_specs("", batch):
            role = spec.name[1:]
            state[role] = (
                learned[role].expand(spec.shape)
                if spec.init == "learned"
                else torch.zeros(spec.shape, dtype=manager.bank.dtype, device=manager.bank.device)
            )
        return state

    def advance(self, tokens: Tensor, state: LayerState, filled: Tensor, valid: Tensor) -> tuple[Tensor, LayerState]:
        """Take a run of tokens that does not reach past the end of the chunk.

        Args:
            tokens: [B, T, d], T <= C.
            state: by role.
            filled: [B], how many rows of the window are there.
            valid: [B], how many of the tokens count. A lane with 0 keeps its state as it was.

        Returns:
            The layer's output [B, T, d] and the state with the tokens written into the pending bank.
        """
        mixed, tail = self.mixing(self.norm(tokens), state["tail"], valid)
        local, key, value = self.attention.local(mixed, state["key"], state["value"], filled, valid)
        read = self.attention.read(mixed, state["bank"], state["mask"], self.manager.importance)
        tokens = tokens + self.attention.combine(local, read)
        tokens = tokens + self.feed_forward(self.forward_norm(tokens))

        weights, gate = self.router.route(mixed, state["mask"])
        counts = torch.arange(tokens.shape[1], device=tokens.device) < valid[:, None]
        weights = torch.where(counts[:, None, :, None], weights * gate, 0.0)
        return tokens, {
            **state,
            "pending": self.router.write(state["pending"], weights, self.router.value(mixed)),
            "written": state["written"] + weights.mean(1).sum(1),
            "key": key,
            "value": value,
            "tail": tail,
        }

    def commit(self, state: LayerState, full: Tensor, consolidate: Tensor | None = None) -> LayerState:
        """End the chunk on the lanes where it is full: consolidate the pending bank and make it the committed one.

        Args:
            state: by role.
            full: [B] bool; the other lanes keep their state as it was.
            consolidate: [B] bool, the lanes on which the propagator runs this time (default: all that are full).
        """
        result = dict(state)
        bank = state["pending"]
        if self.consolidate_every:
            active = state["mask"].unsqueeze(-1)
            prev = torch.where(active, bank, 0.0)
            new = self.bank_norm(prev)
            changes = active if consolidate is None else active & consolidate[:, None, None]
            if self.has_cell:
                cell = torch.where(active, state["cell"], 0.0)
                new_bank, new_cell = self.propagator(prev, new, cell, mask=state["mask"])
                result["cell"] = torch.where(changes & full[:, None, None], new_cell, state["cell"])
            else:
                new_bank = self.propagator(prev, new, mask=state["mask"])
            bank = torch.where(changes, new_bank, bank)
        result["bank"] = torch.where(full[:, None, None], bank, state["bank"])
        result["pending"] = torch.where(full[:, None, None], bank, state["pending"])
        result["importance"] = torch.where(full[:, None], self._trace(state), state["importance"])
        result["written"] = torch.where(full[:, None], 0.0, state["written"])
        return result

    def _trace(self, state: LayerState) -> Tensor:
        """Importance after the chunk: towards x / (1 + x), x the slot's written mass over the mean of the active.

        So 0.5 is the usual share, 0.3 is 43 % and 0.1 is 11 % of it; a chunk that wrote little moves it little.
        """
        written = torch.where(state["mask"], state["written"], 0.0)
        total = written.sum(-1, keepdim=True)
        active = state["mask"].to(written.dtype).sum(-1, keepdim=True)
        mass = written * active
        share = mass / (mass + total + 1e-6)
        rate = TRACE_RATE * total / self.chunk_size
        return state["importance"] + rate * (share - state["importance"])

    def forward(
        self, tokens: Tensor, states: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run a whole sequence from the beginning of a stream, chunk by chunk.

        Args:
            tokens: [B, T, d].
            states: [B, S, D], the bank to start from (default: the learned one).
            mask: [B, S] bool, the active slots (default: the manager's).

        Returns:
            output [B, T, d]; states [B, S, D], the bank after the last token.
        """
        batch, length, _ = tokens.shape
        state = self.initial_state(batch)
        if states is not None:
            state["bank"] = state["pending"] = states
        if mask is not None:
            state["mask"] = mask
        outputs = []
        for number, start in enumerate(range(0, length, self.chunk_size)):
            run = tokens[:, start : start + self.chunk_size]
            valid = torch.full((batch,), run.shape[1], device=tokens.device)
            filled = torch.full_like(valid, min(start, self.attention.window - 1))
            output, state = self.advance(run, state, filled, valid)
            outputs.append(output)
            due = bool(self.consolidate_every) and (number + 1) % self.consolidate_every == 0
            state = self.commit(state, valid == self.chunk_size, torch.full_like(valid, due).bool())
        return torch.cat(outputs, 1), state["pending"]


def _blocks(state_dim: int, width: int = 32) -> int:
    """Fewest equal blocks of at most `width` numbers."""
    return next(count for count in range(1, state_dim + 1) if not state_dim % count and state_dim // count <= width)
