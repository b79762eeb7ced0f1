"""Save the untrained NSM of compare.py, or a wider one, with real text for calibration and parity.

python examples/compared_model.py --output compared.pt
nsm bench --all compared.pt
python examples/compared_model.py --width 1536 --output wider.pt       (116 million parameters instead of 7.3)
"""

from __future__ import annotations

from pathlib import Path

import click
import compare
import text
import torch

import nsm
from nsm.models import SimpleNSM

SEQUENCES, LENGTH = 24, 3360


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default="compared.pt", show_default=True)
@click.option("--width", default=compare.NSM["d_model"], show_default=True, help="Width of tokens and states.")
@click.option("--data", type=click.Path(path_type=Path), help="A text file.  [default: Python's library]")
def main(output: Path, width: int, data: Path | None) -> None:
    """Write the checkpoint."""
    torch.manual_seed(0)
    corpus = text.corpus(data)[0][: SEQUENCES * LENGTH]
    model = SimpleNSM(**{**compare.NSM, "d_model": width, "state_dim": width}).eval()
    nsm.save(model, output, samples=list(corpus.reshape(SEQUENCES, LENGTH)))


if __name__ == "__main__":
    main()
