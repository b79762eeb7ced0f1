"""Checkpoints: config, weights and sample sequences in one file, loaded with weights only."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from nsm.errors import CheckpointError, InputError
from nsm.files import check_declared, check_output_file, check_stored, open_regular, open_zip, replacing
from nsm.models.base import StepModel
from nsm.models.checkpoint_limits import build_within, check_content

_ZIP = b"PK\x03\x04"
FORMAT = "nsm-checkpoint"
VERSION = 3
_TAGGED = 256
"""Bytes at the beginning of the pickle that the tag of the format is in."""
# Class of a model -> the module it is in, imported when it is needed.
MODELS: Mapping[str, str] = MappingProxyType(
    {
        "SimpleNSM": "nsm.models.simple",
        "AdaptiveNSM": "nsm.models.adaptive",
        "HybridModel": "nsm.models.hybrid",
        "TransformerLM": "nsm.baselines.transformer",
        "RecurrentLM": "nsm.baselines.recurrent",
        "RWKVLM": "nsm.baselines.rwkv",
        "MambaLM": "nsm.baselines.mamba",
    }
)

# Of the samples given to `save`, at most so many become golden sequences; the others are for calibration.
MAX_GOLDEN = 8


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a `.pt`: the model in eval mode, and two disjoint lists of sequences, [T] or [T, input_dim].

    `fingerprint` is a hash of the config and the weights: two files with the same one hold the same model.
    """

    model: StepModel
    golden: list[NDArray[Any]]
    calibration: list[NDArray[Any]]
    fingerprint: str


def save(
    model: StepModel, path: str | os.PathLike[str], samples: Sequence[ArrayLike] | NDArray[Any] | None = None
) -> None:
    """Write a checkpoint, atomically; an earlier one is replaced.

    Args:
        model: the trained model, in float32.
        path: usually `something.pt`.
        samples: real sequences of tokens, [T] ids or [T, input_dim] vectors each (an array [N, T] will do). Up
            to 8, spread over the list, are kept as golden sequences that every export is checked on; the others
            are kept for calibration. Without samples, exports are checked on made-up tokens, and say so.

    Raises:
        InputError: a model of another kind, or samples the model does not take.
        ConfigError: a model that is not in float32.
        OutputExistsError: the file is there and is no checkpoint.
    """
    name = type(model).__name__
    if MODELS.get(name) != type(model).__module__:
        raise InputError(
            f"nsm.save writes {', '.join(MODELS)}; given {name}. A file cannot hold the code of other modules: "
            "export from "
            "Python with nsm.export_model(model, target, output), or write a program with torch.export.save (.pt2)."
        )
    model.check_float32()
    check_output_file(Path(path), "a checkpoint written by nsm.save", _is_checkpoint)
    golden, calibration = split_samples(model, samples)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": name,
        "config": model.config,
        "weights": model.state_dict(),
        "fingerprint": fingerprint(model),
        "golden": [torch.from_numpy(item) for item in golden],
        "calibration": [torch.from_numpy(item) for item in calibration],
        "samples_sha256": _samples_hash(golden, calibration),
    }
    with replacing(Path(path)) as file:
        torch.save(content, file)


