"""Rewrite torch.export programs without LSTM projections and complex numbers, which some targets lack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from nsm.export.capture.complex_pairs import RealPairs, is_complex
from nsm.export.capture.fourier import overlap_add
from nsm.export.capture.program import quiet

_LSTM = "aten.lstm.input"
_FOURIER = ("aten.fft_", "aten.stft.", "aten.istft.")
_OVERLAP_ADD = torch.ops.aten.unfold_backward.default


def rewritten(program: ExportedProgram, examples: tuple[Tensor, ...]) -> ExportedProgram:
    """Decompose the operations of a program that ONNX or a target lacks.

    1. An LSTM with projections becomes its steps.
    2. Complex numbers become pairs of real tensors, and Fourier transforms become MatMuls with constant matrices.

    Args:
        program: the traced program.
        examples: its inputs.

    Returns:
        The rewritten program, or `program` if nothing needs a rewrite.

    Raises:
        UnsupportedError: a complex operation has no replacement; the message has the operation and its line.
    """
    nodes = list(program.graph.nodes)
    projected = any(
        str(node.target) == _LSTM and _has_projections(*(h.meta["val"] for h in node.args[1])) for node in nodes
    )
    complex_ = any(map(is_complex, nodes))
    if not projected and not complex_:
        return program
    table: dict[Any, Callable[..., Any]] = {}
    for operator, decompose in torch.export.default_decompositions().items():
        if str(operator) == _LSTM:
            table[operator] = _steps_if_projected(decompose)
        elif complex_ and str(operator).startswith(_FOURIER):
            table[operator] = decompose
    if complex_:
        table[_OVERLAP_ADD] = overlap_add
    with quiet():
        program = program.run_decompositions(table)
        return torch.export.export(RealPairs(program), examples) if complex_ else program


def _steps_if_projected(decompose: Callable[..., Any]) -> Callable[..., Any]:
    def lstm(x: Tensor, state: list[Tensor], *others: Any) -> Any:
        return decompose(x, state, *others) if _has_projections(*state) else NotImplemented

    return lstm


def _has_projections(hidden: Tensor, cell: Tensor) -> bool:
    return hidden.shape[-1] != cell.shape[-1]
