"""StreamModel: a stack of layers as a step model with explicit, declared state."""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from typing import cast

import torch
from torch import Tensor, nn

from nsm.errors import ConfigError, InputError, StreamError
from nsm.models.base import State, StepModel
from nsm.modules import Clock, StreamLayer
from nsm.spec import CHUNK, FILLED, OFFSET, EntrySpec, StateSpec, StepSpec, TensorSpec


class StreamModel(StepModel):
    """Embedding, layers, norm and head over streams of tokens.

    A stream is cut into chunks of C tokens, counted from its start. `step` takes whole chunks; `decode` takes one
    token anywhere in a chunk, and `commit` ends the chunks that are full. `forward` puts these together over a
    sequence, so a sequence in one call and the same sequence in any pieces give the same outputs and the same state.

    No input says which lanes are active, for the counts do: a lane whose `valid` is 0 keeps its state as it was in
    `step` and `decode`, and `commit` changes the lanes whose own offset says that their chunk is full.

    Args:
        embed: tokens [B, T] or [B, T, input_dim] -> [B, T, d].
        layers: all with the same chunk size.
        head: [B, T, d] -> [B, T, output_dim].
        tokens: spec of one lane and one token: shape () for ids, (input_dim,) for vectors.
        output_dim: width of the outputs.
        max_seq_length: the longest sequence that `forward` takes in one call, None for any.
    """

    def __init__(
        self,
        embed: nn.Module,
        layers: Sequence[nn.Module],
        head: nn.Module,
        tokens: TensorSpec,
        output_dim: int,
        max_seq_length: int | None = None,
    ) -> None:
        super().__init__()
        self.embed = embed
        self.layers = nn.ModuleList(layers)
        self.head = head
        self.token_spec = tokens
        self.output_dim = output_dim
        self.max_seq_length = max_seq_length
        stack = self._layers()
        self.chunk_size = stack[0].chunk_size
        if any(layer.chunk_size != self.chunk_size for layer in stack):
            raise ConfigError(f"All layers need one chunk size; given {[layer.chunk_size for layer in stack]}.")
        self.causal = all(layer.causal for layer in stack)
        self.carried_rows = max(layer.carried_rows for layer in stack)
        # A stream counts its chunks only as far as its layers need to.
        self.cycle = lcm(1, *(period for layer in stack for period in layer.periods))

    # -- declaration ---------------------------------------------------------------------------------------------

    def spec(self, batch: int = 1, tokens_per_call: int | None = None, debug_outputs: bool = False) -> StepSpec:
        """The declaration of the exported entries.

        `step` has an input `valid` where lanes may have different numbers of tokens: with several lanes, several
        chunks a call, or a model that is not causal. Without it every token counts. A causal model also has
        `decode`, one token a lane, and `commit`, which the lanes that stand at the end of a chunk need next.

        Args:
            batch: lanes.
            tokens_per_call: K of `step`, a multiple of the chunk size (default: one chunk).
            debug_outputs: add the routing outputs of `traced_step` to `step`.
        """
        count = self.checked_count(tokens_per_call)
        states = [StateSpec(name, (batch,), "int64") for name in self._lane_states()]
        layered = []
        for index, layer in enumerate(self._layers()):
            layered.append([state.name.partition(".")[2] for state in layer.state_specs(str(index), batch)])
            states += layer.state_specs(str(index), batch)
        partial = batch > 1 or count > self.chunk_size or not self.causal
        entries = []
        for name, length in (("step", count), ("decode", 1), ("commit", 0)):
            if name != "step" and not self.causal:
                continue
            inputs = [self.tokens_input(batch, length)] if length else []
            if (name == "step" and partial) or (name == "decode" and batch > 1):
                inputs.append(TensorSpec("valid", (batch,), "int64", None, 0, length))
            outputs = [TensorSpec("outputs", (batch, length, self.output_dim), "float32", 1)] if length else []
            if name == "step" and debug_outputs:
                for index, layer in enumerate(self._layers()):
                    if (shape := layer.routing_shape) is not None:
                        outputs.append(TensorSpec(f"routing.{index}", (batch, count, *shape), "float32", 1))
                        if layer.adapts:
                            outputs.append(TensorSpec(f"mask.{index}", (batch, count, shape[1]), "float32", 1))
            reads, writes = self._touched(name, layered, partial)
            entries.append(EntrySpec(name, tuple(inputs), tuple(outputs), reads, writes))
        return StepSpec(tuple(entries), tuple(states), self.chunk_size, batch)

    def initial_state(self, batch: int = 1) -> State:
        device = next(self.parameters()).device
        state: State = {name: torch.zeros(batch, dtype=torch.int64, device=device) for name in self._lane_states()}
        for index, layer in enumerate(self._layers()):
            state |= _named(layer.initial_state(batch), index)
        return state

    # -- running -------------------------------------------------------------------------------------------------

    def step(self, tokens: Tensor, state: State, valid: Tensor | None = None) -> tuple[Tensor, State]:
        """Take whole chunks, for lanes that stand at a chunk's beginning.

        Args:
            tokens: [B, K] ids or [B, K, input_dim], K a multiple of C.
            state: as returned by `initial_state` or an earlier call.
            valid: [B] int64, how many of the tokens count (default: all). A lane with fewer than K ends inside a
                chunk, exactly as if it had been given just those tokens; a lane with 0 keeps its state as it was.

        Returns:
            outputs [B, K, output_dim] (of use for the valid tokens) and the state after them.

        Raises:
            InputError: tokens of the wrong shape or dtype, or ids outside the vocabulary.
            StreamError: a lane stands inside a chunk.
        """
        outputs, state, _ = self.traced_step(tokens, state, valid)
        return outputs, state

    def traced_step(
        self, tokens: Tensor, state: State, valid: Tensor | None = None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        """`step`, and how the tokens chose slots.

        Returns:
            as of `step`; and for every layer that routes `routing.{layer}` [B, K, R, S1], and where its mask changes
            `mask.{layer}` [B, K, S], 1 for the slots that were active for a token and 0 for the others.
        """
        self.check_tokens(tokens)
        count = tokens.shape[1] // self.chunk_size
        if tokens.shape[1] % self.chunk_size:
            raise InputError(
                f"step takes a multiple of {self.chunk_size} tokens a lane; given {tokens.shape[1]}. "
                "Pad the last chunk and say in `valid` how many tokens count."
            )
        if not torch.compiler.is_compiling():
            inside = state[OFFSET] != 0
            if bool((inside if valid is None else inside & (valid > 0)).any()):
                raise StreamError(
                    f"step starts at a chunk's beginning, but the lanes stand at offsets {state[OFFSET].tolist()}. "
                    "Use forward or decode, or start from initial_state()."
                )
        clock = self._clock(state)
        hidden = self._embedded(tokens, valid)
        result, shown = dict(state), {}
        for index, layer in enumerate(self._layers()):
            hidden, part, routed = layer.scan(hidden, _part(state, index), clock, valid)
            result |= _named(part, index)
            if routed is not None:
                shown[f"routing.{index}"] = routed.weights.transpose(2, 3).flatten(1, 2)
                if layer.adapts:
                    by_token = routed.mask.unsqueeze(2).expand(-1, -1, self.chunk_size, -1).flatten(1, 2)
                    shown[f"mask.{index}"] = by_token.to(hidden.dtype)
        if valid is None:
            chunks: Tensor | int = count
        else:
            chunks = valid // self.chunk_size
            result[OFFSET] = torch.where(valid > 0, valid % self.chunk_size, state[OFFSET])
        self._advance_clock(result, state, chunks)
        outputs: Tensor = self.head(hidden)
        return outputs, result, shown

    def decode(self, tokens: Tensor, state: State, valid: Tensor | None = None) -> tuple[Tensor, State]:
        """Take one token a lane, [B, 1] ids or [B, 1, input_dim]; `valid` [B] is 0 for a lane that has none.

        Raises:
            InputError: tokens of the wrong shape or dtype, ids outside the vocabulary, or a model that is not causal.
            StreamError: the chunk of a lane is full, and waits for `commit`.
        """
        self.check_tokens(tokens)
        if not self.causal or tokens.shape[1] != 1:
            raise InputError(
                f"decode takes one token a lane, of a causal model; given {tokens.shape[1]} tokens, "
                f"causal={self.causal}. Use step."
            )
        if not torch.compiler.is_compiling():
            full = state[OFFSET] >= self.chunk_size
            if bool((full if valid is None else full & (valid > 0)).any()):
                raise StreamError(
                    f"The open chunk has {self.chunk_size} tokens on some lanes (offsets {state[OFFSET].tolist()}). "
                    "Call commit first."
                )
        clock = self._clock(state)
        hidden = self._embedded(tokens, valid)
        result = dict(state)
        for index, layer in enumerate(self._layers()):
            hidden, part, _ = layer.decode(hidden, _part(state, index), clock, valid)
            result |= _named(part, index)
        result[OFFSET] = state[OFFSET] + (1 if valid is None else valid)
        outputs: Tensor = self.head(hidden)
        return outputs, result

    def commit(self, state: State) -> State:
        """End the chunk on the lanes where it is full; the others keep their state as it was."""
        full = state[OFFSET] == self.chunk_size
        clock, result = self._clock(state), dict(state)
        for index, layer in enumerate(self._layers()):
            result |= _named(layer.commit(_part(state, index), full, clock), index)
        result[OFFSET] = torch.where(full, 0, state[OFFSET])
        self._advance_clock(result, state, full.to(torch.int64))
        return result

    def call(self, entry: str, inputs: dict[str, Tensor], state: State) -> tuple[dict[str, Tensor], State]:
        if entry == "commit":
            return {}, self.commit(state)
        if entry == "decode":
            outputs, state = self.decode(inputs["tokens"], state, inputs.get("valid"))
            return {"outputs": outputs}, state
        if entry != "step":
            raise InputError(f"There is no entry {entry!r}. Entries: step, decode, commit.")
        outputs, state, shown = self.traced_step(inputs["tokens"], state, inputs.get("valid"))
        return {"outputs": outputs, **shown}, state

    def forward(
        self, tokens: Tensor, state: State | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, State]:
        """Run a sequence from `state`, or from the beginning of a stream.

        Args:
            tokens: ids [B, T], or vectors [B, T, input_dim] or [B, input_dim] (a stream of one vector).
            state: where to continue (all lanes at the same offset), for truncated backpropagation through time.
            return_state: whether to return the state after the last token too.

        Returns:
            outputs [B, T, output_dim] ([B, output_dim] for a stream of one vector); with `return_state`, and the
            state.

        Raises:
            InputError: tokens of the wrong shape or dtype, ids outside the vocabulary, or too long a sequence.
            StreamError: lanes at different offsets, or a model that is not causal in the middle of a chunk.
        """
        single = bool(self.token_spec.shape) and tokens.dim() == 1 + len(self.token_spec.shape)
        if single:
            tokens = tokens.unsqueeze(1)
        self.check_tokens(tokens)
        batch, length = tokens.shape[:2]
        if self.max_seq_length is not None and length > self.max_seq_length:
            raise InputError(
                f"forward takes at most max_seq_length={self.max_seq_length} tokens in one call; given {length}. "
                "Call it in pieces with return_state=True, or use step: a stream has no end."
            )
        if state is None:
            state = self.initial_state(batch)
        offsets = sorted(set(state[OFFSET].tolist()))
        if len(offsets) != 1 or (offsets[0] and not self.causal):
            raise StreamError(
                "forward needs all lanes at the same offset in their chunk, and at its beginning where the model is "
                f"not causal; they stand at {offsets}."
            )
        outputs, start = [], 0
        if offsets[0]:
            # To the end of the open chunk token by token, and from there chunk by chunk.
            start = min(length, self.chunk_size - int(offsets[0]))
            for index in range(start):
                output, state = self.decode(tokens[:, index : index + 1], state)
                outputs.append(output)
            state = self.commit(state)
        if start < length:
            rest = tokens[:, start:]
            missing = -rest.shape[1] % self.chunk_size
            valid = None
            if missing:
                padding = rest[:, -1:].expand(-1, missing, *rest.shape[2:])
                valid = torch.full((batch,), rest.shape[1], device=tokens.device)
                rest = torch.cat([rest, padding], 1)
            output, state = self.step(rest, state, valid)
            outputs.append(output[:, : length - start])
        result = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        result = result[:, 0] if single else result
        return (result, state) if return_state else result

    # -- helpers -------------------------------------------------------------------------------------------------

    def _layers(self) -> list[StreamLayer]:
        return cast("list[StreamLayer]", list(self.layers))

    def _lane_states(self) -> tuple[str, ...]:
        return (OFFSET, FILLED, CHUNK) if self.cycle > 1 else (OFFSET, FILLED)

    def _clock(self, state: State) -> Clock:
        return Clock(state[FILLED], state[OFFSET], state.get(CHUNK))

    def _advance_clock(self, result: State, state: State, chunks: Tensor | int) -> None:
        result[FILLED] = (state[FILLED] + self.chunk_size * chunks).clamp(max=self.carried_rows)
        if CHUNK in state:
            result[CHUNK] = (state[CHUNK] + chunks) % self.cycle

    def _embedded(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        hidden: Tensor = self.embed(tokens)
        if valid is not None and self.token_spec.shape:
            # Padding may hold anything, and 0 * NaN is NaN. Ids have a finite embedding whatever they are.
            counts = torch.arange(tokens.shape[1], device=tokens.device) < valid[:, None]
            hidden = torch.where(counts.unsqueeze(-1), hidden, 0.0)
        return hidden

    def _touched(self, entry: str, layered: list[list[str]], partial: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the states that an entry reads and writes."""
        clock = (FILLED, CHUNK) if self.cycle > 1 else (FILLED,)
        reads, writes = {
            "step": ([*clock, *([OFFSET] if partial else [])], [*clock, *([OFFSET] if partial else [])]),
            "decode": ([OFFSET, FILLED], [OFFSET]),
            "commit": ([OFFSET, *clock], [OFFSET, *clock]),
        }[entry]
        for index, (layer, roles) in enumerate(zip(self._layers(), layered, strict=True)):
            read, written = layer.touched(entry, roles, partial)
            reads = [*reads, *(f"{index}.{role}" for role in read)]
            writes = [*writes, *(f"{index}.{role}" for role in written)]
        return tuple(reads), tuple(writes)


def _part(state: State, index: int) -> State:
    prefix = f"{index}."
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def _named(part: State, index: int) -> State:
    return {f"{index}.{role}": value for role, value in part.items()}
