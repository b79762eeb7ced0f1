"""Reports: tables and progress on a terminal, the parity report in HTML, formatting of numbers."""

from nsm.export.report.console import PARITY_COLUMNS, Terminal, low_precision_lines, parity_row, stream_lines
from nsm.export.report.format import lanes_of, number, size
from nsm.export.report.html import check_page, write_page

__all__ = [
    "PARITY_COLUMNS",
    "Terminal",
    "check_page",
    "lanes_of",
    "low_precision_lines",
    "number",
    "parity_row",
    "size",
    "stream_lines",
    "write_page",
]
