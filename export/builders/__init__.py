"""One module per target, with `build(request: Request) -> Built`.

A builder converts a bundle's ONNX graphs to the files of its target. `nsm.runtimes.targets` names the module of each
target; the module is imported when the target is used.
"""

from nsm.export.builders.base import Built, Request, lacking

__all__ = [
    "Built",
    "Request",
    "lacking",
]
