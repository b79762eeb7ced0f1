"""CausalLM: embedding, layers, norm and head as a step model that takes any number of tokens at any time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from nsm.models import State, StepModel, embedding, output_head
from nsm.spec import EntrySpec, StateSpec, StepSpec, TensorSpec


class RecurrentLayer(nn.Module, ABC):
    """A layer whose state does not grow. Its state by role: float32, lanes on axis 0, zeros at a stream's start."""

    @abstractmethod
    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Shape of each state, by role."""

    @abstractmethod
    def forward(self, tokens: Tensor, state: State, valid: Tensor | None) -> tuple[Tensor, State]:
        """Take tokens [B, T, d], of which the first `valid` [B] count (default: all): [B, T, d] and the state."""


class CausalLM(StepModel):
    """Ids [B, T] -> logits [B, T, V], from a state that is updated token by token.

    Unlike a model with chunks, nothing happens at a chunk's end: there are the entries `step`, of K tokens, and
    `decode`, of one, which are the same function, and no `commit`. Both have an input `valid` [B] where there are
    several lanes.

    Args:
        vocab_size: V.
        d_model: d.
        chunk_size: tokens that the entry `step` takes unless another multiple is asked for.
        layers: `RecurrentLayer`s, or those that a subclass with its own `advance` knows how to run.
        embedding_std: standard deviation of embeddings at the start; each kind of model has that with which it learns
            text best (docs/measurements.md, "Language").
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        chunk_size: int,
        layers: Sequence[nn.Module],
        embedding_std: float = 1.0,
    ) -> None:
        super().__init__()
        self.chunk_size = chunk_size
        self.output_dim = vocab_size
        self.embed, self.token_spec = embedding(vocab_size, None, d_model, embedding_std)
        self.layers = nn.ModuleList(layers)
        self.head = output_head(d_model, vocab_size)

    def state_specs(self, batch: int) -> list[StateSpec]:
        """The states, named `{layer}.{role}`."""
        return [
            StateSpec(f"{index}.{role}", shape, "float32")
            for index, layer in enumerate(self._layers())
            for role, shape in layer.state_shapes(batch).items()
        ]

    def advance(self, tokens: Tensor, state: State, valid: Tensor | None) -> tuple[Tensor, State]:
        """Outputs [B, T, V] of tokens [B, T], and the whole state."""
        hidden: Tensor = self.embed(tokens)
        result: State = {}
        for index, layer in enumerate(self._layers()):
            roles = layer.state_shapes(1)
            hidden, part = layer(hidden, {role: state[f"{index}.{role}"] for role in roles}, valid)
            result |= {f"{index}.{role}": part[role] for role in roles}
        outputs: Tensor = self.head(hidden)
        return outputs, result

    def spec(
        self,
        batch: int = 1,
        tokens_per_call: int | None = None,
        debug_outputs: bool = False,  # noqa: ARG002
    ) -> StepSpec:
        """The entries `step` and `decode`; see `StepModel.spec`. There are no debug outputs."""
        states = tuple(self.state_specs(batch))
        names = tuple(state.name for state in states)
        entries = []
        for name, length in (("step", self.checked_count(tokens_per_call)), ("decode", 1)):
            inputs = [self.tokens_input(batch, length)]
            if batch > 1:
                inputs.append(TensorSpec("valid", (batch,), "int64", None, 0, length))
            outputs = (TensorSpec("outputs", (batch, length, self.output_dim), "float32", 1),)
            entries.append(EntrySpec(name, tuple(inputs), outputs, names, names))
        return StepSpec(tuple(entries), states, self.chunk_size, batch)

    def initial_state(self, batch: int = 1) -> State:
        weight = next(self.parameters())
        dtypes = {"float32": weight.dtype, "int64": torch.int64}
        return {
            spec.name: torch.zeros(spec.shape, dtype=dtypes[spec.dtype], device=weight.device)
            for spec in self.state_specs(batch)
        }

    def step(self, tokens: Tensor, state: State, valid: Tensor | None = None) -> tuple[Tensor, State]:
        """Take tokens [B, K], any K, of which the first `valid` [B] count (default: all).

        Returns:
            outputs [B, K, V], without meaning after the valid tokens, and the state after the valid tokens.
        """
        self.check_tokens(tokens)
        return self.advance(tokens, state, valid)

    def call(self, entry: str, inputs: dict[str, Tensor], state: State) -> tuple[dict[str, Tensor], State]:
        self.spec().entry(entry)
        return super().call("step", inputs, state)

    def forward(
        self, tokens: Tensor, state: State | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, State]:
        """Run a sequence [B, T] from `state`, or from the beginning of a stream.

        Returns:
            outputs [B, T, V]; with `return_state`, and the state after the last token.
        """
        self.check_tokens(tokens)
        start = self.initial_state(tokens.shape[0]) if state is None else state
        outputs, after = self.advance(tokens, start, None)
        return (outputs, after) if return_state else outputs

    def _layers(self) -> list[RecurrentLayer]:
        return cast("list[RecurrentLayer]", list(self.layers))


def shift_tokens(tokens: Tensor, before: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each token's predecessor (token shift), and the last token that counts.

    Args:
        tokens: [B, T, d].
        before: [B, d], the token just before them.
        valid: [B], how many of the tokens count (default: all).

    Returns:
        [B, T, d] and [B, d].
    """
    joined = torch.cat([before.unsqueeze(1), tokens], 1)
    if valid is None:
        return joined[:, :-1], tokens[:, -1]
    last = joined.gather(1, valid[:, None, None].expand(-1, 1, tokens.shape[-1]))
    return joined[:, :-1], last.squeeze(1)


def counts(length: int, valid: Tensor) -> Tensor:
    """Which of `length` tokens count, [B, T] bool."""
    return torch.arange(length, device=valid.device) < valid[:, None]
