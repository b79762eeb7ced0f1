"""The tree of errors. Every error nsm raises on purpose is an `NsmError`, and each class knows the exit code
that the command line ends with when the error reaches it.

| code | meaning                                            |
|------|----------------------------------------------------|
| 2    | the call or its input is wrong                     |
| 3    | something needed is missing or unsupported         |
| 4    | the build, or the artifact while it ran, failed    |
| 5    | parity failed                                      |
| 6    | a bundle is damaged or from another version        |
| 7    | the low precision is not faster than fp32 there    |

A message names the given value, the expectation and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


class NsmError(Exception):
    """Root of the tree; never raised itself."""

    exit_code = 1


class InputError(NsmError):
    """An invalid argument or input tensor.

    `lanes` are those whose tokens a session refuses; empty where the call as a whole is wrong.
    """

    exit_code = 2

    def __init__(self, message: str, lanes: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.lanes = tuple(lanes)


class ConfigError(InputError):
    """A model or layer was asked for with sizes or options that do not fit together."""


class CheckpointError(InputError):
    """The file is not a checkpoint written by `nsm.save`, or holds weights that cannot be used."""


class SnapshotError(InputError):
    """The snapshot is damaged, or belongs to another model."""


class StreamError(InputError):
    """The call does not fit where the stream stands (for example a step after the last, partial chunk)."""


class NotCopyableError(InputError, TypeError):
    """The object holds memory of a backend, and can be neither copied nor pickled."""


class OutputExistsError(InputError):
    """The output path exists and overwriting was not asked for."""


class UnsupportedError(NsmError):
    """The operation exists, but not for this model, target or version."""

    exit_code = 3


class MissingDependencyError(UnsupportedError):
    """A package is not installed; the message names the extra that installs it."""


class DeviceUnavailableError(UnsupportedError):
    """The artifact is in order, but the hardware it was built for is not in this machine."""


class BuildError(NsmError):
    """A converter or builder failed. `log` is the kept log of the builder, if it wrote one."""

    exit_code = 4

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message if log is None else f"{message}\nThe builder's log: {log}")
        self.log = log


class RunError(NsmError):
    """A backend failed while it ran an artifact."""

    exit_code = 4


class NonFiniteError(RunError):
    """An output or state became NaN or infinite while a stream ran; the `lanes` where it did can be reset."""

    def __init__(self, message: str, lanes: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.lanes = tuple(lanes)


class ParityError(NsmError):
    """The artifact is not the reference model within its budget."""

    exit_code = 5


class SlowerError(NsmError):
    """The artifact in low precision is not faster than the same target's in fp32.

    `artifacts` are the built and measured ones, as for the manifest; they are not kept.
    """

    exit_code = 7

    def __init__(self, message: str, artifacts: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(message)
        self.artifacts = tuple(artifacts)


class BundleError(NsmError):
    """The bundle cannot be read."""

    exit_code = 6


class BundleDamagedError(BundleError):
    """A payload file is missing, truncated, or does not have the recorded hash."""


class BundleVersionError(BundleError):
    """The bundle was written in another format version."""


class UncheckedWarning(UserWarning):
    """An artifact was opened that was never compared with its reference."""
