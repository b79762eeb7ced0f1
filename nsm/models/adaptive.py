"""AdaptiveNSM: banks that prune and allocate their own slots while they run, deployed or not."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Unpack

from nsm.arguments import real, whole
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
from nsm.modules.bank import Adaptation, StateManager


class AdaptiveNSM(StreamModel):
    """A stack of `NSMLayer`s that prune and allocate their slots at run time.

        AdaptiveNSM(input_dim=768, state_dim=256, max_states=64, initial_states=16, prune_threshold=0.1)

    x [B, T, input_dim] -> [B, T, output_dim], or ids [B, T] with `vocab_size`. When a chunk is committed, slots that
    are hardly written are pruned, and a free one is allocated when all are busy or the tokens fit none; see
    `Adaptation`. Shapes never change: decisions are values of `mask`, and part of the state of the exported graph.

    Args:
        input_dim / vocab_size: vectors or ids; exactly one of them.
        state_dim: D, numbers per slot.
        max_states: S, slots per layer, or a list of them.
        initial_states: how many of them are active when a stream begins, None for all.
        prune_threshold, allocate_threshold, novelty_threshold: see `Adaptation`.
        output_dim: width of the outputs (default: input_dim, or vocab_size).
        d_model: width of a token (default: state_dim / 2).
        num_layers, num_heads: depth, and heads of the attention (default: 4, or the largest divisor of it that divides
            d_model).
        options: of the layers, see `NSMLayer`.

    Raises:
        ConfigError: sizes that do not fit together, or thresholds without a gap between them.
    """

    def __init__(
        self,
        *,
        input_dim: int | None = None,
        vocab_size: int | None = None,
        state_dim: int = 256,
        max_states: int | Sequence[int] = 64,
        initial_states: int | None = 16,
        prune_threshold: float = 0.1,
        allocate_threshold: float = 0.45,
        novelty_threshold: float = 0.9,
        output_dim: int | None = None,
        d_model: int | None = None,
        num_layers: int = 2,
        num_heads: int | None = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        check_one_form("AdaptiveNSM", vocab_size, input_dim)
        sizes = {
            "vocab_size": vocab_size,
            "input_dim": input_dim,
            "state_dim": whole("state_dim of AdaptiveNSM", state_dim),
            "output_dim": next(size for size in (output_dim, input_dim, vocab_size) if size is not None),
            "d_model": state_dim // 2 if d_model is None else d_model,
            "num_layers": num_layers,
            "num_heads": 4 if num_heads is None else num_heads,
        }
        size = checked_sizes("AdaptiveNSM", sizes)
        width = size["d_model"]
        if num_heads is None:
            size["num_heads"] = gcd(size["num_heads"], width)
        slots = one_or_each("AdaptiveNSM", "max_states", max_states)
        begin = None if initial_states is None else whole("initial_states of AdaptiveNSM", initial_states)
        thresholds = {
            "prune_threshold": real("prune_threshold of AdaptiveNSM", prune_threshold),
            "allocate_threshold": real("allocate_threshold of AdaptiveNSM", allocate_threshold),
            "novelty_threshold": real("novelty_threshold of AdaptiveNSM", novelty_threshold),
        }
        adaptation = Adaptation(**thresholds)
        options = checked_options("AdaptiveNSM", options)
        layers = [
            NSMLayer(
                size["state_dim"],
                width,
                size["num_heads"],
                count,
                initial_states=begin,
                prune_threshold=thresholds["prune_threshold"],
                adaptation=adaptation,
                **options,
            )
            for count in per_layer("AdaptiveNSM", "max_states", slots, size["num_layers"])
        ]
        embed, tokens = embedding(size.get("vocab_size"), size.get("input_dim"), width)
        super().__init__(embed, layers, output_head(width, size["output_dim"]), tokens, size["output_dim"])
        self.config = {**size, "max_states": slots, "initial_states": begin, **thresholds, **options}

    @property
    def state_managers(self) -> list[StateManager]:
        """The manager of every layer: the slots that are active when a stream begins."""
        return [layer.manager for layer in self.layers if isinstance(layer, NSMLayer)]

    @property
    def state_manager(self) -> StateManager:
        """The manager of the first layer."""
        return self.state_managers[0]
