"""StreamModel: a stack of NSM layers as a step model with explicit, declared state."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from nsm.errors import InputError, StreamError
from nsm.layer import NSMLayer
from nsm.spec import OFFSET, EntrySpec, StateSpec, StepSpec, TensorSpec

State = dict[str, Tensor]
"""The whole state of B streams, by the names of `StreamModel.spec(B).states`."""

# States of the stream itself, beside OFFSET and those of the layers.
FILLED = "lane.filled"  # rows that are there in the windows, [B]
CHUNK = "lane.chunk"  # chunks since the last consolidation, [B]; only where that is not every chunk


class StreamModel(nn.Module):
    """Embedding, layers, norm and head over streams of tokens.

    A stream is cut into chunks of C tokens, counted from its start. `advance` takes tokens that stay inside the
    open chunk, `commit` ends the chunk on the lanes where it is full, and `step`, which is what is exported, takes
    whole chunks. `forward` is the scan of these over a sequence, so a sequence in one call and the same sequence
    in any pieces give the same outputs and the same state.

    Subclasses give the parts; a model with layers of its own kind gives layers with `NSMLayer`'s methods.

    Args:
        embed: tokens [B, T] or [B, T, input_dim] -> [B, T, d].
        layers: the layers; all with the same chunk size and window.
        head: [B, T, d] -> [B, T, output_dim].
        tokens: spec of one lane and one token: shape () for ids, (input_dim,) for vectors.
        output_dim: width of the outputs.
        max_seq_length: the longest sequence that `forward` takes in one call, None for any.
    """

    config: dict[str, Any]
    """The arguments that make this model again; a subclass sets them."""

    def __init__(
        self,
        embed: nn.Module,
        layers: list[NSMLayer],
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
        self.chunk_size = layers[0].chunk_size
        self.carried_rows = layers[0].attention.window - 1
        self.consolidate_every = layers[0].consolidate_every

    # -- declaration ---------------------------------------------------------------------------------------------

    def spec(self, batch: int = 1, tokens_per_call: int | None = None) -> StepSpec:
        """The declaration of the exported step.

        Args:
            batch: lanes.
            tokens_per_call: K, a multiple of the chunk size (default: one chunk).
        """
        count = self.chunk_size if tokens_per_call is None else tokens_per_call
        if count < 1 or count % self.chunk_size:
            raise InputError(
                f"A call takes a multiple of the model's chunk of {self.chunk_size} tokens; given {count}. "
                f"Take {max(1, round(count / self.chunk_size)) * self.chunk_size}."
            )
        token = self.token_spec
        tokens = TensorSpec("tokens", (batch, count, *token.shape), token.dtype, 1, token.minimum, token.maximum)
        valid = TensorSpec("valid", (batch,), "int64", None, 0, count)
        outputs = TensorSpec("outputs", (batch, count, self.output_dim), "float32", 1)
        states = [
            StateSpec(name, (batch,), "int64")
            for name in (OFFSET, FILLED, *([CHUNK] if self.consolidate_every > 1 else []))
        ]
        for index, layer in enumerate(self._layers()):
            states += layer.state_specs(str(index), batch)
        entry = EntrySpec("step", (tokens, valid), (outputs,))
        return StepSpec((entry,), tuple(states), self.chunk_size, batch)

    def initial_state(self, batch: int = 1) -> State:
        """The state of `batch` streams before their first token. Its learned part carries gradients."""
        device = self._device()
        names = (OFFSET, FILLED, *([CHUNK] if self.consolidate_every > 1 else []))
        state: State = {name: torch.zeros(batch, dtype=torch.int64, device=device) for name in names}
        for index, layer in enumerate(self._layers()):
            state |= {f"{index}.{role}": value for role, value in layer.initial_state(batch).items()}
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
        self.check_tokens(tokens)
        if tokens.shape[1] % self.chunk_size:
            raise InputError(
                f"step takes a multiple of {self.chunk_size} tokens a lane; given {tokens.shape[1]}. "
                "Pad the last chunk and say in `valid` how many tokens count."
            )
        if valid is None:
            valid = torch.full((tokens.shape[0],), tokens.shape[1], device=tokens.device)
        if not torch.compiler.is_compiling() and bool(((state[OFFSET] != 0) & (valid > 0)).any()):
            raise StreamError(
                f"step starts at a chunk's beginning, but the lanes stand at offsets {state[OFFSET].tolist()}. "
                "Use forward or advance, or start from initial_state()."
            )
        outputs = []
        for start in range(0, tokens.shape[1], self.chunk_size):
            now = (valid - start).clamp(0, self.chunk_size)
            output, state = self.advance(tokens[:, start : start + self.chunk_size], state, now)
            state = self.commit(state)
            outputs.append(output)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), state

    def forward(
        self, tokens: Tensor, state: State | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, State]:
        """Run a sequence, chunk by chunk, from `state` or from the beginning of a stream.

        Args:
            tokens: ids [B, T], or vectors [B, T, input_dim] or [B, input_dim] (a stream of one vector).
            state: where to continue (all lanes at the same offset), for truncated backpropagation through time.
            return_state: whether to return the state after the last token too.

        Returns:
            outputs [B, T, output_dim] ([B, output_dim] for a stream of one vector); with `return_state`, and the
            state.

        Raises:
            InputError: tokens of the wrong shape or dtype, ids outside the vocabulary, or too long a sequence.
            StreamError: lanes at different offsets.
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
        if len(offsets) != 1:
            raise StreamError(f"forward needs all lanes at the same offset in their chunk; they stand at {offsets}.")
        outputs, start, room = [], 0, self.chunk_size - int(offsets[0])
        while start < length:
            run = tokens[:, start : start + room]
            output, state = self.advance(run, state)
            state = self.commit(state)
            outputs.append(output)
            start, room = start + run.shape[1], self.chunk_size
        result = torch.cat(outputs, 1)
        result = result[:, 0] if single else result
        return (result, state) if return_state else result

    def advance(self, tokens: Tensor, state: State, valid: Tensor | None = None) -> tuple[Tensor, State]:
        """Take tokens [B, T] that stay inside each lane's open chunk, without committing it.

        `valid` [B] says how many of them count (default: all). Returns outputs [B, T, output_dim] and the state.
        """
        if valid is None:
            valid = torch.full((tokens.shape[0],), tokens.shape[1], device=tokens.device)
        if not torch.compiler.is_compiling() and bool((state[OFFSET] + valid > self.chunk_size).any()):
            raise StreamError(
                f"advance stays inside a chunk of {self.chunk_size} tokens, but the lanes stand at offsets "
                f"{state[OFFSET].tolist()} and are given {valid.tolist()}. Commit the full chunk first, or use forward."
            )
        filled = state[FILLED]
        hidden = self.embed(tokens)
        if self.token_spec.shape:
            # Padding may hold anything, and 0 * NaN is NaN. Ids have a finite embedding whatever they are.
            counts = torch.arange(tokens.shape[1], device=tokens.device) < valid[:, None]
            hidden = torch.where(counts.unsqueeze(-1), hidden, 0.0)
        result = dict(state)
        for index, layer in enumerate(self._layers()):
            hidden, part = layer.advance(hidden, _part(state, index), filled, valid)
            result |= _named(part, index)
        result[OFFSET] = state[OFFSET] + valid
        result[FILLED] = (filled + valid).clamp(max=self.carried_rows)
        outputs: Tensor = self.head(hidden)
        return outputs, result

    def commit(self, state: State) -> State:
        """End the chunk on the lanes where it is full; the others keep their state as it was."""
        full = state[OFFSET] == self.chunk_size
        result = dict(state)
        result[OFFSET] = torch.where(full, 0, state[OFFSET])
        consolidate = None
        if CHUNK in state:
            consolidate = state[CHUNK] + 1 == self.consolidate_every
            result[CHUNK] = torch.where(full, torch.where(consolidate, 0, state[CHUNK] + 1), state[CHUNK])
        for index, layer in enumerate(self._layers()):
            result |= _named(layer.commit(_part(state, index), full, consolidate), index)
        return result

    # -- helpers -------------------------------------------------------------------------------------------------

    def _layers(self) -> list[NSMLayer]:
        return cast("list[NSMLayer]", list(self.layers))

    def _device(self) -> torch.device:
        return self._layers()[0].manager.bank.device

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise `InputError` unless the tokens are [B, T, ...] of this model's kind and in range."""
        spec = self.token_spec
        kind = "ids [B, T]" if not spec.shape else f"vectors [B, T, {spec.shape[0]}]"
        integer = not spec.shape
        dtypes = (torch.int64, torch.int32) if integer else (self._layers()[0].manager.bank.dtype,)
        if tokens.dim() != 2 + len(spec.shape) or tuple(tokens.shape[2:]) != spec.shape or 0 in tokens.shape[:2]:
            raise InputError(f"The model takes {kind}, at least one token; given shape {list(tokens.shape)}.")
        if tokens.dtype not in dtypes:
            raise InputError(f"The model takes {kind} of dtype {dtypes[0]}; given {tokens.dtype}.")
        if integer and not torch.compiler.is_compiling():
            low, high = int(tokens.min()), int(tokens.max())
            if (
                spec.minimum is not None
                and spec.maximum is not None
                and not spec.minimum <= low <= high <= spec.maximum
            ):
                raise InputError(f"Token ids must lie in {spec.minimum} .. {spec.maximum}; given {low} .. {high}.")


def _part(state: State, index: int) -> State:
    prefix = f"{index}."
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def _named(part: State, index: int) -> State:
    return {f"{index}.{role}": value for role, value in part.items()}
