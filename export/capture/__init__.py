"""Capture: trace a PyTorch module with `torch.export`, in operators that every target supports."""

from nsm.export.capture.program import DETAILS, capture, first_line, quiet
from nsm.export.capture.retrace import Retrace, move_modules
from nsm.export.capture.rewrite import rewritten
from nsm.export.capture.source_line import SourceLine, causes, line_of_error, line_of_node, module_of

__all__ = [
    "DETAILS",
    "Retrace",
    "SourceLine",
    "capture",
    "causes",
    "first_line",
    "line_of_error",
    "line_of_node",
    "module_of",
    "move_modules",
    "quiet",
    "rewritten",
]
