"""Charts as SVG text, for a self-contained page. Colours are CSS classes, so that the page may be light or dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from nsm.trace import Array

WIDTH, HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 14, 44


@dataclass(frozen=True)
class LogAxis:
    """Maps values to pixels on a log scale; values outside the range map to its edge."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Return the pixel of a value > 0."""
        inside = min(max(value, self.low), self.high)
        span = math.log10(self.high / self.low)
        return self.start + (self.end - self.start) * math.log10(inside / self.low) / span

    def ticks(self) -> list[float]:
        """Return powers of ten in the range, at most about eight."""
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        every = max(1, -(-(last - first) // 8))
        return [10.0**power for power in range(first, last + 1, every)]


@dataclass(frozen=True)
class Line:
    """A named curve; `style` is a CSS class of the page. Points that are not positive are not drawn."""

    name: str
    x: Array
    y: Array
    style: str


def log_chart(lines: Sequence[Line], x_title: str, y_title: str, mark: tuple[float, float, str] | None = None) -> str:
    """Draw curves on two log axes, with a legend below; return "" if no point can be drawn.

    Args:
        lines: curves; x and y of a curve have the same shape.
        x_title, y_title: titles of the axes.
        mark: x, y and label of a point to mark.
    """
    known = [line for line in lines if _drawable(line).any()]
    if not known:
        return ""
    xs = np.concatenate([line.x[_drawable(line)] for line in known])
    ys = np.concatenate([line.y[_drawable(line)] for line in known])
    across = LogAxis(float(xs.min()), max(float(xs.max()), float(xs.min()) * 2), _LEFT, WIDTH - _RIGHT)
    up = LogAxis(_decade(float(ys.min()), down=True), _decade(float(ys.max()), down=False), HEIGHT - _BOTTOM, _TOP)
    parts = [*_frame(across, up, x_title, y_title)]
    for line in known:
        kept = _drawable(line)
        points = " ".join(f"{across.at(x):.1f},{up.at(y):.1f}" for x, y in zip(line.x[kept], line.y[kept], strict=True))
        parts.append(f'<polyline class="line {line.style}" points="{points}"/>')
    if mark is not None and mark[1] > 0:
        x, y = across.at(mark[0]), up.at(mark[1])
        side, shift = ("end", -6) if x > WIDTH / 2 else ("start", 6)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{up.start}" y2="{up.end}"/>')
        parts.append(f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
        parts.append(
            f'<text class="marked" x="{x + shift:.1f}" y="{up.end + 12:.1f}" text-anchor="{side}">'
            f"{escape(mark[2])}</text>"
        )
    legend = "".join(
        f'<span class="key"><svg width="26" height="10" aria-hidden="true"><line class="line {line.style}" x1="1" '
        f'x2="25" y1="5" y2="5"/></svg> {escape(line.name)}</span>'
        for line in known
    )
    return _svg(HEIGHT, parts, f"{y_title} over {x_title}") + f'<div class="legend">{legend}</div>'


def heat_map(rows: Mapping[str, Array], columns: Sequence[str], limit: float, x_title: str) -> str:
    """Draw a cell per row and column; darker cells are closer to the limit, on a log scale of four decades.

    Cells over the limit have another colour and a cross; NaN cells are empty.

    Args:
        rows: values >= 0, [columns], by name of the row.
        columns: names of the columns.
        limit: the value of full strength.
        x_title: title of the columns.
    """
    left, cell = 150, 18
    wide = (WIDTH - left - _RIGHT) / max(len(columns), 1)
    height = cell * len(rows) + _BOTTOM
    parts = []
    for index, (name, values) in enumerate(rows.items()):
        y = cell * index
        parts.append(f'<text class="tick" x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        for place, value in enumerate(values.tolist()):
            if math.isnan(value):
                continue
            over = value > limit
            style = "cell over" if over else "cell"
            strength = 1.0 if over else _strength(value, limit)
            x = left + wide * place
            parts.append(
                f'<rect class="{style}" x="{x:.1f}" y="{y + 1}" width="{max(wide - 2, 1):.1f}" height="{cell - 2}" '
                f'fill-opacity="{strength:.2f}"><title>{escape(name)}, {escape(columns[place])}: {value:.2e}</title>'
                "</rect>"
            )
            if over:
                parts.append(f'<text class="cross" x="{x + wide / 2 - 1:.1f}" y="{y + 13}">&#215;</text>')
    every = max(1, math.ceil(len(columns) / 16))
    parts += [
        f'<text class="tick" x="{left + wide * (place + 0.5):.1f}" y="{height - 26}" text-anchor="middle">'
        f"{escape(column)}</text>"
        for place, column in enumerate(columns)
        if place % every == 0
    ]
    parts.append(_title(left + (WIDTH - left - _RIGHT) / 2, height - 6, x_title))
    return _svg(height, parts, f"a cell per state and {x_title}")


def histogram(values: Array, marked: Array, bound: float, x_title: str, y_title: str) -> str:
    """Draw a histogram with bins of powers of 10^(1/4) on two log axes; marked values have separate bars.

    Args:
        values: values > 0; values below a millionth of the largest count as that, non-finite values are skipped.
        marked: [values] bool.
        bound: value at which to draw a line.
        x_title, y_title: titles of the axes.
    """
    kept = np.isfinite(values)
    if not kept.any() or not values[kept].max() > 0:
        return ""
    high = 10 ** (math.ceil(4 * math.log10(float(values[kept].max()))) / 4)
    across = LogAxis(high * 1e-6, high, _LEFT, WIDTH - _RIGHT)
    edges = across.low * 10 ** (np.arange(25) / 4)
    inside = np.clip(values[kept], edges[0], edges[-1])
    everything, _ = np.histogram(inside, edges)
    of_marked, _ = np.histogram(inside[marked[kept]], edges)
    up = LogAxis(0.7, _decade(float(everything.max()), down=False), HEIGHT - _BOTTOM, _TOP)
    parts = [*_frame(across, up, x_title, y_title)]
    for counts, style in ((everything, "bar"), (of_marked, "bar bad")):
        for index, count in enumerate(counts.tolist()):
            if not count:
                continue
            x, x_end, y = across.at(edges[index]), across.at(edges[index + 1]), up.at(count)
            parts.append(
                f'<rect class="{style}" x="{x + 1:.1f}" y="{y:.1f}" width="{x_end - x - 2:.1f}" '
                f'height="{up.start - y:.1f}"><title>{count} between {edges[index]:.1e} and {edges[index + 1]:.1e}'
                "</title></rect>"
            )
    if across.low < bound < across.high:
        x = across.at(bound)
        parts.append(f'<line class="line budget" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{up.start}"/>')
        parts.append(f'<text class="tick" x="{x - 6:.1f}" y="{_TOP + 10}" text-anchor="end">excused up to here</text>')
    return _svg(HEIGHT, parts, f"{y_title} by {x_title}")


def _drawable(line: Line) -> Array:
    kept: Array = np.isfinite(line.y) & (line.y > 0) & (line.x > 0)
    return kept


def _decade(value: float, down: bool) -> float:
    """Return the next power of ten below or above, with a small gap."""
    power = math.log10(value)
    return 10.0 ** (math.floor(power - 0.05) if down else math.ceil(power + 0.05))


def _strength(value: float, limit: float) -> float:
    """Return the opacity of a cell: 0.06 at four decades below the limit, 0.85 at the limit."""
    if value <= 0:
        return 0.03
    return 0.06 + 0.79 * min(max(1 + math.log10(value / limit) / 4, 0.0), 1.0)


def _frame(across: LogAxis, up: LogAxis, x_title: str, y_title: str) -> list[str]:
    parts = []
    for tick in up.ticks():
        y = up.at(tick)
        parts.append(f'<line class="grid" x1="{across.start}" x2="{across.end}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{across.start - 8}" y="{y + 4:.1f}" text-anchor="end">{_label(tick)}</text>'
        )
    for tick in across.ticks():
        x = across.at(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{up.start}" y2="{up.end}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{up.start + 16}" text-anchor="middle">{_label(tick)}</text>')
    parts.append(_title((across.start + across.end) / 2, up.start + 36, x_title))
    middle = (up.start + up.end) / 2
    parts.append(
        f'<text class="title" x="12" y="{middle:.0f}" text-anchor="middle" transform="rotate(-90 12 {middle:.0f})">'
        f"{escape(y_title)}</text>"
    )
    return parts


def _label(tick: float) -> str:
    return f"{tick:.0f}" if 1 <= tick < 1e5 else f"1e{round(math.log10(tick))}"


def _title(x: float, y: float, text: str) -> str:
    return f'<text class="title" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(text)}</text>'


def _svg(height: float, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )
