"""`export_model`: export a PyTorch model that is in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike, NDArray

from nsm.bundle import Bundle
from nsm.errors import InputError
from nsm.export.options import ExportOptions
from nsm.export.pipeline import export
from nsm.export.sources import TorchSource
from nsm.models import Checkpoint, StepModel, fingerprint, split_samples


def export_model(
    model: StepModel,
    targets: str | Sequence[str],
    output: str | os.PathLike[str],
    samples: Sequence[ArrayLike] | NDArray[Any] | None = None,
    data: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Bundle:
    """Build a verified bundle from a model in memory; `nsm-export` does so from a file.

    Args:
        model: an nsm model, or the result of `nsm.as_step`, in float32. A model on another device is copied to the CPU.
        targets: name or names of targets: "onnx", "onnxruntime", "openvino", "tensorrt", ...
        output: path of the bundle to write.
        samples: real sequences, each [T] ids or [T, *token] float32. Some are used for the parity check, the others
            for int8 calibration. Without samples, the parity check uses random sequences.
        data: a file of sequences (.npy, .npz, .txt), instead of samples.
        options: other fields of `nsm.export.options.ExportOptions`: precision="int8", batch=4, force=True, ...

    Returns:
        The bundle; open it with `nsm.open`.

    Raises:
        InputError, ConfigError, UnsupportedError, BuildError, ParityError, SlowerError: see `nsm.errors`.

    Example:
        >>> step = nsm.as_step(nn.GRU(40, 128, num_layers=2))   # doctest: +SKIP
        >>> nsm.export_model(step, "openvino", "gru.nsm", samples=features)
    """
    given: Any = model
    if not isinstance(given, StepModel):
        raise InputError(
            f"export_model expects an nsm model or the result of nsm.as_step; given {type(given).__name__}. "
            "Wrap a module first: nsm.as_step(module, ...)."
        )
    model.check_float32()
    golden, calibration = split_samples(model, samples)
    source = TorchSource(Checkpoint(model, golden, calibration, fingerprint(model)))
    path = None if data is None else Path(data)
    names = [targets] if isinstance(targets, str) else list(targets)
    return export(source, ExportOptions(names, output=Path(output), data=path, **options))
