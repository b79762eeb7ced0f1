"""Request and result of a builder, and the error for operators that its target lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nsm.bundle import GRAPHS
from nsm.errors import UnsupportedError
from nsm.spec import StepSpec


@dataclass(frozen=True)
class Request:
    """The request to a builder.

    Args:
        directory: the bundle's directory.
        folder: the target's own folder in it, made by the builder if it writes files.
        spec: of the model, as the target serves it.
        device: one of the target's devices; None leaves it to the builder.
        low: where the graphs in low precision lie; None for the bundle's own.
    """

    directory: Path
    folder: Path
    spec: StepSpec
    device: str | None
    low: Path | None = None

    @property
    def graphs(self) -> Path:
        return self.low or self.directory / GRAPHS

    def graph(self, entry: str) -> Path:
        return self.graphs / f"{entry}.onnx"


@dataclass(frozen=True)
class Built:
    """The result of a builder: files (relative to the bundle), the device they are for, and notes for the user."""

    files: tuple[str, ...]
    device: str
    notes: tuple[str, ...] = ()


def lacking(target: str, graph: Path, nodes: Sequence[tuple[str, str]], reason: str) -> UnsupportedError:
    """The error of a builder for operators that its target does not support.

    Args:
        target: for people, as its makers write it.
        graph: that has them.
        nodes: operator and name of each, the name "" where it is not known.
        reason: in the words of the target's own converter.
    """
    named = ", ".join(f"{operator} (the node {name})" if name else operator for operator, name in nodes)
    return UnsupportedError(
        f"{target} does not support these operators of {graph.name} as they are: {named}. Build the model for another "
        "target, for instance onnxruntime, or without them. The converter says: " + " ".join(reason.split())
    )
