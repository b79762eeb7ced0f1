"""Terminal output: progress on stderr, tables on stdout, errors with a suggested fix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from nsm.export.report.format import number, size
from nsm.manifest import Artifact, Manifest
from nsm.results import Message
from nsm.runtimes import Progress as Step

_TABLE_WIDTH = 140
_ALARMING = ("missing", "not_run", "failed")


class Terminal:
    """Output of one command: results to stdout, progress and remarks to stderr, so that pipes get results only.

    Args:
        quiet: print announcements only, for --json.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.out = Console(quiet=quiet, soft_wrap=True, highlight=False)
        # A table that is too wide is easier to read if the terminal wraps its lines than with folded cells.
        self.out.width = max(self.out.width, _TABLE_WIDTH)
        self.err = Console(stderr=True, quiet=quiet, highlight=False)
        self._always = Console(stderr=True, highlight=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[Step]:
        """Show a progress bar while the block runs; the block reports (done, total) to the yielded function."""
        columns = (
            TextColumn("{task.description:<26}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.err) as progress:
            task = progress.add_task(name, total=None)

            def step(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            yield step
            total = progress.tasks[0].total or 1
            progress.update(task, total=total, completed=total)

    def say(self, text: str = "", style: str = "") -> None:
        """Print a result to stdout."""
        self.out.print(Text(text, style))

    def remark(self, text: str, style: str = "") -> None:
        """Print a remark to stderr."""
        self.err.print(Text(text, style))

    def announce(self, text: str, style: str = "") -> None:
        """Print a remark to stderr, even if quiet: users need it before the work is done, and in logs."""
        self._always.print(Text(text, style))

    def message(self, message: Message) -> None:
        """Print a message to stderr, even if quiet."""
        self.announce(str(message), "yellow" if message.severity == "warning" else "")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
        """Print a table; align numbers right and text left, and highlight alarming cells such as "missing"."""
        if title is not None:
            self.say(title, "italic")
        table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 1))
        for index, column in enumerate(columns):
            cells = [row[index] for row in rows]
            number = bool(cells) and all(cell[:1].isdigit() or cell == "-" for cell in cells)
            table.add_column(column, justify="right" if number else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(cell, "yellow" if cell in _ALARMING else "") for cell in row))
        self.out.print(table)


def parity_row(artifact: Artifact) -> list[str]:
    """Return the cells of `PARITY_COLUMNS` for an artifact."""
    parity = artifact.parity
    row = [artifact.target, artifact.device, artifact.precision, size(artifact.nbytes), parity.status]
    errors = [number(None if error is None else error.p99) for error in (parity.one_step, parity.free_run)]
    return [*row, *errors, "-" if parity.argmax_agreement is None else f"{parity.argmax_agreement:.2%}"]


PARITY_COLUMNS = ("target", "device", "precision", "size", "parity", "one-step", "free-run", "argmax")


def stream_lines(manifest: Manifest) -> list[str]:
    """Return a line for the model's capacity and for each target's limit; none for an unlimited model."""
    capacity = manifest.spec.capacity
    lines = [] if capacity is None else [f"capacity: {capacity:,} tokens of a stream, then reset its lane"]
    return lines + [
        f"limit: {item.limit:,} tokens of a stream on {item.target}, then reset its lane"
        for item in manifest.artifacts
        if item.limit is not None
    ]


def low_precision_lines(artifact: Artifact) -> list[str]:
    """Return lines about low precision: speed, and linear ops kept in fp32 with the reason; none for fp32."""
    facts = artifact.quantization
    if facts is None:
        return []
    lines = [""]
    if facts.speed:
        parts = [
            f"{entry} {ratio.median:.2f}x as fast as in fp32 [{ratio.low:.2f}, {ratio.high:.2f}]"
            for entry, ratio in facts.speed.items()
        ]
        lines.append(f"{artifact.target} {artifact.precision}: {', '.join(parts)}")
    lines += [f"  kept in fp32, because {reason}: {', '.join(names)}" for reason, names in facts.by_reason().items()]
    return lines
