"""Exporting from Python what is in memory: a model that no file can hold without its code."""

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
    """Build a verified bundle from a model in memory, as `nsm-export` does from a file.

    Args:
        model: one of ours, or what `nsm.as_step` made of a module; in float32. Of a model on another device a copy is
            exported, on the CPU.
        targets: "onnx", "onnxruntime", "openvino", "tensorrt", or several of them.
        output: the bundle to write.
        samples: real sequences, [T] ids or [T, *token] numbers each; some judge the export, the others calibrate int8.
            Without them it is checked on made-up ones.
        data: a file of sequences (.npy, .npz, .txt), instead of samples.
        options: further `nsm.export.options.ExportOptions`: precision="int8", batch=4, force=True, ...

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
            f"export_model takes one of nsm's models, or what nsm.as_step made of a module; given "
            f"{type(given).__name__}. Make a step model of it first: nsm.as_step(module, ...)."
        )
    model.check_float32()
    golden, calibration = split_samples(model, samples)
    source = TorchSource(Checkpoint(model, golden, calibration, fingerprint(model)))
    path = None if data is None else Path(data)
    names = [targets] if isinstance(targets, str) else list(targets)
    return export(source, ExportOptions(names, output=Path(output), data=path, **options))
