"""`--offline FILE`: compare a foreign step with a program of the same model over whole sequences."""

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
"""Tokens of a sequence that are compared at most, where the program takes any number."""

Whole = Callable[[Array], Array]
"""A sequence [1, T, *token] -> the main output [1, T, ...]."""


def compared_offline(source: Source, path: Path, sequences: Sequence[Array]) -> tuple[Experiment, ...]:
    """The experiments of a foreign model, with that of its program over whole sequences.

    Args:
        source: the step.
        path: a .pt2 or .onnx with one input, a sequence [1, T, *token]; its first output is the main one, [1, T, ...].
        sequences: [T, *token] each; as many tokens of them as the program takes are compared.

    Raises:
        InputError: no such file, or a model of ours, or a program that does not take the sequences.
        UnsupportedError: the step gives something else than the program.
    """
    if source.examination is None:
        raise InputError(f"--offline belongs to a foreign .pt2 or .onnx; {source.kind} is a model of ours.")
    run, length = _open(path)
    spec = source.spec(source.lanes or 1, 1 if source.chunk_size > 1 else None)
    name = spec.entry("step").outputs[0].name
    for sequence in sequences:
        tokens = sequence[: length or MOST]
        if length is not None and len(tokens) < length:
            raise InputError(
                f"{path} takes sequences of {length} tokens; given one of {len(tokens)}. Give longer ones with "
                "--data, or export it with a dynamic axis 1."
            )
        session = source.reference(spec)
        assert session is not None  # only a reference in fp64 may be missing
        with session:
            given = session.run(np.repeat(tokens[None], spec.batch, 0))[name][:1]
        try:
            wanted = run(tokens[None])
        except NsmError:
            raise
        except Exception as error:  # whatever a framework raises
            raise InputError(
                f"{path} does not take a sequence {tokens.dtype}{[1, *tokens.shape]}: {type(error).__name__}: {error}. "
                "Expected one input, [1, T, *token], in the dtype of the step's."
            ) from error
        check_offline(source.kind, name, given, wanted)
    shown = f"the same as {path.name} over {len(sequences)} whole sequences"
    return tuple(
        replace(item, status="passed", detail=shown) if item.name == "offline" else item
        for item in source.examination.experiments
    )


def _open(path: Path) -> tuple[Whole, int | None]:
    """A function that runs a program, and the number of tokens that it takes; None for any number."""
    if path.suffix.lower() == ".onnx":
        from nsm.export.sources.onnx import whole_graph

        return whole_graph(path)
    if path.suffix.lower() == ".pt2":
        from nsm.export.sources import whole_program

        return whole_program(path)
    raise InputError(f"--offline {path}: expected a .pt2 or .onnx of the model over whole sequences.")
