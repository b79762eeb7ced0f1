"""Reading an untrusted ONNX file: its limits, its operators, its inputs and outputs."""

from nsm.export.sources.onnx.file.limits import check_main
from nsm.export.sources.onnx.file.operators import where
from nsm.export.sources.onnx.file.reading import (
    Port,
    Shape,
    default_inputs,
    fix_inputs,
    fix_shapes,
    opset_of,
    ports,
    read_onnx,
    real_inputs,
    take_default,
)

__all__ = [
    "Port",
    "Shape",
    "check_main",
    "default_inputs",
    "fix_inputs",
    "fix_shapes",
    "opset_of",
    "ports",
    "read_onnx",
    "real_inputs",
    "take_default",
    "where",
]
