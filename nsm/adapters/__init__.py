"""Any stateful torch module as a step model: `as_step`."""

from nsm.adapters.adapted import AdaptedModel as AdaptedModel
from nsm.adapters.as_step import as_step as as_step

__all__ = ["AdaptedModel", "as_step"]
