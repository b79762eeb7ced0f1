"""TransformerLM: causal attention over a sliding window, with a cache that is never copied."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nsm.baselines.base import CausalLM
from nsm.baselines.transformer_layer import Places, TransformerLayer
from nsm.errors import ConfigError
from nsm.models import State, checked_sizes
from nsm.spec import COUNT, StateSpec

LONGEST = 2**16
"""The largest context, and about the number of tokens after which the slowest rotation may have come round."""

_UNSEEN = -1.0e9
"""Added to a score, where backends can fuse it with the product before, it makes a weight of exactly 0."""


class TransformerLM(CausalLM):
    """Pre-norm transformer (Vaswani et al. 2017; Xiong et al. 2020) with rotary positions (Su et al. 2021).

    A token sees the last N = `context` tokens, itself included. State: `{i}.key`, `{i}.value` [B, H, N, e], rings in
    which token number n has row n % N, keys already rotated; `lane.count` [B], the number of tokens so far. A
    graph reads the rings and gives only the rows of the new tokens (`StateSpec.append_axis`), which whoever runs it
    writes into the rings.

    A stream has no end, and backends count in 32 bits or divide in float32. So positions have a period P, a multiple
    of N, of which every rotation does a whole number of turns; from 2 P on the count goes back by P, which changes
    nothing, and all numbers stay below 2^24.

    Args:
        vocab_size: V.
        d_model: d.
        num_layers: depth.
        num_heads: H, of e = d / H numbers, an even number.
        context: N <= LONGEST.
        chunk_size: K of the entry `step`.

    Raises:
        ConfigError: sizes below 1, or that do not fit together.
    """

    coarse: Tensor
    fine: Tensor

    def __init__(
        self, vocab_size: int, d_model: int, num_layers: int, num_heads: int, context: int, chunk_size: int = 16
    ) -> None:
        size = checked_sizes(
            "TransformerLM",
            {
                "vocab_size": vocab_size,
                "d_model": d_model,
                "num_layers": num_layers,
                "num_heads": num_heads,
                "context": context,
                "chunk_size": chunk_size,
            },
        )
        width, heads, length = size["d_model"], size["num_heads"], size["context"]
        if width % (2 * heads) or length > LONGEST:
            raise ConfigError(
                f"2 * num_heads must divide d_model={width}, and context be at most {LONGEST}; given "
                f"num_heads={heads}, context={length}."
            )
        layers = [TransformerLayer(width, heads) for _ in range(size["num_layers"])]
        super().__init__(size["vocab_size"], width, size["chunk_size"], layers)
        self.config = dict(size)
        self.context = length
        self.shape = (heads, length, width // heads)
        self.period = -(-LONGEST // length) * length
        self.stride = math.isqrt(self.period) + 1
        self.register_buffer("coarse", self._rotations(self.stride), persistent=False)
        self.register_buffer("fine", self._rotations(1), persistent=False)

    def state_specs(self, batch: int) -> list[StateSpec]:
        rings = [
            StateSpec(f"{index}.{role}", (batch, *self.shape), "float32", append_axis=2)
            for index in range(len(self.layers))
            for role in ("key", "value")
        ]
        return [StateSpec(COUNT, (batch,), "int64"), *rings]

    def advance(self, tokens: Tensor, state: State, valid: Tensor | None) -> tuple[Tensor, State]:
        outputs, updates = self.run(tokens, state, valid)
        return outputs, self.write(state, updates)

    def graph(self, entry: str, inputs: dict[str, Tensor], state: State) -> tuple[dict[str, Tensor], State]:
        """Like `call`, with the new rows [B, H, K, e] in place of the rings."""
        self.spec().entry(entry)
        self.check_tokens(inputs["tokens"])
        outputs, updates = self.run(inputs["tokens"], state, inputs.get("valid"))
        return {"outputs": outputs}, updates

    def forward(
        self, tokens: Tensor, state: State | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, State]:
        """Run a sequence [B, T]; see `CausalLM.forward`. Longer ones than the context go through it in pieces."""
        self.check_tokens(tokens)
        outputs = []
        pieces = tokens.split(self.context, 1)
        for index, piece in enumerate(pieces):
            output, updates = self.run(piece, state, None)
            outputs.append(output)
            if return_state or index + 1 < len(pieces):
                state = self.write(self.initial_state(len(tokens)) if state is None else state, updates)
        result = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return (result, state) if return_state and state is not None else result

    def run(self, tokens: Tensor, state: State | None, valid: Tensor | None) -> tuple[Tensor, State]:
        """Outputs [B, K, V], and as state the new count and the rows to write; no state: a stream's beginning."""
        batch, length = tokens.shape
        count = torch.zeros(batch, dtype=torch.int64, device=tokens.device) if state is None else state[COUNT]
        places = self._places(count, length, state is not None)
        hidden: Tensor = self.embed(tokens)
        reached = count + (length if valid is None else valid)
        updates: State = {COUNT: torch.where(reached < 2 * self.period, reached, reached % self.period + self.period)}
        for index, layer in enumerate(self.layers):
            names = (f"{index}.key", f"{index}.value")
            ring = None if state is None else (state[names[0]], state[names[1]])
            hidden, *rows = layer(hidden, ring, places)
            updates |= zip(names, rows, strict=True)
        outputs: Tensor = self.head(hidden)
        return outputs, updates

    def write(self, state: State, updates: State) -> State:
        """The state with the new rows in the rings, those of the tokens that count."""
        count, before = updates[COUNT][:, None], state[COUNT][:, None]
        added = torch.where(count < before, count + self.period, count) - before
        row = torch.arange(self.context, device=count.device)
        # How many tokens ago each row was written to, at the last token that counts; so from which new row it comes.
        age = (count + self.context - 1 - row) % self.context
        source = (added - 1 - age)[:, None, :, None]
        result = {COUNT: updates[COUNT]}
        for name in state:
            if name != COUNT:
                index = source.clamp(min=0).expand(state[name].shape)
                result[name] = torch.where(source >= 0, updates[name].gather(2, index), state[name])
        return result

    def _places(self, count: Tensor, length: int, cache: bool) -> Places:
        time = torch.arange(length, device=count.device)
        position = (count[:, None] + time) % self.period
        # The rotation of a position is that of its multiple of the stride and then that of the rest.
        cos, sin = self.coarse[torch.div(position, self.stride, rounding_mode="trunc")].unsqueeze(1).chunk(2, -1)
        more_cos, more_sin = self.fine[position % self.stride].unsqueeze(1).chunk(2, -1)
        cos, sin = cos * more_cos - sin * more_sin, sin * more_cos + cos * more_sin
        distance = time[:, None] - time
        new = _added((distance >= 0) & (distance < self.context), cos)
        cached = None
        if cache:
            # How many tokens before the stream's last one a row was written; a row not yet written would be before
            # the stream's first.
            age = (count[:, None] + self.context - 1 - torch.arange(self.context, device=count.device)) % self.context
            reach = torch.minimum(count[:, None], self.context - 1 - time)
            cached = _added(age[:, None, None] < reach[:, None, :, None], cos)
        return Places(cos, sin, cached, new)

    def _rotations(self, stride: int) -> Tensor:
        """Cosines and sines [stride of the model, e] of the positions 0, stride, 2 stride, ..."""
        half = self.shape[-1] // 2
        speed = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        turns = (speed * self.period / (2 * math.pi)).round()
        position = torch.arange(self.stride, dtype=torch.float64) * stride
        angle = position[:, None] * turns % self.period * (2 * math.pi / self.period)
        return torch.cat([angle.cos(), angle.sin()], -1).float()


def _added(visible: Tensor, like: Tensor) -> Tensor:
    """The additive mask of scores, in the dtype of `like`: 0 where visible."""
    return torch.where(visible, 0.0, _UNSEEN).to(like.dtype)
