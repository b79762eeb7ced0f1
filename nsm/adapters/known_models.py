"""Whole-sequence forwards of models of known libraries, which a step around such a model is compared with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nsm.spec import TensorSpec


def known_forward(module: nn.Module, token: TensorSpec) -> tuple[str, Callable[[Tensor], Tensor]] | None:
    """The forward of the one model of `transformers` inside a module, over sequences of ids [1, T].

    Returns:
        Its name, and ids [1, T] -> logits [1, T, vocabulary] (hidden states [1, T, width] of a model without a head);
        None where there is no such model, or more than one, or tokens are not ids.
    """
    # Not imported here: where nobody has imported it, no model of it is inside.
    library: Any = sys.modules.get("transformers")
    if library is None or token.dtype != "int64" or token.shape:
        return None
    inside: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        nested = any(not outer or name.startswith(f"{outer}.") for outer in inside)
        if isinstance(part, library.PreTrainedModel) and not nested:
            inside[name] = part
    if len(inside) != 1:
        return None
    ((name, model),) = inside.items()

    def forward(ids: Tensor) -> Tensor:
        given: Any = model(input_ids=ids, use_cache=False)
        result: Tensor = given.logits if "logits" in given else given.last_hidden_state
        return result

    return f"{name or 'the module'} ({type(model).__name__}.forward)", forward
