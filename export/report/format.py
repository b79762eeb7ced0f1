"""Format numbers: sizes, lanes, errors; group linear ops kept in fp32 by reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
    """Format an error with three digits, such as `2.43e-07`; a dash for None."""
    return "-" if value is None else f"{value:.2e}"


def kept_in_fp32(facts: Mapping[str, Any]) -> dict[str, list[str]]:
    """Group the linear ops kept in fp32 by reason; `facts` is the `quantization` of an artifact."""
    reasons: dict[str, list[str]] = {}
    for name, reason in facts["kept_in_fp32"].items():
        reasons.setdefault(reason, []).append(name)
    return reasons