def split_samples(
    model: StepModel, samples: Sequence[ArrayLike] | NDArray[Any] | None
) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
    """Those that exports are checked on, up to 8 spread over the list, and those for calibration.

    Raises:
        InputError: names the first that the model does not take.
    """
    sequences = [
        checked_sample(model, index, sample).numpy() for index, sample in enumerate(() if samples is None else samples)
    ]
    golden_ids = set(np.linspace(0, len(sequences) - 1, min(MAX_GOLDEN, (len(sequences) + 1) // 2)).astype(int))
    golden = [item for index, item in enumerate(sequences) if index in golden_ids]
    return golden, [item for index, item in enumerate(sequences) if index not in golden_ids]


def load(path: str | os.PathLike[str]) -> StepModel:
    """The model of a checkpoint, in eval mode. See `load_checkpoint` for the errors."""
    return load_checkpoint(path).model


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint. Nothing in the file is ever executed.

    Raises:
        CheckpointError: not a checkpoint, a pickled module, a newer version, weights that do not fit the config
            or are not finite, or a file that was damaged since.
    """
    content = _read(Path(path))
    try:
        check_content(content, Path(path).stat().st_size)
    except ValueError as error:
        raise CheckpointError(f"{path} was refused: {error}. Expected a .pt written by nsm.save.") from error
    if not isinstance(content, dict) or not _is_text(content.get("format"), FORMAT):
        what = f"a {type(content).__name__}" if not isinstance(content, dict) else "a dictionary without our format tag"
        raise CheckpointError(
            f"{path} is not a checkpoint written by nsm.save: it holds {what}. "
            "A bare state_dict has no config: build the model, load the weights into it, then nsm.save(model, path)."
        )
    version = content.get("version")
    if type(version) is not int or version != VERSION:
        short = version is None or isinstance(version, str) or (isinstance(version, int) and abs(version) < 10**9)
        given = repr(version)[:40] if short else f"of type {type(version).__name__}"
        raise CheckpointError(
            f"{path} has checkpoint version {given}; this nsm reads version {VERSION}. "
            "Save it again with this version, or install the nsm that wrote it."
        )
    try:
        if content["model"] not in MODELS:
            raise InputError(f"it holds a {content['model']!r}; this nsm knows {', '.join(MODELS)}.")
        kind: type[StepModel] = getattr(importlib.import_module(MODELS[content["model"]]), content["model"])
        model = build_within(kind, content["config"], content["weights"])
        model.load_state_dict(content["weights"])
        golden, calibration = ([item.numpy() for item in content[key]] for key in ("golden", "calibration"))
        recorded, samples = content["fingerprint"], content["samples_sha256"]
    except KeyError as error:
        raise CheckpointError(
            f"{path} is tagged as a checkpoint, but does not make a model: it lacks the part {error}."
        ) from error
    except (TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError, InputError) as error:
        raise CheckpointError(
            f"{path} is tagged as a checkpoint, but its config and weights do not make a model: {error}"
        ) from error
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"{path}: {count} of the {tensor.numel()} numbers in {name} are NaN or infinite. "
                "Training diverged; go back to an earlier checkpoint."
            )
    if not _is_text(recorded, fingerprint(model)):
        raise CheckpointError(f"{path} is damaged: its weights are not those that were saved. Copy or save it again.")
    if not _is_text(samples, _samples_hash(golden, calibration)):
        raise CheckpointError(
            f"{path} is damaged: its samples were changed since they were saved. Copy it again, or save the model anew "
            "with nsm.save(model, path, samples=...)."
        )
    return Checkpoint(model.eval(), golden, calibration, recorded)


def load_plain(file: IO[bytes]) -> Any:
    """Load tensors and plain data that `torch.save` wrote to an open file, without executing code in it.

    torch stores members uncompressed but inflates compressed ones, so the declared sizes are checked first.

    Raises:
        ValueError: a compressed member, or a declared size beyond the file.
        Exception: torch's, for a pickle of other objects or a file in another format.
    """
    if file.read(len(_ZIP)) == _ZIP:  # as torch tells: files from before 1.6 are no archives
        check_records(file)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's warnings about foreign files
        return torch.load(file, map_location="cpu", weights_only=True)


def check_records(file: IO[bytes]) -> None:
    """Raise `ValueError` for an open archive of torch that would unpack to more than it holds."""
    size = file.seek(0, os.SEEK_END)
    with open_zip(file) as archive:
        check_stored(archive, size)
    file.seek(0)
    reader = torch._C.PyTorchFileReader(file)  # of two archives in one file Python and torch may see one each
    check_declared(sum(reader.get_record_size(name) for name in reader.get_all_records()), size)


def fingerprint(model: StepModel) -> str:
    """SHA-256 over the class and config of the model and the names, dtypes, shapes and bytes of its weights.

    Raises:
        InputError: weights on the device "meta", which have no bytes.
    """
    digest = hashlib.sha256(json.dumps([type(model).__name__, model.config], sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            raise InputError(
                f"{model.kind} has shapes and no numbers: {name} lies on the device meta. Build it on the CPU and load "
                "its weights first."
            )
        array = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _samples_hash(*lists: Sequence[NDArray[Any]]) -> str:
    """SHA-256 over how many sequences each list has, and their dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for sequences in lists:
        digest.update(f"{len(sequences)};".encode())
        for array in sequences:
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _is_text(value: object, wanted: str) -> bool:
    """Whether a value out of a file, of any type, is this text."""
    return isinstance(value, str) and value == wanted


def _is_checkpoint(file: IO[bytes]) -> bool:
    """Whether an open file was written by `save`, in any version; nothing in it is loaded."""
    try:
        with zipfile.ZipFile(file) as archive:
            (name,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name))
            with archive.open(name) as pickled:
                return FORMAT.encode() in pickled.read(_TAGGED)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError):
        return False


def _read(path: Path) -> Any:
    try:
        file = open_regular(path, "torch")
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no file {path}.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Expected a .pt written by nsm.save.") from error
    try:
        with file:
            return load_plain(file)
    except ValueError as error:
        raise CheckpointError(
            f"{path} was refused: {error}. If a program for archives packed it anew, take the file from before; "
            "expected a .pt written by nsm.save."
        ) from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused: it holds pickled Python objects (a whole module, perhaps), and loading those would "
            "run code from the file; or it is no PyTorch file at all. Load it yourself where you trust it, and write "
            "config and weights with nsm.save(model, path)."
        ) from error
    except Exception as error:  # on damaged files torch raises whatever its parser stumbles over
        raise CheckpointError(
            f"{path} cannot be read as a PyTorch file ({type(error).__name__}). It is damaged, or something else; "
            "expected a .pt written by nsm.save."
        ) from error


def checked_sample(model: StepModel, index: int, sample: ArrayLike, name: str = "samples") -> torch.Tensor:
    """A sequence of tokens, [T, ...], in the dtype that the graphs take.

    Args:
        model: that takes the sequence.
        index, name: of the sequence and of the argument that it comes from, for the message.
        sample: integers of any width for ids, floats of any width for vectors.

    Raises:
        InputError: the model does not take it, or it holds NaN or infinity.
    """
    spec = model.token_spec
    try:
        array = sample.detach().cpu().numpy() if isinstance(sample, torch.Tensor) else np.asarray(sample)
        if array.dtype.kind not in ("iu" if spec.dtype == "int64" else "f"):
            raise InputError(f"its dtype is {array.dtype}, the model takes {spec.dtype}.")
        tensor = torch.from_numpy(array.astype(spec.dtype))
        model.check_tokens(taken_by(model, tensor).unsqueeze(0))
        if not bool(torch.isfinite(tensor).all()):
            raise InputError("it holds NaN or infinite numbers.")
    except (InputError, ValueError, TypeError) as error:
        raise InputError(f"{name}[{index}] is not a sequence for this model: {error}") from error
    return tensor


def taken_by(model: StepModel, tensor: torch.Tensor) -> torch.Tensor:
    """Vectors in the dtype of the weights, which are in float64 after `double()`; ids as they are."""
    return tensor.to(model.dtype) if tensor.is_floating_point() else tensor
