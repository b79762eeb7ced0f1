"""Whole pictures of a recording, one function each. Needs matplotlib, and nothing of its global state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from nsm.errors import InputError
from nsm.utils import panels
from nsm.utils.panels import INK, SMALL
from nsm.utils.recording import Array, LayerRecording, Recording

WIDTH, DPI = 12.0, 130  # of a picture in inches, and dots per inch
STRIP = 0.9  # of the importance beside a heat map, in inches
# How many tokens an inch of a panel shows so that each can be told apart; longer streams go on in a row below,
# up to so many rows, and then get denser.
LABELLED_PER_INCH, BARE_PER_INCH = 9, 50
MOST_LABELLED_ROWS, MOST_BARE_ROWS = 6, 4


@dataclass(frozen=True)
class _Row:
    """A run of tokens that one row of panels shows: its columns among those recorded."""

    columns: slice
    labels: Sequence[str] | None
    stride: int


def routing_figure(recording: Recording, labels: Sequence[str] | None = None, heads: bool = False) -> Figure:
    """Token-to-state heat maps, a row or several for each layer, and the slots' importance at the row's end."""
    count = max(layer.heads for layer in recording.layers) if heads else 1
    strip = any(layer.importance is not None for layer in recording.layers)
    width = (WIDTH - 2.2 - STRIP * strip) / count
    rows = _rows(recording, labels, width)
    panel_height = [_slot_height(layer.routing.shape[-1], len(rows)) for layer in recording.layers for _ in rows]
    figure = _figure("Token-to-state routing", panel_height, labels)
    ratios = [width] * count + [STRIP] * strip
    grid = figure.add_gridspec(len(panel_height), len(ratios), width_ratios=ratios, height_ratios=panel_height)
    shown = [layer.routing if heads else layer.routing.mean(1, keepdims=True) for layer in recording.layers]
    scale = Normalize(0, max(float(weights.max()) for weights in shown))
    image, drawn = None, []
    for index, (layer, weights) in enumerate(zip(recording.layers, shown, strict=True)):
        for below, row in enumerate(rows):
            line, part = index * len(rows) + below, row.columns
            for head in range(weights.shape[1]):
                axes = figure.add_subplot(grid[line, head])
                image = panels.heat_map(axes, weights[part, head], ~layer.routable[part], scale)
                _token_axis(axes, recording, row, rows[0], width, last=below == len(rows) - 1)
                _slot_label(axes, head)
                if below == 0:
                    axes.set_title(_title(layer, head if heads else None), fontsize=SMALL + 1, color=INK, loc="left")
                drawn.append(axes)
            if layer.importance is not None:
                when, slots = recording.time_of(int(recording.positions[part][-1]) + 1), weights.shape[-1]
                axes = figure.add_subplot(grid[line, count])
                panels.importance_bars(axes, layer.importance[when, :slots], layer.mask[when, :slots], layer.threshold)
                axes.set_yticklabels([])
                if below == 0:
                    axes.set_title("importance", fontsize=SMALL, color=INK)
                drawn.append(axes)
    assert image is not None
    _colour_bar(figure, image, drawn, "routing weight" + ("" if heads else " (mean over heads)"))
    return figure


def entropy_figure(recording: Recording, labels: Sequence[str] | None = None) -> Figure:
    """How undecided the routing of each token was, by layer: head by head, their mean, and the most it can be."""
    width = WIDTH - 2.4
    rows = _rows(recording, labels, width)
    heights = [1.5] * (len(rows) * len(recording.layers))
    figure = _figure("Routing entropy", heights, labels)
    grid = figure.add_gridspec(len(heights), 1)
    for index, layer in enumerate(recording.layers):
        bound = np.log2(np.maximum(layer.routable.sum(-1), 1))
        for below, row in enumerate(rows):
            axes = figure.add_subplot(grid[index * len(rows) + below, 0])
            panels.head_lines(axes, layer.entropy[row.columns], "mean over heads" if layer.heads > 1 else "entropy")
            limit = bound[row.columns]
            axes.plot(np.arange(len(limit)), limit, color=panels.FAINT, linestyle="--", label="all active slots alike")
            axes.set_ylim(0, 1.06 * max(1.0, log2(layer.routing.shape[-1])))
            axes.set_ylabel("entropy (bits)", fontsize=SMALL, color=INK)
            axes.set_xlim(-0.5, len(limit) - 0.5)
            _token_axis(axes, recording, row, rows[0], width, last=below == len(rows) - 1)
            if below == 0:
                axes.set_title(_title(layer), fontsize=SMALL + 1, color=INK, loc="left")
                axes.legend(fontsize=panels.TINY, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def states_figure(recording: Recording) -> Figure:
    """Norm of every committed slot over time, how far it moved in a call, and how many were active if that changed.

    Raises:
        InputError: the stream was too short for a commit.
    """
    moved = [np.asarray(np.isfinite(layer.change).all(-1)) for layer in recording.layers]
    if not moved[0].any():
        raise InputError(
            f"The bank is committed every {recording.step} tokens, and nothing was in what is to be shown: "
            f"{recording.length} tokens in all. Take a longer sequence, or show more of it."
        )
    adapts = any(layer.adapts for layer in recording.layers)
    heights = [_slot_height(layer.mask.shape[-1]) for layer in recording.layers]
    figure = _figure("Evolution of the committed states", heights)
    grid = figure.add_gridspec(len(heights), 2 + adapts, height_ratios=heights)
    scales = [
        Normalize(0, max(float(layer.norm.max()) for layer in recording.layers)),
        Normalize(0, max(float(np.nanmax(layer.change)) for layer in recording.layers)),
    ]
    names = ["norm of the slot's state", f"distance to {recording.step} tokens earlier"]
    # Of a model's run only the beginning has nothing to be compared with; of a trace, much may be missing.
    every = np.ones(len(recording.seen), bool)
    if moved[0][1:].all():
        moved = [every] * len(moved)
    images: list[AxesImage] = []
    columns: list[list[Axes]] = [[], []]
    width = (WIDTH - 2.4) / (2 + adapts)
    for line, (layer, rows) in enumerate(zip(recording.layers, moved, strict=True)):
        for column, (values, kept) in enumerate(((layer.norm, every), (layer.change, rows))):
            axes = figure.add_subplot(grid[line, column])
            images.append(panels.heat_map(axes, values[kept], ~layer.mask[kept], scales[column]))
            _seen_axis(axes, recording.seen[kept], width)
            _slot_label(axes, column)
            axes.set_title(f"{_title(layer)}: {names[column]}", fontsize=SMALL + 1, color=INK, loc="left")
            columns[column].append(axes)
        if adapts:
            axes = figure.add_subplot(grid[line, 2])
            axes.step(np.arange(len(recording.seen)), layer.mask.sum(-1), color=panels.PALETTE[0], where="mid")
            axes.set_ylim(0, layer.mask.shape[-1] + 0.5)
            axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.grid(axis="y", color=panels.INACTIVE, linewidth=0.5)
            axes.tick_params(labelsize=SMALL, colors=INK)
            axes.set_title(
                f"{_title(layer)}: active slots, of {layer.mask.shape[-1]}", fontsize=SMALL + 1, color=INK, loc="left"
            )
            _seen_axis(axes, recording.seen, width)
    for column in (0, 1):
        _colour_bar(figure, images[column], columns[column], "Euclidean norm" if column == 0 else "Euclidean distance")
    return figure


def importance_figure(recording: Recording) -> Figure:
    """Importance of every slot: over time where a trace of it is state, and at the end.

    Raises:
        InputError: no importance was recorded.
    """
    told = [(layer, layer.importance) for layer in recording.layers if layer.importance is not None]
    if not told:
        raise InputError(
            "No importance was recorded: in a trace only that of an AdaptiveNSM is. "
            "Show the model itself: AdvancedNSMVisualizer(model)."
        )
    traced = any(len(values) > 1 and bool(np.ptp(values, axis=0).any()) for _, values in told)
    heights = [_slot_height(layer.mask.shape[-1]) for layer, _ in told]
    figure = _figure("Importance of the slots", heights)
    grid = figure.add_gridspec(len(heights), 1 + traced, height_ratios=heights, width_ratios=[4, 1] if traced else [1])
    active = np.concatenate([values[layer.mask] for layer, values in told])
    scale = Normalize(float(active.min()), float(active.max()))
    image, drawn = None, []
    for line, (layer, values) in enumerate(told):
        if traced:
            axes = figure.add_subplot(grid[line, 0])
            image = panels.heat_map(axes, values, ~layer.mask, scale)
            _seen_axis(axes, recording.seen, 0.6 * WIDTH)
            _slot_label(axes, 0)
            axes.set_title(_title(layer), fontsize=SMALL + 1, color=INK, loc="left")
            drawn.append(axes)
        axes = figure.add_subplot(grid[line, -1])
        panels.importance_bars(axes, values[-1], layer.mask[-1], layer.threshold)
        axes.set_title("at the end" if traced else _title(layer), fontsize=SMALL + 1, color=INK, loc="left")
        pruned = "" if layer.threshold is None else f" (dashed: pruned below {layer.threshold:g})"
        axes.set_xlabel(f"importance{pruned}", fontsize=SMALL, color=INK)
        _slot_label(axes, int(traced))
    if image is not None:
        _colour_bar(figure, image, drawn, "importance (0.5: a usual share of what is written)")
    return figure


# -- layout ------------------------------------------------------------------------------------------------------


def _figure(title: str, heights: Sequence[float], labels: Sequence[str] | None = None) -> Figure:
    """An empty picture for rows of panels of these heights in inches."""
    between = 0.95 if labels is not None else 0.55
    figure = Figure(figsize=(WIDTH, 0.5 + sum(heights) + between * len(heights)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, color=INK, x=0.01, ha="left")
    return figure


def _rows(recording: Recording, labels: Sequence[str] | None, width: float) -> list[_Row]:
    """Share the tokens out among rows of panels that are `width` inches wide."""
    if labels is not None and len(labels) != recording.length:
        raise InputError(f"labels names every token of the stream: {recording.length}; given {len(labels)}.")
    count = len(recording.positions)
    density, most = (BARE_PER_INCH, MOST_BARE_ROWS) if labels is None else (LABELLED_PER_INCH, MOST_LABELLED_ROWS)
    room = max(4, int(width * density))
    size = ceil(count / min(most, ceil(count / room)))
    rows = []
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        names = None if labels is None else [labels[int(position)] for position in recording.positions[part]]
        rows.append(_Row(part, names, ceil(size / room)))
    return rows


def _token_axis(axes: Axes, recording: Recording, row: _Row, widest: _Row, width: float, last: bool) -> None:
    positions = recording.positions[row.columns]
    # The last row is drawn to the same scale as the others.
    axes.set_xlim(-0.5, widest.columns.stop - widest.columns.start - 0.5)
    panels.mark_steps(axes, positions, recording.step)
    if row.labels is None:
        panels.number_axis(axes, positions, width)
    else:
        panels.label_axis(axes, row.labels, row.stride)
    if last:
        gaps = "" if len(positions) == recording.length or (np.diff(positions) == 1).all() else ", those recorded"
        what = f"token (ticks on top: every {recording.step})" if gaps == "" else f"token{gaps}"
        axes.set_xlabel(what, fontsize=SMALL, color=INK)


def _seen_axis(axes: Axes, seen: Array, width: float) -> None:
    panels.number_axis(axes, seen, width)
    axes.set_xlim(-0.5, len(seen) - 0.5)
    axes.set_xlabel("tokens seen", fontsize=SMALL, color=INK)


def _slot_label(axes: Axes, column: int) -> None:
    """Only the first of several panels of the same slots says so."""
    if column == 0:
        axes.set_ylabel("slot", fontsize=SMALL, color=INK)
    else:
        axes.tick_params(axis="y", labelleft=False)


def _colour_bar(figure: Figure, image: AxesImage, axes: Sequence[Axes], label: str) -> None:
    bar = figure.colorbar(image, ax=list(axes), fraction=0.03, pad=0.01, aspect=30, anchor=(0.0, 1.0))
    bar.set_label(label, fontsize=SMALL, color=INK)
    bar.ax.tick_params(labelsize=SMALL, colors=INK)


def _slot_height(slots: int, rows: int = 1) -> float:
    """Inches for a panel with so many slots, one of `rows` that show a layer."""
    return min(6.0 / (rows + 0.5), max(1.3, 0.1 * slots))


def _title(layer: LayerRecording, head: int | None = None) -> str:
    return f"layer {layer.layer}" + ("" if head is None else f", head {head}")
