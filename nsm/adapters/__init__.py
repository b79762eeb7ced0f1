"""Any stateful torch module as a step model: `nsm.as_step`. `validate`, the examination, needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsm.adapters.adapted import AdaptedModel as AdaptedModel

__all__ = ["AdaptedModel"]


def __getattr__(name: str) -> Any:
    if name != "AdaptedModel":
        raise AttributeError(f"module 'nsm.adapters' has no attribute {name!r}")
    # Imported when it is used: a foreign .onnx is examined without torch.
    from nsm.adapters.adapted import AdaptedModel

    return AdaptedModel
