"""Limits of a checkpoint: its contents and config are checked against its size before memory is allocated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from nsm.errors import ConfigError
from nsm.files import LIMITS
from nsm.models.base import StepModel

MOST_ITEMS = 1_000_000
"""Items of all containers in a checkpoint, those counted twice that are there twice."""

DEEPEST = 100
"""How deep containers nest."""

MOST_BYTES = LIMITS["tensor"]
"""Of the states of a stream, and of a model's constants that are no weights: no file bounds them."""

Model = TypeVar("Model", bound=StepModel)


def check_content(content: object, size: int) -> None:
    """Refuse content that a small file can make large: nested containers, huge integers, views of tensors.

    Args:
        content: result of `torch.load`.
        size: bytes of the file.

    Raises:
        ValueError: names the content.
    """
    _count(content, {}, 0)
    for key in ("golden", "calibration"):
        samples = content.get(key) if isinstance(content, dict) else None
        if isinstance(samples, list):
            nbytes = sum(item.nbytes for item in samples if isinstance(item, Tensor))
            if nbytes > size:
                raise ValueError(f"its {key} sequences have {nbytes:,} bytes, and the whole file {size:,}")


def _count(item: object, known: dict[int, int], depth: int) -> int:
    """How many items an object becomes where it is written out; each container is looked into once."""
    if isinstance(item, Tensor):
        _check_tensor(item)
        return 1
    if isinstance(item, int) and abs(item) >= 1 << 63:
        raise ValueError(f"a number in it has {item.bit_length():,} bits; expected at most 63")
    if not isinstance(item, (dict, list, tuple, set, frozenset)):
        return 1
    if id(item) not in known:
        if depth == DEEPEST:
            raise ValueError(f"its containers nest more than {DEEPEST} deep")
        inside = [*item.keys(), *item.values()] if isinstance(item, dict) else list(item)
        known[id(item)] = MOST_ITEMS  # of one that holds itself
        known[id(item)] = 1 + sum(_count(part, known, depth + 1) for part in inside)
    if known[id(item)] > MOST_ITEMS:
        raise ValueError(f"its containers hold more than {MOST_ITEMS:,} items, written out")
    return known[id(item)]


def _check_tensor(tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise ValueError(f"a tensor in it is {tensor.layout} on {tensor.device}; expected plain ones on the CPU")
    held = tensor.untyped_storage().nbytes()
    if tensor.nbytes > held:
        raise ValueError(
            f"a tensor in it, {list(tensor.shape)} of {tensor.dtype}, has {tensor.nbytes:,} bytes over {held:,} that "
            "are there"
        )


def build_within(kind: type[Model], config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Model:
    """The model of a config, its weights not loaded yet, where the weights of the file fit it.

    It is built without memory first, on the device "meta", with no more weights than the file holds.

    Raises:
        ConfigError: it would have other weights, or states and constants of more than `MOST_BYTES`.
        Exception: of the model's class, for the config.
    """
    if not isinstance(config, dict) or not isinstance(weights, dict):
        raise ConfigError("its config and its weights are dictionaries by name.")
    for name, count in config.items():
        if str(name).endswith("layers") and isinstance(count, int) and count > max(1, len(weights)):
            raise ConfigError(f"its config has {name}={count:,}, and the file {len(weights):,} weights.")
    with torch.device("meta"), _at_most(len(weights)):
        shape_only = kind(**config)
    wanted = {name: list(value.shape) for name, value in shape_only.state_dict().items()}
    held = {name: list(value.shape) for name, value in weights.items() if isinstance(value, Tensor)}
    if wanted != held:
        name = next(name for name in {**wanted, **held} if wanted.get(name) != held.get(name))
        raise ConfigError(
            f"by its config the weight {name} is {wanted.get(name, 'absent')}, in the file {held.get(name, 'absent')}."
        )
    constants = sum(value.nbytes for name, value in shape_only.named_buffers() if name not in held)
    states = shape_only.spec(shape_only.lanes or 1).state_nbytes
    if max(constants, states) > MOST_BYTES:
        raise ConfigError(
            f"by its config a stream has {states:,} bytes of states, and the model {constants:,} bytes of constants; "
            f"at most {MOST_BYTES:,} are taken."
        )
    return kind(**config)


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Raise `ConfigError` where modules are given more parameters, or more buffers, than `count` and some."""
    made = {"parameters": 0, "buffers": 0}

    def one_more(what: str) -> None:
        made[what] += 1
        if made[what] > 2 * count + 100:  # shared tensors count twice, and some buffers are no weights
            raise ConfigError(f"by its config the model has more {what} than the {count:,} weights in the file.")

    def parameter(_module: nn.Module, _name: str, _value: nn.Parameter) -> None:
        one_more("parameters")

    def buffer(_module: nn.Module, _name: str, _value: Tensor) -> None:
        one_more("buffers")

    hooks = (
        register_module_parameter_registration_hook(parameter),
        register_module_buffer_registration_hook(buffer),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
