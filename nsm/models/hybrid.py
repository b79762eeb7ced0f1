"""HybridModel: attention layers with a bounded window below, Neural State Machine layers above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from nsm.arguments import whole
from nsm.models.config import (
    LayerOptions,
    checked_options,
    checked_sizes,
    embedding,
    one_or_each,
    output_head,
    per_layer,
)
from nsm.models.stream import StreamModel
from nsm.modules import AttentionLayer, NSMLayer


class HybridModel(StreamModel):
    """`num_attention_layers` of `AttentionLayer`, then `num_nsm_layers` of `NSMLayer`: ids [B, T] -> [B, T, V].

        HybridModel(vocab_size=10000, d_model=512, num_states=64, num_attention_layers=2, num_nsm_layers=4, num_heads=8)

    The attention layers see the last `attention_window` tokens exactly; older tokens are in the banks only.

    Args:
        vocab_size: V.
        d_model: d.
        num_states: S, slots of each NSM layer, or a list of them.
        num_attention_layers, num_nsm_layers: depth of the two parts.
        num_heads: heads of all attention.
        state_dim: D (default: 2 * d_model).
        attention_window: reach of the attention layers in tokens.
        output_dim: width of the outputs (default: vocab_size).
        options: of the NSM layers, see `NSMLayer`.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int = 512,
        num_states: int | Sequence[int] = 64,
        num_attention_layers: int = 2,
        num_nsm_layers: int = 4,
        num_heads: int = 8,
        state_dim: int | None = None,
        attention_window: int = 128,
        output_dim: int | None = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        size = checked_sizes(
            "HybridModel",
            {
                "vocab_size": vocab_size,
                "d_model": whole("d_model of HybridModel", d_model),
                "num_attention_layers": num_attention_layers,
                "num_nsm_layers": num_nsm_layers,
                "num_heads": num_heads,
                "state_dim": 2 * d_model if state_dim is None else state_dim,
                "attention_window": attention_window,
                "output_dim": vocab_size if output_dim is None else output_dim,
            },
        )
        width, heads = size["d_model"], size["num_heads"]
        slots = one_or_each("HybridModel", "num_states", num_states)
        options = checked_options("HybridModel", options)
        chunk_size, causal = options.get("chunk_size", 16), options.get("causal", True)
        feed_forward = options.get("feed_forward", 4.0)
        layers = [
            *(
                AttentionLayer(width, heads, size["attention_window"], chunk_size, feed_forward, causal)
                for _ in range(size["num_attention_layers"])
            ),
            *(
                NSMLayer(size["state_dim"], width, heads, count, **options)
                for count in per_layer("HybridModel", "num_states", slots, size["num_nsm_layers"])
            ),
        ]
        embed, tokens = embedding(size["vocab_size"], None, width)
        super().__init__(embed, layers, output_head(width, size["output_dim"]), tokens, size["output_dim"])
        self.config = {**size, "num_states": slots, **options}
