"""SimpleNSM: the Neural State Machine over ids (language, classification in a stream) or over vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd
from typing import Literal, Unpack, overload

from nsm.arguments import real, whole
from nsm.errors import ConfigError
from nsm.models.config import (
    LayerOptions,
    check_one_form,
    checked_options,
    checked_sizes,
    embedding,
    one_or_each,
    output_head,
    per_layer,
)
from nsm.models.stream import StreamModel
from nsm.modules import NSMLayer

Form = Literal["ids", "vectors"]

# Defaults of the two forms.
_STATES: Mapping[Form, int] = {"ids": 64, "vectors": 16}
_DEFAULTS: Mapping[Form, Mapping[str, int]] = {
    "ids": {"d_model": 256, "max_seq_length": 1024, "num_heads": 8, "num_layers": 2},
    "vectors": {"state_dim": 128, "output_dim": 10, "num_heads": 4, "num_layers": 2},
}


class SimpleNSM(StreamModel):
    """A stack of `NSMLayer`s with an embedding and a head, in two forms.

    Over ids, [B, T] -> [B, T, output_dim]; `output_dim` is the vocabulary unless given:

        SimpleNSM(vocab_size=10000, d_model=256, num_states=64, max_seq_length=1024)

    Over vectors, [B, T, input_dim] -> [B, T, output_dim], or [B, input_dim] -> [B, output_dim], which is a stream
    of one vector:

        SimpleNSM(input_dim=784, state_dim=128, num_states=16, output_dim=10, gate_type="gru")

    Args:
        vocab_size / input_dim: which of the two forms; exactly one of them.
        d_model: width d of a token (default: 256 over ids, state_dim / 2 over vectors).
        state_dim: D, numbers per slot (default: 2 * d_model over ids, 128 over vectors).
        num_states: S, slots per layer, or a list of them.
        output_dim: width of the outputs.
        max_seq_length: the longest sequence `forward` takes in one call (ids; vectors: any). Positions are
            relative to the window, so no weight depends on it, and a stream through `step` has no limit.
        num_layers, num_heads: depth, and heads of the attention (default: 8 over ids, 4 over vectors, or the largest
            divisor of that which divides d_model).
        initial_states, prune_threshold: see `StateManager`.
        options: of the layers, see `NSMLayer`: chunk_size, window, gate_type, routing_heads, ...

    Raises:
        ConfigError: a mixture of the two forms, or sizes that do not fit together.
    """

    @overload
    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int = ...,
        num_states: int | Sequence[int] = ...,
        max_seq_length: int = ...,
        state_dim: int = ...,
        output_dim: int = ...,
        num_layers: int = ...,
        num_heads: int = ...,
        initial_states: int | None = ...,
        prune_threshold: float = ...,
        **options: Unpack[LayerOptions],
    ) -> None: ...

    @overload
    def __init__(
        self,
        *,
        input_dim: int,
        state_dim: int = ...,
        num_states: int | Sequence[int] = ...,
        output_dim: int = ...,
        d_model: int = ...,
        num_layers: int = ...,
        num_heads: int = ...,
        initial_states: int | None = ...,
        prune_threshold: float = ...,
        **options: Unpack[LayerOptions],
    ) -> None: ...

    def __init__(
        self,
        *,
        vocab_size: int | None = None,
        input_dim: int | None = None,
        d_model: int | None = None,
        state_dim: int | None = None,
        num_states: int | Sequence[int] | None = None,
        output_dim: int | None = None,
        max_seq_length: int | None = None,
        num_layers: int | None = None,
        num_heads: int | None = None,
        initial_states: int | None = None,
        prune_threshold: float = 0.1,
        **options: Unpack[LayerOptions],
    ) -> None:
        form = _form(vocab_size, input_dim, max_seq_length)
        sizes = {
            "vocab_size": vocab_size,
            "input_dim": input_dim,
            "d_model": d_model,
            "state_dim": state_dim,
            "output_dim": output_dim,
            "max_seq_length": max_seq_length,
            "num_layers": num_layers,
            "num_heads": num_heads,
        }
        given = checked_sizes("SimpleNSM", sizes)
        chosen = {**_DEFAULTS[form], **given}
        chosen.setdefault("d_model", chosen.get("state_dim", 0) // 2)
        chosen.setdefault("state_dim", 2 * chosen["d_model"])
        chosen.setdefault("output_dim", chosen.get("vocab_size", 0))
        size = checked_sizes("SimpleNSM", chosen)
        width = size["d_model"]
        if num_heads is None:
            size["num_heads"] = gcd(size["num_heads"], width)
        slots = one_or_each("SimpleNSM", "num_states", _STATES[form] if num_states is None else num_states)
        begin = None if initial_states is None else whole("initial_states of SimpleNSM", initial_states)
        threshold = real("prune_threshold of SimpleNSM", prune_threshold)
        options = checked_options("SimpleNSM", options)
        layers = [
            NSMLayer(
                size["state_dim"],
                width,
                size["num_heads"],
                count,
                initial_states=begin,
                prune_threshold=threshold,
                **options,
            )
            for count in per_layer("SimpleNSM", "num_states", slots, size["num_layers"])
        ]
        embed, tokens = embedding(size.get("vocab_size"), size.get("input_dim"), width)
        head = output_head(width, size["output_dim"])
        super().__init__(embed, layers, head, tokens, size["output_dim"], size.get("max_seq_length"))
        self.config = {
            **size,
            "num_states": slots,
            "initial_states": begin,
            "prune_threshold": threshold,
            **options,
        }


def _form(vocab_size: int | None, input_dim: int | None, max_seq_length: int | None) -> Form:
    check_one_form("SimpleNSM", vocab_size, input_dim)
    if input_dim is not None and max_seq_length is not None:
        raise ConfigError(
            "max_seq_length belongs to the form over ids (vocab_size=...). "
            "Leave it out: a stream of vectors has no limit."
        )
    return "vectors" if vocab_size is None else "ids"
