"""Export: from a model to a verified bundle.

`pipeline` is the main path, `api` its entry from Python, `cli` the command line. `sources` loads models, `graphs`
exports and rewrites ONNX, `builders` makes the artifact of each target, `verify` compares it with the reference,
`report` and `analysis` describe the result.
"""

from typing import TYPE_CHECKING

from nsm.lazy import lazy_names

if TYPE_CHECKING:
    from nsm.export.api import export_model as export_model
    from nsm.export.options import ExportOptions as ExportOptions
    from nsm.export.pipeline import export as export
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "api": ("export_model",),
            "options": ("ExportOptions",),
            "pipeline": ("export",),
        },
    )
