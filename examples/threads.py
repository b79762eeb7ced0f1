"""Measure the speed-up of N threads over 1 thread on the targets of a bundle, in turns.

python examples/threads.py model.nsm --threads 2
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

import nsm
from nsm.bundle import Bundle
from nsm.export.cli.bench import lane_tokens, speed
from nsm.export.report import Terminal
from nsm.results import Ratio
from nsm.runtimes.bench import Latency, bench, paired_ratio


@click.command()
@click.argument("path", metavar="BUNDLE", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--target", "targets", multiple=True, default=("onnxruntime", "openvino"), show_default=True)
@click.option("--threads", type=click.IntRange(2), default=2, show_default=True, metavar="N")
@click.option("--steps", type=int, default=1000, show_default=True, help="Timed calls per thread count.")
def main(path: Path, targets: tuple[str, ...], threads: int, steps: int) -> None:
    """Measure a call of step, and of decode, with 1 thread and with N threads."""
    bundle = Bundle(path)
    terminal = Terminal(quiet=False)
    work = bundle.manifest.work["step"]
    rows = []
    for target in targets:
        with ExitStack() as stack, terminal.stage(f"Measuring {target} in turns") as progress:
            sessions = [stack.enter_context(nsm.open(bundle, target=target, threads=number)) for number in (1, threads)]
            one, more = bench(sessions, steps, lane_tokens(bundle), progress)
        rows.append(
            [
                target,
                f"{one.p50_us:.0f}",
                f"{more.p50_us:.0f}",
                speed(paired_ratio(one.rounds_us, more.rounds_us)),
                speed(_decode(one, more)),
            ]
        )
    terminal.table(
        ("target", "us, 1 thread", f"us, {threads}", f"speed-up of {threads}", "in decode"),
        rows,
        f"{bundle.path.name}: {work.flops / 1e6:.1f} MFLOP and {work.nbytes / 1e6:.1f} MB per call",
    )


def _decode(one: Latency, more: Latency) -> Ratio | None:
    if one.decode is None or more.decode is None:
        return None
    return paired_ratio(one.decode.rounds_us, more.decode.rounds_us)


if __name__ == "__main__":
    main()
