"""The parts that pictures are put together from: each draws arrays into the axes it is given. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from matplotlib.image import AxesImage
from matplotlib.ticker import FixedLocator, MaxNLocator

from nsm.utils.recording import Array

# Readable with every common colour blindness and in grey: cividis (Nunez et al. 2018) for amounts, the palette of
# Okabe and Ito (2008) with a line style each for heads.
COLOURS = "cividis"
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C00", "#000000")
STYLES = ("-", "--", "-.", ":")
INK, FAINT, INACTIVE = "#222222", "#8a8a8a", "#d4d4d4"
HATCH = "/////"
SMALL, TINY = 8.0, 6.5
LONGEST_LABEL = 12

_SHOWN = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"}


def heat_map(axes: Axes, values: Array, inactive: Array, scale: Normalize) -> AxesImage:
    """Amounts by slot (down) and column, inactive slots grey and hatched.

    Args:
        values: [columns, S]; NaN is left blank.
        inactive: [columns, S] bool.
        scale: of the colours.
    """
    columns, slots = values.shape
    image = axes.imshow(values.T, COLOURS, scale, aspect="auto", origin="upper")
    image.set_gid("heat")
    mark_inactive(axes, inactive)
    axes.set_ylim(slots - 0.5, -0.5)
    axes.set_xlim(-0.5, columns - 0.5)
    slot_axis(axes)
    return image


def mark_inactive(axes: Axes, inactive: Array) -> None:
    """Grey, hatched boxes over the cells [columns, S] that are set: one box for each run along a slot."""
    boxes = []
    for slot, row in enumerate(inactive.T):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], row, [False]]).astype(int)))
        for begin, end in zip(edges[::2] - 0.5, edges[1::2] - 0.5, strict=True):
            low, high = slot - 0.5, slot + 0.5
            boxes.append([(begin, low), (end, low), (end, high), (begin, high)])
    if boxes:
        marks = PolyCollection(boxes, facecolors=INACTIVE, edgecolors=FAINT, linewidths=0, hatch=HATCH)
        marks.set_gid("inactive")
        axes.add_collection(marks, autolim=False)


def importance_bars(axes: Axes, importance: Array, active: Array, threshold: float | None) -> None:
    """A bar for the importance in (0, 1) of each slot [S], beside a heat map of the same slots."""
    slots = np.arange(len(importance))
    bars = axes.barh(slots, importance, height=0.8 if len(slots) <= 40 else 1.0, color=PALETTE[0])
    for bar, lives in zip(bars, active, strict=True):
        if not lives:
            bar.set(facecolor=INACTIVE, edgecolor=FAINT, hatch=HATCH, linewidth=0)
    if threshold is not None:
        line = axes.axvline(threshold, color=PALETTE[5], linewidth=1, linestyle="--")
        line.set_gid("threshold")
    axes.set_xlim(0, 1)
    axes.set_ylim(len(importance) - 0.5, -0.5)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.tick_params(labelsize=TINY, colors=INK)
    slot_axis(axes)


def head_lines(axes: Axes, values: Array, name: str) -> None:
    """Values of tokens [n, R]: their mean over heads, and where there are several heads a thin line for each."""
    columns = np.arange(len(values))
    if values.shape[1] > 1:
        for head, line in enumerate(values.T):
            style = {"color": PALETTE[head % len(PALETTE)], "linestyle": STYLES[head // len(PALETTE) % len(STYLES)]}
            axes.plot(columns, line, linewidth=0.7, alpha=0.75, label=f"head {head}", **style)  # type: ignore[arg-type]
    axes.plot(columns, values.mean(1), color=INK, linewidth=1.6, marker="." if len(values) < 2 else None, label=name)
    axes.tick_params(labelsize=SMALL, colors=INK)
    axes.grid(axis="y", color=INACTIVE, linewidth=0.5)


def slot_axis(axes: Axes) -> None:
    """Whole numbers, as many as there is room for."""
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.tick_params(axis="y", labelsize=SMALL, colors=INK)


def number_axis(axes: Axes, numbers: Array, width: float) -> None:
    """Name columns by their `numbers` [columns], which need not be consecutive; `width` of the axes in inches."""
    room = max(2, int(width * 2))
    columns = np.arange(0, len(numbers), -(-len(numbers) // room))
    for round_number in (base * 10**power for power in range(8) for base in (1, 2, 5)):
        found = np.flatnonzero(numbers % round_number == 0)
        if len(found) <= room:
            # Numbers none of which is round are named at even distances.
            columns = found if len(found) >= 2 else columns
            break
    axes.set_xticks(columns, [str(int(numbers[column])) for column in columns])
    axes.tick_params(axis="x", labelsize=SMALL, colors=INK)


def label_axis(axes: Axes, labels: Sequence[str], stride: int) -> None:
    """Name every `stride`-th column by its token's label: letters as they are, longer ones turned upright."""
    columns = range(0, len(labels), stride)
    names = [shown(labels[column]) for column in columns]
    axes.set_xticks(columns, names, rotation=90 if any(len(name) > 1 for name in names) else 0, family="monospace")
    axes.tick_params(axis="x", labelsize=TINY, colors=INK, length=2)
    for tick in axes.get_xticklabels():
        tick.set_parse_math(False)


def mark_steps(axes: Axes, positions: Array, step: int) -> None:
    """Short ticks on top where a new chunk begins, if they can be told apart."""
    begins = np.flatnonzero(np.diff(positions // step)) + 0.5
    if 0 < len(begins) <= len(positions) / 2 and len(begins) <= 128:
        top = axes.secondary_xaxis("top")
        top.xaxis.set_major_locator(FixedLocator(begins.tolist()))
        top.set_xticklabels([])
        top.tick_params(length=3, colors=FAINT)


def shown(label: str) -> str:
    """A token as it can be printed on one line: blanks visible, control characters escaped, long ones cut."""
    text = "".join(_SHOWN.get(c, c if c.isprintable() else c.encode("unicode_escape").decode()) for c in label)
    return text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "\u2026"
