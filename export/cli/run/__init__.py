"""`nsm run` and `nsm score`: run sequences, generate text, score a folder."""

from typing import TYPE_CHECKING

from nsm.lazy import lazy_names

if TYPE_CHECKING:
    from nsm.export.cli.run.arrays import run as run
    from nsm.export.cli.run.generation import generate as generate
    from nsm.export.cli.run.score import score_folder as score_folder
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "arrays": ("run",),
            "generation": ("generate",),
            "score": ("score_folder",),
        },
    )
