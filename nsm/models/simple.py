"""SimpleNSM: the Neural State Machine over ids (language, classification in a stream) or over vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, overload

from torch import nn

from nsm.errors import ConfigError
from nsm.layer import NSMLayer
from nsm.models.stream import StreamModel
from nsm.propagator import GateType
from nsm.spec import TensorSpec

Form = Literal["ids", "vectors"]

# What the two forms leave to a default; None stands for "the other form's argument".
_DEFAULTS: Mapping[Form, Mapping[str, int | None]] = {
    "ids": {"d_model": 256, "num_states": 64, "max_seq_length": 1024, "num_heads": 8, "num_layers": 2},
    "vectors": {"state_dim": 128, "num_states": 16, "output_dim": 10, "num_heads": 4, "num_layers": 2},
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
        num_states: S, slots per layer.
        output_dim: width of the outputs.
        max_seq_length: the longest sequence `forward` takes in one call (ids; vectors: any). Positions are
            relative to the window, so no weight depends on it, and a stream through `step` has no limit.
        num_layers, num_heads: depth, and heads of the attention.
        chunk_size: C, the commit period in tokens.
        window: W >= C, reach of the local attention (default: C).
        gate_type, consolidate_every, communication, routing_heads, initial_states, prune_threshold: see `NSMLayer`.

    Raises:
        ConfigError: a mixture of the two forms, or sizes that do not fit together.
    """

    @overload
    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int = ...,
        num_states: int = ...,
        max_seq_length: int = ...,
        state_dim: int = ...,
        output_dim: int = ...,
        gate_type: GateType = ...,
        num_layers: int = ...,
        num_heads: int = ...,
        chunk_size: int = ...,
        window: int | None = ...,
        routing_heads: int = ...,
        consolidate_every: int = ...,
        communication: bool = ...,
        initial_states: int | None = ...,
        prune_threshold: float = ...,
    ) -> None: ...

    @overload
    def __init__(
        self,
        *,
        input_dim: int,
        state_dim: int = ...,
        num_states: int = ...,
        output_dim: int = ...,
        gate_type: GateType = ...,
        d_model: int = ...,
        num_layers: int = ...,
        num_heads: int = ...,
        chunk_size: int = ...,
        window: int | None = ...,
        routing_heads: int = ...,
        consolidate_every: int = ...,
        communication: bool = ...,
        initial_states: int | None = ...,
        prune_threshold: float = ...,
    ) -> None: ...

    def __init__(
        self,
        *,
        vocab_size: int | None = None,
        input_dim: int | None = None,
        d_model: int | None = None,
        state_dim: int | None = None,
        num_states: int | None = None,
        output_dim: int | None = None,
        max_seq_length: int | None = None,
        gate_type: GateType = "gru",
        num_layers: int | None = None,
        num_heads: int | None = None,
        chunk_size: int = 16,
        window: int | None = None,
        routing_heads: int = 4,
        consolidate_every: int = 1,
        communication: bool = False,
        initial_states: int | None = None,
        prune_threshold: float = 0.1,
    ) -> None:
        form = _form(vocab_size, input_dim, max_seq_length)
        given = {
            "d_model": d_model,
            "state_dim": state_dim,
            "num_states": num_states,
            "output_dim": output_dim,
            "max_seq_length": max_seq_length,
            "num_layers": num_layers,
            "num_heads": num_heads,
        }
        sizes = {**_DEFAULTS[form], **{name: value for name, value in given.items() if value is not None}}
        sizes.setdefault("d_model", (sizes.get("state_dim") or 0) // 2)
        sizes.setdefault("state_dim", 2 * (sizes["d_model"] or 0))
        sizes.setdefault("output_dim", vocab_size)
        checked = {"vocab_size": vocab_size, "input_dim": input_dim, **sizes}
        for name, value in checked.items():
            if value is not None and value < 1:
                raise ConfigError(f"SimpleNSM needs {name} >= 1; given {value}.")
        size = {name: value for name, value in checked.items() if value is not None}
        width = size["d_model"]
        layers = [
            NSMLayer(
                size["state_dim"],
                width,
                size["num_heads"],
                size["num_states"],
                gate_type=gate_type,
                chunk_size=chunk_size,
                window=window,
                routing_heads=routing_heads,
                consolidate_every=consolidate_every,
                communication=communication,
                initial_states=initial_states,
                prune_threshold=prune_threshold,
            )
            for _ in range(size["num_layers"])
        ]
        embed: nn.Module
        if form == "ids":
            embed = nn.Embedding(size["vocab_size"], width)
            tokens = TensorSpec("tokens", (), "int64", None, 0, size["vocab_size"] - 1)
        else:
            embed = nn.Linear(size["input_dim"], width)
            tokens = TensorSpec("tokens", (size["input_dim"],), "float32")
        head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size["output_dim"]))
        super().__init__(embed, layers, head, tokens, size["output_dim"], size.get("max_seq_length"))
        self.config: dict[str, Any] = {
            **size,
            "gate_type": gate_type,
            "chunk_size": chunk_size,
            "window": layers[0].attention.window,
            "routing_heads": routing_heads,
            "consolidate_every": consolidate_every,
            "communication": communication,
            "initial_states": initial_states,
            "prune_threshold": prune_threshold,
        }


def _form(vocab_size: int | None, input_dim: int | None, max_seq_length: int | None) -> Form:
    if (vocab_size is None) == (input_dim is None):
        raise ConfigError(
            "SimpleNSM takes either vocab_size (a stream of ids) or input_dim (a stream of vectors), and exactly one; "
            f"given vocab_size={vocab_size}, input_dim={input_dim}."
        )
    if input_dim is not None and max_seq_length is not None:
        raise ConfigError(
            "max_seq_length belongs to the form over ids (vocab_size=...). "
            "Leave it out: a stream of vectors has no limit."
        )
    return "vectors" if vocab_size is None else "ids"
