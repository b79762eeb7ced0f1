"""AdvancedNSMVisualizer: pictures of the routing of tokens to slots, and of the states of the slots."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from numpy.typing import ArrayLike

from nsm.errors import InputError, MissingDependencyError
from nsm.files import check_output_file, replacing
from nsm.trace import Trace
from nsm.utils.recorders import read_trace, record_model
from nsm.utils.recording import Recording

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nsm.models import StepModel, StreamModel

_MARK = "nsm.utils.AdvancedNSMVisualizer"
_MARKED = {"png": "Software", **dict.fromkeys(("svg", "pdf", "ps", "eps"), "Creator")}
"""Format of a picture -> the metadata entry for the name of the program."""

Source = Callable[[ArrayLike | None, int], Recording]
"""Tokens or None, and the index of the stream -> the recording to draw."""


class AdvancedNSMVisualizer:
    """Draws a model at work, or a golden trace of one.

        visualizer = AdvancedNSMVisualizer(model)
        visualizer.plot_routing_patterns(ids, save_path="routing.png")
        AdvancedNSMVisualizer.from_trace(trace).plot_state_evolution(save_path="states.svg")

    Every method takes
        tokens: ids [T] or [B, T], or vectors [T, input_dim] or [B, T, input_dim]; a stream from its beginning. Left
            out with a trace, which has its own.
        stream: which stream of the batch, or of the trace.
        span: (first, last) to show only the tokens from `first` up to, not including, `last`.
        save_path: where to write the picture too; the ending tells the format (png, svg, pdf, ...). A file that is
            there is replaced if it is a picture of this class, in png, svg, pdf, ps or eps, and refused otherwise.
    and returns a `matplotlib.figure.Figure`. No window is opened and nothing of pyplot is touched.

    Slots that are not active are grey and hatched.

    Args:
        model: SimpleNSM, AdaptiveNSM, HybridModel (its NSM layers), or any other `StreamModel` that routes.

    Raises:
        InputError: not such a model; and from the methods, tokens it does not take, labels of another length, nothing
            to show, or a path that cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """

    def __init__(self, model: StepModel) -> None:
        if not callable(getattr(model, "traced_step", None)):
            raise InputError(
                f"AdvancedNSMVisualizer takes a model that routes tokens to slots (SimpleNSM, AdaptiveNSM, "
                f"HybridModel); given {type(model).__name__}. For a recorded trace use from_trace."
            )

        routing_model = cast("StreamModel", model)

        def run(tokens: ArrayLike | None, stream: int) -> Recording:
            if tokens is None:
                raise InputError("A model has nothing to show without tokens: pass a sequence as the first argument.")
            return record_model(routing_model, tokens, stream)

        self._source: Source = run

    @classmethod
    def from_trace(cls, trace: Trace) -> AdvancedNSMVisualizer:
        """Draw a recorded trace, without the model and without torch.

        Args:
            trace: with the outputs `routing.{layer}`; see `nsm.utils.recorders.read_trace`.
        """

        def read(tokens: ArrayLike | None, stream: int) -> Recording:
            if tokens is not None:
                raise InputError(
                    "A trace shows the streams that were recorded, and takes no tokens: choose one with stream=0, 1, .."
                )
            return read_trace(trace, stream)

        visualizer = cls.__new__(cls)
        visualizer._source = read
        return visualizer

    def plot_routing_patterns(
        self,
        tokens: ArrayLike | None = None,
        *,
        stream: int = 0,
        span: tuple[int, int] | None = None,
        labels: Sequence[str] | None = None,
        heads: bool = False,
        save_path: str | os.PathLike[str] | None = None,
    ) -> Figure:
        """Token-to-state heat maps of every layer, with the importance of the slots beside them.

        Args:
            labels: a name for every token of the stream, written below it.
            heads: show the bank heads side by side instead of their mean.
        """
        recording = self._recording(tokens, stream, span)
        return _finished(_figures().routing_figure(recording, labels, heads), save_path)

    def plot_routing_entropy(
        self,
        tokens: ArrayLike | None = None,
        *,
        stream: int = 0,
        span: tuple[int, int] | None = None,
        labels: Sequence[str] | None = None,
        save_path: str | os.PathLike[str] | None = None,
    ) -> Figure:
        """Entropy of every token's routing in bits, head by head and their mean, by layer.

        Args:
            labels: a name for every token of the stream, written below it.
        """
        recording = self._recording(tokens, stream, span)
        return _finished(_figures().entropy_figure(recording, labels), save_path)

    def plot_state_evolution(
        self,
        tokens: ArrayLike | None = None,
        *,
        stream: int = 0,
        span: tuple[int, int] | None = None,
        save_path: str | os.PathLike[str] | None = None,
    ) -> Figure:
        """Norm of every committed slot, how far it moved, and the number of active slots where that changes."""
        recording = self._recording(tokens, stream, span)
        return _finished(_figures().states_figure(recording), save_path)

    def plot_importance(
        self,
        tokens: ArrayLike | None = None,
        *,
        stream: int = 0,
        span: tuple[int, int] | None = None,
        save_path: str | os.PathLike[str] | None = None,
    ) -> Figure:
        """Importance of every slot: over time for models that adapt, and at the end."""
        recording = self._recording(tokens, stream, span)
        return _finished(_figures().importance_figure(recording), save_path)

    def _recording(self, tokens: ArrayLike | None, stream: int, span: tuple[int, int] | None) -> Recording:
        recording = self._source(tokens, stream)
        return recording if span is None else recording.between(*span)


def _figures() -> Any:
    """The drawing functions, which need matplotlib."""
    try:
        from nsm.utils import figures
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("nsm"):
            raise
        package = str(error.name).partition(".")[0]
        raise MissingDependencyError(
            f'Pictures need {package}, which is not installed. Install it with: pip install "nsm-toolkit[viz]"'
        ) from error
    return figures


def _finished(figure: Figure, save_path: str | os.PathLike[str] | None) -> Figure:
    """The figure; written to the path, if there is one, whole or not at all."""
    if save_path is None:
        return figure
    path = Path(save_path)
    known = sorted(figure.canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        raise InputError(f"{path} has no ending that tells the format of the picture. Use one of: {', '.join(known)}.")
    kind = path.suffix[1:].lower()
    key = _MARKED.get(kind)
    check_output_file(path, "a picture of nsm", lambda file: key is not None and _MARK.encode() in file.read())
    with replacing(path) as file:
        figure.savefig(file, format=kind, metadata=None if key is None else {key: _MARK})
    return figure
