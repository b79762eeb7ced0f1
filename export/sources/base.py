"""Source: a model that bundles are made of, wherever it comes from. All that the main path knows of it is here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from nsm.adapters.validate import Examination
from nsm.results import Message
from nsm.runtimes.parity import Perturbation
from nsm.runtimes.session import Session
from nsm.spec import StepSpec, TensorSpec
from nsm.trace import Array, Arrays


class Source(Protocol):
    """A model in its normal form, whatever it looks like itself.

    One input `tokens` [B, K, *token], and `valid` [B] where lanes may differ; outputs [B, K, ...]; every state with its
    lanes on axis 0. A model that takes one frame at once has K = 1, and the frame is its token.

    Attributes:
        kind: the class of the model, for messages and the manifest.
        config: further entries of the manifest.
        parameters: number of weights.
        fingerprint: a hash of the function; two models with the same fingerprint are the same.
        token_spec: one lane and one token.
        chunk_size: C; a call of `step` takes a multiple of it.
        golden, calibration: sequences that came with the model, [T, *token] each; disjoint.
        messages: messages for the user.
        lanes: fixed batch size, or None if it is dynamic.
        largest_weights: numbers in the largest matrix of each kind of operator: "LSTM", "GRU", "RNN", and "" for
            linear ops.
        examination: the experiments on a foreign model; None for a model of nsm.
    """

    @property
    def kind(self) -> str: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def parameters(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def token_spec(self) -> TensorSpec: ...
    @property
    def chunk_size(self) -> int: ...
    @property
    def golden(self) -> list[Array]: ...
    @property
    def calibration(self) -> list[Array]: ...
    @property
    def messages(self) -> tuple[Message, ...]: ...
    @property
    def lanes(self) -> int | None: ...
    @property
    def largest_weights(self) -> Mapping[str, int]: ...
    @property
    def examination(self) -> Examination | None: ...

    def spec(self, batch: int = 1, tokens_per_call: int | None = None, debug_outputs: bool = False) -> StepSpec:
        """The declaration of the entries, for so many lanes and tokens a call of `step`.

        Raises:
            InputError, UnsupportedError: the model cannot be had in that form.
        """
        ...

    def check_sequence(self, sequence: Array) -> None:
        """Raise `InputError` for a sequence [T, *token] of the right dtype that the model still does not take."""
        ...

    def reference(self, spec: StepSpec, perturbation: Perturbation | None = None) -> Session:
        """Return a session over the model itself, in fp32, with the lanes of `spec`.

        With a perturbation, the constant weights of the session, its inputs and its states are perturbed.
        """
        ...

    def write_graphs(self, spec: StepSpec, directory: Path, opset: int) -> None:
        """Write one graph for each entry into a folder that is there; see `nsm.export.graphs.exporter.export_onnx`.

        Raises:
            BuildError: it cannot be done.
        """
        ...

    def initial_arrays(self, batch: int) -> Arrays:
        """The states' initial values, by name, lanes included."""
        ...
