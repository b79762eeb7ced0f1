"""TorchSource: a PyTorch model as the source of a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nsm.adapters import AdaptedModel
from nsm.adapters.validate import Examination
from nsm.errors import UnsupportedError
from nsm.export.graphs import export_onnx, initial_arrays
from nsm.export.sources.torch_session import in_eval_mode, model_session
from nsm.export.sources.torch_weights import largest_weights
from nsm.models import (
    AdaptiveNSM,
    Checkpoint,
    HybridModel,
    SimpleNSM,
    StepModel,
    compact,
    duplicate,
    fingerprint,
    on_cpu,
)
from nsm.results import Message
from nsm.runtimes.parity import Perturbation
from nsm.runtimes.session import Session
from nsm.spec import StepSpec, TensorSpec
from nsm.trace import Array, Arrays


class TorchSource:
    """The model of a checkpoint, in eval mode; see `nsm.export.sources.base.Source`."""

    def __init__(self, checkpoint: Checkpoint, messages: Sequence[Message] = ()) -> None:
        self.checkpoint = checkpoint
        self.messages = tuple(messages)
        self.model = in_eval_mode(on_cpu(checkpoint.model))

    @classmethod
    def of(cls, model: StepModel) -> TorchSource:
        """A model without sequences of its own."""
        return cls(Checkpoint(model, [], [], fingerprint(model)))

    @property
    def kind(self) -> str:
        return self.model.kind

    @property
    def config(self) -> Mapping[str, Any]:
        return self.model.config

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def fingerprint(self) -> str:
        return self.checkpoint.fingerprint

    @property
    def token_spec(self) -> TensorSpec:
        return self.model.token_spec

    @property
    def chunk_size(self) -> int:
        return self.model.chunk_size

    @property
    def lanes(self) -> int | None:
        return self.model.lanes

    @property
    def largest_weights(self) -> Mapping[str, int]:
        return largest_weights(self.model)

    @property
    def examination(self) -> Examination | None:
        return self.model.examination if isinstance(self.model, AdaptedModel) else None

    @property
    def golden(self) -> list[Array]:
        return self.checkpoint.golden

    @property
    def calibration(self) -> list[Array]:
        return self.checkpoint.calibration

    def spec(self, batch: int = 1, tokens_per_call: int | None = None, debug_outputs: bool = False) -> StepSpec:
        return self.model.spec(batch, tokens_per_call, debug_outputs)

    def check_sequence(self, sequence: Array) -> None:
        self.model.check_tokens(torch.from_numpy(sequence[None]))

    def reference(self, spec: StepSpec, perturbation: Perturbation | None = None) -> Session:
        if perturbation is None:
            return model_session(self.model, spec, self.fingerprint)
        model = duplicate(self.model)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.dtype == torch.float32:
                    tensor.copy_(torch.from_numpy(perturbation(tensor.numpy())))
        return model_session(model, spec, self.fingerprint, perturbation=perturbation)

    def write_graphs(self, spec: StepSpec, directory: Path, opset: int) -> None:
        export_onnx(self.model, spec, directory, opset)

    def initial_arrays(self, batch: int) -> Arrays:
        return initial_arrays(self.model, batch)

    def compacted(self, sequences: list[Array]) -> TorchSource:
        """Without the slots that neither these sequences nor its own for calibration ever use.

        Raises:
            UnsupportedError: a model without banks.
            ConfigError, InputError: as `nsm.models.compaction.compact`.
        """
        if not isinstance(self.model, SimpleNSM | AdaptiveNSM | HybridModel):
            raise UnsupportedError(f"--compact removes slots of a bank; a {self.kind} has none.")
        smaller = compact(self.model, [*self.calibration, *sequences])
        return TorchSource(replace(self.checkpoint, model=smaller, fingerprint=fingerprint(smaller)))
