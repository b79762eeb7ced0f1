"""Request and result of a builder, and the error for operators that its target lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nsm.bundle import GRAPHS, graph_file
from nsm.errors import UnsupportedError
from nsm.spec import StepSpec


@dataclass(frozen=True)
class Request:
    """The request to a builder.

    Args:
        directory: the bundle's directory.
        folder: the target's folder in `directory`; the builder creates it if it writes files.
        spec: the spec of the model, with the entries that the target supports.
        device: one of the target's devices; None for the builder's default.
        low: folder of the graphs in low precision; None for the bundle's fp32 graphs.
    """

    directory: Path
    folder: Path
    spec: StepSpec
    device: str | None
    low: Path | None = None

    @property
    def graphs(self) -> Path:
        """Folder of the ONNX graphs to convert."""
        return self.low or self.directory / GRAPHS

    def graph(self, entry: str) -> Path:
        """Path of the ONNX graph of an entry."""
        return self.graphs / graph_file(entry)


@dataclass(frozen=True)
class Built:
    """The result of a builder: files (relative to the bundle), the device they are for, and notes for the user."""

    files: tuple[str, ...]
    device: str
    notes: tuple[str, ...] = ()


def lacking(target: str, graph: Path, nodes: Sequence[tuple[str, str]], reason: str) -> UnsupportedError:
    """Return the error for operators that a target does not support.

    Args:
        target: display name of the target, such as "OpenVINO".
        graph: path of the ONNX graph.
        nodes: operator and name of each node; "" for an unknown name.
        reason: message of the target's converter.
    """
    named = ", ".join(f"{operator} (the node {name})" if name else operator for operator, name in nodes)
    return UnsupportedError(
        f"{target} does not support these operators of {graph.name}: {named}. Build another target, for instance "
        "onnxruntime, or change the model. The converter says: " + " ".join(reason.split())
    )
