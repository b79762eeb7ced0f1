"""Adapters: a stateful module of another project as a step model (`as_step`).

`validate` examines a step before it is believed. It needs no torch, because an ONNX file is examined too.
"""

from typing import TYPE_CHECKING

from nsm.lazy import lazy_names

if TYPE_CHECKING:
    from nsm.adapters.conversion import as_step as as_step
    from nsm.adapters.model import AdaptedModel as AdaptedModel
    from nsm.adapters.state import Carried as Carried
    from nsm.adapters.torch_step import TorchStep as TorchStep
    from nsm.adapters.torch_step import examine_model as examine_model
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "conversion": ("as_step",),
            "model": ("AdaptedModel",),
            "state": ("Carried",),
            "torch_step": ("TorchStep", "examine_model"),
        },
    )
