"""An ONNX file as a source: read, its states found, its graph normalized and validated."""

from nsm.export.sources.onnx.source import OnnxSource, load_onnx
from nsm.export.sources.onnx.validate import whole_graph

__all__ = [
    "OnnxSource",
    "load_onnx",
    "whole_graph",
]
