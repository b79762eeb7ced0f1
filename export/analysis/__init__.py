"""Analysis: rooflines, savings of `--compact`, installed packages, states of ONNX files."""

from typing import TYPE_CHECKING

from nsm.lazy import lazy_names

if TYPE_CHECKING:
    from nsm.export.analysis.installation import examine as examine
    from nsm.export.analysis.installation import usable as usable
    from nsm.export.analysis.onnx_inspection import inspect_onnx as inspect_onnx
    from nsm.export.analysis.roofline import calls_of as calls_of
    from nsm.export.analysis.roofline import measure_reached as measure_reached
    from nsm.export.analysis.roofline import products as products
    from nsm.export.analysis.savings import Savings as Savings
    from nsm.export.analysis.savings import measure_savings as measure_savings
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "installation": ("examine", "usable"),
            "onnx_inspection": ("inspect_onnx",),
            "roofline": ("calls_of", "measure_reached", "products"),
            "savings": ("Savings", "measure_savings"),
        },
    )
