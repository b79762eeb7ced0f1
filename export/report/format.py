"""Format numbers: sizes, lanes, errors."""

from __future__ import annotations

import math


def size(count: float) -> str:
    """Format bytes with a decimal unit, such as `145.3 kB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def lanes_of(count: int) -> str:
    """Format a number of lanes: `1 lane`, `8 lanes`."""
    return f"{count} lane" if count == 1 else f"{count} lanes"


def number(value: float | None) -> str:
    """Format an error with three digits, such as `2.43e-07`; a dash for None and NaN."""
    return "-" if value is None or math.isnan(value) else f"{value:.2e}"
