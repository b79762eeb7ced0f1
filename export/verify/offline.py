"""`--offline FILE`: compare a foreign step with the same model over whole sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from nsm.adapters.validate import check_offline
from nsm.errors import InputError, NsmError
from nsm.export.sources import Source
from nsm.manifest import Experiment
from nsm.trace import Array

MOST = 1024
"""Most tokens of a sequence that are compared, if the program takes any number."""

Whole = Callable[[Array], Array]
"""Function from a sequence [1, T, *token] to the main output [1, T, ...]."""


def compared_offline(source: Source, path: Path, sequences: Sequence[Array]) -> tuple[Experiment, ...]:
    """Compare a foreign step with its program over whole sequences; return its experiments with the result.

    Args:
        source: the step.
        path: a .pt2 or .onnx with one input, a sequence [1, T, *token], and the main output [1, T, ...] first.
        sequences: [T, *token] each; as many tokens as the program takes are compared.

    Returns:
        The experiments of `source`, with the experiment "offline" passed.

    Raises:
        InputError: the file does not exist, `source` is an nsm model, or the program does not accept the sequences.
        UnsupportedError: the outputs of the step and the program differ.
    """
    if source.examination is None:
        raise InputError(
            f"--offline applies to foreign .pt2 and .onnx files only; {source.kind} is an nsm model. Leave it out."
        )
    run, length = _open(path)
    spec = source.spec(source.lanes or 1, 1 if source.chunk_size > 1 else None)
    name = spec.entry("step").outputs[0].name
    for sequence in sequences:
        tokens = sequence[: length or MOST]
        if length is not None and len(tokens) < length:
            raise InputError(
                f"{path} takes sequences of {length} tokens; given {len(tokens)}. Give longer sequences with --data, "
                "or export the file with a dynamic axis 1."
            )
        session = source.reference(spec)
        with session:
            given = session.run(np.repeat(tokens[None], spec.batch, 0))[name][:1]
        try:
            wanted = run(tokens[None])
        except NsmError:
            raise
        except Exception as error:  # frameworks raise errors of any class
            raise InputError(
                f"{path} does not take a sequence {tokens.dtype}{[1, *tokens.shape]}: {type(error).__name__}: {error}. "
                "Expected one input, [1, T, *token], of the step's dtype."
            ) from error
        check_offline(source.kind, name, given, wanted)
    shown = f"equal to {path.name} over {len(sequences)} whole sequences"
    return tuple(
        replace(item, status="passed", detail=shown) if item.name == "offline" else item
        for item in source.examination.experiments
    )


def _open(path: Path) -> tuple[Whole, int | None]:
    """Return a function that runs the program, and the number of tokens it takes; None for any number."""
    if path.suffix.lower() == ".onnx":
        from nsm.export.sources.onnx import whole_graph

        return whole_graph(path)
    if path.suffix.lower() == ".pt2":
        from nsm.export.sources import whole_program

        return whole_program(path)
    raise InputError(f"--offline {path}: expected a .pt2 or .onnx of the model over whole sequences.")
