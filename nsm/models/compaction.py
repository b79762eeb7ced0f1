"""compact(model): remove slots that are never used; the outputs do not change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from nsm.errors import ConfigError, InputError
from nsm.models.adaptive import AdaptiveNSM
from nsm.models.base import duplicate
from nsm.models.checkpoint import checked_sample, taken_by
from nsm.models.hybrid import HybridModel
from nsm.models.simple import SimpleNSM
from nsm.models.stream import StreamModel
from nsm.modules import NSMLayer

Model = TypeVar("Model", bound=SimpleNSM | AdaptiveNSM | HybridModel)

# Weights of a layer whose first axis are the slots.
_BY_SLOT = ("manager.bank", "manager.importance", "manager.mask")


def compact(model: Model, sequences: Sequence[ArrayLike] | None = None) -> Model:
    """A model without the slots that are masked when a stream begins and that no sequence allocates.

    On streams that allocate none of the removed slots the outputs are the same, to the rounding of fp32. Where nothing
    adapts, that is every stream.

    Args:
        model: stays as it is.
        sequences: representative streams, [T] ids or [T, input_dim] vectors each, of any that `nsm.save` takes as
            samples. An `AdaptiveNSM` needs them.

    Returns:
        A model of the same class, in the same mode, of the same dtype and on the same device, with smaller banks.

    Raises:
        ConfigError: a model with a hierarchy, whose banks have fixed sizes.
        InputError: an adaptive model without sequences, or with one that it does not take.
    """
    layers = nsm_layers(model)
    if any(layer.consolidation.hierarchy for layer in layers):
        raise ConfigError("A hierarchy has banks of fixed sizes; compact takes models without one.")
    kept = [torch.nonzero(used).flatten() for used in used_slots(model, sequences)]
    kept = [_at_least(index, layer) for index, layer in zip(kept, layers, strict=True)]
    name = "max_states" if isinstance(model, AdaptiveNSM) else "num_states"
    config = {**model.config, name: [len(index) for index in kept], "initial_states": None}
    if isinstance(model, HybridModel):
        del config["initial_states"]
    smaller: Model = type(model)(**config)
    smaller.to(next(model.parameters()))
    weights = model.state_dict()
    numbers = [index for index, layer in enumerate(model.layers) if isinstance(layer, NSMLayer)]
    for number, index, layer in zip(numbers, kept, layers, strict=True):
        prefix = f"layers.{number}."
        for part in _BY_SLOT:
            weights[prefix + part] = weights[prefix + part][index]
        score = weights[prefix + "router.score.weight"]
        by_slot = score.view(layer.heads, -1, score.shape[-1])
        weights[prefix + "router.score.weight"] = by_slot[:, index].reshape(-1, score.shape[-1])
    smaller.load_state_dict(weights)
    smaller.train(model.training)
    return smaller


@torch.no_grad()
def used_slots(model: StreamModel, sequences: Sequence[ArrayLike] | None = None) -> list[Tensor]:
    """For each NSM layer the slots, [S] bool, that are active when a stream begins or at any commit of a sequence."""
    layers = nsm_layers(model)
    used = [layer.manager.mask.clone() for layer in layers]
    if all(layer.adaptation is None for layer in layers):
        return used
    if sequences is None or not len(sequences):
        raise InputError(
            "The slots that an adaptive model uses are known from streams only: give sequences, or save some with the "
            "model (nsm.save(model, path, samples=...))."
        )
    names = [f"{index}.mask" for index, layer in enumerate(model.layers) if isinstance(layer, NSMLayer)]
    model = duplicate(model).eval()
    checked = [checked_sample(model, index, item, "sequences") for index, item in enumerate(sequences)]
    for sequence in checked:
        tokens = taken_by(model, sequence).unsqueeze(0)
        state = model.initial_state(1)
        for piece in tokens.split(model.chunk_size, 1):
            _, state = model(piece, state, return_state=True)
            used = [before | state[name][0] for before, name in zip(used, names, strict=True)]
    return used


def nsm_layers(model: StreamModel) -> list[NSMLayer]:
    """The layers of a model that have a bank."""
    return [layer for layer in model.layers if isinstance(layer, NSMLayer)]


def _at_least(index: Tensor, layer: NSMLayer) -> Tensor:
    """As many slots as top-k routing chooses from."""
    wanted = layer.router.top_k or 1
    if len(index) >= wanted:
        return index
    free = [slot for slot in range(len(layer.manager.mask)) if slot not in set(index.tolist())]
    return torch.tensor(sorted([*index.tolist(), *free[: wanted - len(index)]]))
