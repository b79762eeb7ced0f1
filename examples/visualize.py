"""Plot how a trained model routes tokens to slots, from a checkpoint, or from a bundle without torch.

    python examples/visualize.py recall.pt --output pictures
    python examples/visualize.py recall.nsm --output pictures

For a checkpoint, the script runs one of its golden sequences; for a bundle, it plots the recorded golden trace.
"""

from __future__ import annotations

from pathlib import Path

import click

from nsm.bundle import Bundle
from nsm.errors import InputError, NsmError
from nsm.utils import AdvancedNSMVisualizer


@click.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), default="pictures", show_default=True, help="Output folder.")
@click.option("--stream", default=0, show_default=True, help="Index of the golden sequence.")
def main(source: Path, output: Path, stream: int) -> None:
    """Write the plots of SOURCE, a checkpoint or a bundle, to a folder."""
    try:
        for path in draw(source, output, stream):
            click.echo(f"Wrote {path}")
    except NsmError as error:
        raise click.ClickException(str(error)) from error


def draw(source: Path, output: Path, stream: int) -> list[Path]:
    if source.is_dir():
        visualizer, tokens = AdvancedNSMVisualizer.from_trace(Bundle(source).trace()), None
    else:
        from nsm.models import load_checkpoint

        checkpoint = load_checkpoint(source)
        if not 0 <= stream < len(checkpoint.golden):
            raise InputError(
                f"{source} has {len(checkpoint.golden)} golden sequences, counted from 0; given --stream {stream}."
            )
        visualizer, tokens, stream = AdvancedNSMVisualizer(checkpoint.model), checkpoint.golden[stream], 0
    output.mkdir(parents=True, exist_ok=True)
    routing, heads, entropy, states = (output / f"{name}.png" for name in ("routing", "heads", "entropy", "states"))
    visualizer.plot_routing_patterns(tokens, stream=stream, save_path=routing)
    visualizer.plot_routing_patterns(tokens, stream=stream, heads=True, save_path=heads)
    visualizer.plot_routing_entropy(tokens, stream=stream, save_path=entropy)
    visualizer.plot_state_evolution(tokens, stream=stream, save_path=states)
    return [routing, heads, entropy, states]


if __name__ == "__main__":
    main()
