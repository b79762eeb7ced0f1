"""The manifest of a bundle: its model, its files, and the artifact of each target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nsm.decode import decode, encode
from nsm.errors import BundleVersionError, ConfigError
from nsm.files import sha256
from nsm.results import AcceptedBudget, ParityResult, QuantizationResult
from nsm.spec import StepSpec

MANIFEST = "manifest.json"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class FileRecord:
    """One payload file: its path inside the bundle (with /), size in bytes, SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """The artifact of one target.

    `limit` is the number of tokens per lane between two resets, None if the target adds no limit to the model's
    capacity: a counter is exact on the target only up to the limit.
    `files` are its own files and those it shares with other targets. `notes` are sentences for the user.
    `quantization` is None for fp32. `accepted` are budgets that replace those of the precision. `options` are compile
    options for every opening of the artifact; most have none.
    """

    target: str
    device: str
    precision: str
    effective_precision: str
    files: tuple[FileRecord, ...]
    parity: ParityResult
    notes: tuple[str, ...] = ()
    quantization: QuantizationResult | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    accepted: tuple[AcceptedBudget, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(record.size for record in self.files)

    @property
    def label(self) -> str:
        """Its name among the artifacts of a bundle: `openvino`, `openvino int8`."""
        return artifact_label(self.target, self.precision)


def artifact_label(target: str, precision: str) -> str:
    """A target's name, with the precision where that is not fp32."""
    return target if precision == "fp32" else f"{target} {precision}"


@dataclass(frozen=True)
class EntryWork:
    """The least work of a call of an entry in fp32: floating-point operations of linear ops, and bytes moved."""

    flops: float
    nbytes: float


@dataclass(frozen=True)
class Experiment:
    """The result of one experiment on a foreign model, or the reason to skip it; see `nsm.adapters.validate`."""

    name: str
    status: Literal["passed", "skipped"]
    detail: str


@dataclass(frozen=True)
class FailedTarget:
    """A target that was asked for and is not in the bundle: why, and the exit code of such an error."""

    target: str
    reason: str
    exit_code: int


_MODEL = {"class": str, "config": Mapping, "parameters": int}


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`; there is one artifact per target and precision.

    `model` holds at least its `class`, its `config`, and how many `parameters`; `work` the work of an entry, by its
    name, where that can be counted; `examination` the experiments that a foreign model went through; `failed` the
    targets that were asked for and did not pass.
    """

    spec: StepSpec
    fingerprint: str
    model: Mapping[str, Any]
    artifacts: tuple[Artifact, ...]
    files: tuple[FileRecord, ...]
    versions: Mapping[str, str]
    command: str
    created: str
    work: Mapping[str, EntryWork] = field(default_factory=dict)
    examination: tuple[Experiment, ...] = ()
    failed: tuple[FailedTarget, ...] = ()
    format_version: int = field(default=FORMAT_VERSION)

    def __post_init__(self) -> None:
        wrong = [name for name, kind in _MODEL.items() if not isinstance(self.model.get(name), kind)]
        if wrong:
            raise ConfigError(
                f"The model's {wrong[0]} is {self.model.get(wrong[0])!r}; expected {_MODEL[wrong[0]].__name__}."
            )
        labels = [item.label for item in self.artifacts]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ConfigError(f"There are two artifacts of {', '.join(twice)}; expected one of a target and precision.")
        length = self.spec.entry("step").tokens
        for artifact in self.artifacts:
            if artifact.limit is not None and artifact.limit < length:
                raise ConfigError(
                    f"The limit of {artifact.target} is {artifact.limit} tokens, and a call of step takes {length}; "
                    "expected room for one call at least."
                )

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = encode(self)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """Inverse of `to_json`.

        Raises:
            BundleVersionError: another format version.
            BundleError: something is missing or of the wrong kind.
        """
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise BundleVersionError(
                f"The bundle has format version {version!r}; this nsm reads version {FORMAT_VERSION}. "
                "Export it again with this version, or install the nsm that wrote it."
            )
        return decode(cls, data, MANIFEST)


def file_record(directory: Path, relative: str) -> FileRecord:
    """Size and hash of a file in the bundle directory."""
    path = directory / relative
    return FileRecord(relative, path.stat().st_size, sha256(path))
