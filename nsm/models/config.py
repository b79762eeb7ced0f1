"""Options of the layers and helpers to build a stack, shared by the models of the family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypedDict, cast, get_type_hints

import numpy as np
import torch
from torch import nn

from nsm.arguments import each_whole, flag, real, whole
from nsm.errors import ConfigError
from nsm.modules.bank import GateType, Routing
from nsm.spec import TensorSpec


class LayerOptions(TypedDict, total=False):
    """Options that a model hands on to each of its `NSMLayer`s, where they are explained."""

    gate_type: GateType
    chunk_size: int
    window: int | None
    routing_heads: int
    routing: Routing
    top_k: int | None
    consolidate_every: int
    communication: bool
    conv_width: int
    feed_forward: float
    hierarchy: Sequence[int]
    memory_rows: int
    causal: bool


EMBEDDING_STD = 0.1
_TO_PLAIN: Mapping[Any, Callable[[str, Any], Any]] = MappingProxyType(
    {int: whole, int | None: whole, bool: flag, float: real, Sequence[int]: each_whole}
)
"""Conversion to plain numbers, by the declared type of an option; options of other types stay as they are."""


def checked_sizes(model: str, sizes: Mapping[str, int | None]) -> dict[str, int]:
    """The sizes that are given, as plain numbers, all >= 1.

    Raises:
        ConfigError: names the first that is not.
    """
    found = {name: whole(f"{name} of {model}", value) for name, value in sizes.items() if value is not None}
    for name, value in found.items():
        if value < 1:
            raise ConfigError(f"{model} needs {name} >= 1; given {value}.")
    return found


def checked_options(model: str, options: LayerOptions) -> LayerOptions:
    """Convert options to plain numbers for a checkpoint. The layers check the values.

    Raises:
        ConfigError: names the first of another type.
    """
    declared = get_type_hints(LayerOptions)
    found = dict(cast(dict[str, Any], options))
    for name, value in found.items():
        convert = _TO_PLAIN.get(declared.get(name))
        if convert is not None and value is not None:
            found[name] = convert(f"{name} of {model}", value)
    return cast(LayerOptions, found)


def one_or_each(model: str, name: str, value: int | Sequence[int]) -> int | list[int]:
    """A size for all layers, or a list with one for each, in plain numbers.

    Raises:
        ConfigError: it is of another type.
    """
    what = f"{name} of {model}"
    return each_whole(what, value) if isinstance(value, Sequence | np.ndarray) else whole(what, value)


def per_layer(model: str, name: str, value: int | list[int], layers: int) -> list[int]:
    """A size of each layer, from one for all or a list of them.

    Raises:
        ConfigError: a list of another length, or sizes below 1.
    """
    sizes = [value] * layers if isinstance(value, int) else value
    if len(sizes) != layers or any(size < 1 for size in sizes):
        raise ConfigError(
            f"{model} needs {name} >= 1, one for all or one for each of its {layers} layers; given {value}."
        )
    return sizes


def check_one_form(model: str, vocab_size: int | None, input_dim: int | None) -> None:
    """Raise `ConfigError` unless exactly one of the two forms of tokens is asked for."""
    if (vocab_size is None) == (input_dim is None):
        raise ConfigError(
            f"{model} takes either vocab_size (a stream of ids) or input_dim (a stream of vectors), and exactly one; "
            f"given vocab_size={vocab_size}, input_dim={input_dim}."
        )


def embedding(
    vocab_size: int | None, input_dim: int | None, width: int, std: float = EMBEDDING_STD
) -> tuple[nn.Module, TensorSpec]:
    """The embedding of ids or vectors, and the spec of one token.

    Args:
        vocab_size, input_dim: one of them.
        width: of an embedded token.
        std: initial standard deviation of the table of ids. A small one gives the first layers more weight; an NSM
            learns sooner with it, a transformer later (docs/measurements.md, "Language").
    """
    if vocab_size is not None:
        embed = nn.Embedding(vocab_size, width)
        with torch.no_grad():
            embed.weight.mul_(std)
        return embed, TensorSpec("tokens", (), "int64", None, 0, vocab_size - 1)
    assert input_dim is not None
    return nn.Linear(input_dim, width), TensorSpec("tokens", (input_dim,), "float32")


def output_head(width: int, output_dim: int) -> nn.Module:
    """Norm and linear map to the outputs."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, output_dim))
