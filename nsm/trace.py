"""Golden traces: recorded sequences with the outputs and states of the reference."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from nsm.decode import encode
from nsm.errors import BundleDamagedError
from nsm.files import check_npy, check_stored, open_regular, open_zip

Array = NDArray[Any]
Arrays = dict[str, Array]
Origin = Literal["recorded", "synthetic"]
_GROUPS = ("inputs", "outputs", "before", "after", "decisions")


@dataclass(frozen=True)
class Trace:
    """N streams of T steps each, all from the initial state and without a reset.

    Args:
        inputs: by input name, [N, T, ...]: the inputs of one lane at each step.
        outputs: by output name, [N, T, P, ...]: the outputs of the reference at the token positions `positions`.
        positions: [P], which tokens of a call the outputs are kept for (all of them, unless that were too large).
        sampled: [n], the steps for which the full states are kept, ascending.
        before, after: by state name, [M, n, ...]: the reference's states around each sampled step, for the
            first M <= N streams.
        fingerprint: of the model that was recorded.
        source: whether the sequences are real ("recorded") or made up ("synthetic").
        conditioning: the conditioning floor, by kind of error ("one_step", "free_run") and tensor; see
            `nsm.runtimes.parity.conditioning`. Empty if it is unknown.
        decisions: for a model that changes the masks of its banks at run time, the masks and the values that decide
            them, by state name, [N, T + 1, ...]: at the beginning, and after every step. Empty for other models.
    """

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    positions: Array
    sampled: Array
    before: Mapping[str, Array]
    after: Mapping[str, Array]
    fingerprint: str
    source: Origin
    conditioning: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    decisions: Mapping[str, Array] = field(default_factory=dict)

    @property
    def streams(self) -> int:
        return int(next(iter(self.inputs.values())).shape[0])

    @property
    def steps(self) -> int:
        return int(next(iter(self.inputs.values())).shape[1])

    @property
    def state_streams(self) -> int:
        """M, the streams whose states were kept."""
        return int(next(iter(self.before.values())).shape[0])

    def first(self, steps: int) -> Trace:
        """The same streams, cut after `steps` steps."""
        kept = self.sampled < steps
        return Trace(
            {name: value[:, :steps] for name, value in self.inputs.items()},
            {name: value[:, :steps] for name, value in self.outputs.items()},
            self.positions,
            self.sampled[kept],
            {name: value[:, kept] for name, value in self.before.items()},
            {name: value[:, kept] for name, value in self.after.items()},
            self.fingerprint,
            self.source,
            self.conditioning,
            {name: value[:, : steps + 1] for name, value in self.decisions.items()},
        )

    def save(self, path: Path) -> None:
        """Write one .npz: arrays only, no pickles."""
        meta = {"fingerprint": self.fingerprint, "source": self.source, "conditioning": encode(self.conditioning)}
        groups = {name: getattr(self, name) for name in _GROUPS}
        arrays = {f"{group}/{name}": value for group, part in groups.items() for name, value in part.items()}
        arrays |= {"positions": self.positions, "sampled": self.sampled, "meta": np.array(json.dumps(meta))}
        np.savez(path, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Inverse of `save`.

        Raises:
            BundleDamagedError: the file is no such trace.
        """
        arrays = load_arrays(path)
        groups: dict[str, Arrays] = {name: {} for name in _GROUPS}
        try:
            for key, value in arrays.items():
                group, _, name = key.partition("/")
                if name:
                    groups[group][name] = value
            meta = json.loads(str(arrays["meta"]))
            empty = [name for name, group in groups.items() if not group and name != "decisions"]
            if empty:
                raise ValueError(f"nothing in {empty}")
            return cls(
                positions=arrays["positions"],
                sampled=arrays["sampled"],
                fingerprint=meta["fingerprint"],
                source=meta["source"],
                conditioning=_floors(meta["conditioning"]),
                **groups,
            )
        except (AttributeError, KeyError, ValueError, TypeError) as error:
            raise BundleDamagedError(f"{path} is not a golden trace ({error!r}). Export the bundle again.") from error


def _floors(data: Mapping[str, Mapping[str, float | None]]) -> dict[str, dict[str, float]]:
    """Return the conditioning floors from JSON, where infinity is null."""
    return {
        kind: {name: math.inf if value is None else float(value) for name, value in part.items()}
        for kind, part in data.items()
    }


def load_arrays(path: Path) -> Arrays:
    """All arrays of an .npz, never unpickling.

    Raises:
        BundleDamagedError: the file is missing or is no such archive.
    """
    try:
        with open_regular(path, "arrays") as file:
            return read_arrays(file)
    except Exception as error:  # on damaged archives zipfile and numpy raise whatever they stumble over
        raise BundleDamagedError(
            f"{path} cannot be read as an archive of arrays ({error}). Export the bundle again."
        ) from error


def read_arrays(file: IO[bytes], unpacked: int = 0) -> Arrays:
    """All arrays of an open .npz, as `numpy.savez` writes it, never unpickling.

    The sizes that the archive and its arrays declare are checked against the file; see `check_stored`.

    Raises:
        ValueError: compressed, or its declared sizes exceed the file.
        Exception: of zipfile and numpy, for a file in another format.
    """
    size = file.seek(0, os.SEEK_END)
    with open_zip(file) as archive:
        check_stored(archive, size, unpacked)
        return {member.filename.removesuffix(".npy"): _read_array(archive, member) for member in archive.infolist()}


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    with archive.open(member) as stream:
        check_npy(stream, member.file_size, f"{member.filename} in it")
    # Opened anew, not rewound: after a jump zipfile no longer checks the sum over the bytes.
    with archive.open(member) as stream:
        found: Array = np.lib.format.read_array(stream, allow_pickle=False)
    return found
