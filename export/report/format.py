"""Numbers as text: sizes, lanes, errors, and the reasons why linear ops stay in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def size(count: float) -> str:
    """Bytes for people, in powers of ten."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def lanes_of(count: int) -> str:
    """`1 lane`, `8 lanes`."""
    return f"{count} lane" if count == 1 else f"{count} lanes"


def number(value: float | None) -> str:
    """An error or exponent in three figures, a dash where there is none."""
    return "-" if value is None else f"{value:.2e}"


def kept_in_fp32(facts: Mapping[str, Any]) -> dict[str, list[str]]:
    """By reason, the linear ops that are kept in fp32; `facts` is the `quantization` of an artifact."""
    reasons: dict[str, list[str]] = {}
    for name, reason in facts["kept_in_fp32"].items():
        reasons.setdefault(reason, []).append(name)
    return reasons
