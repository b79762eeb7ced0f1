"""Snapshots: the state of one lane or of all lanes, as bytes."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from nsm.errors import InputError, SnapshotError
from nsm.runtimes.session.inputs import checked_state
from nsm.runtimes.session.lanes import lane_shape
from nsm.spec import StepSpec
from nsm.trace import Arrays, read_arrays

_VERSION = 2
_MAGIC = b"nsm-snapshot %d\n" % _VERSION
_ANY_VERSION = re.compile(rb"nsm-snapshot (\d{1,9})\n")


@dataclass(frozen=True)
class Snapshot:
    """The contents of a snapshot.

    fingerprint: fingerprint of the model.
    lanes: B for a snapshot of all lanes; None for one lane, whose arrays have no lane axis.
    arrays: the states by name.
    tokens: number of tokens of each lane since its reset, for a model with a capacity.
    """

    fingerprint: str
    lanes: int | None
    arrays: Arrays
    tokens: list[int] | None = None


def pack(snapshot: Snapshot) -> bytes:
    """Serialize the snapshot, with a hash."""
    buffer = io.BytesIO()
    facts = {"fingerprint": snapshot.fingerprint, "lanes": snapshot.lanes}
    header = np.array(json.dumps(facts | ({} if snapshot.tokens is None else {"tokens": snapshot.tokens})))
    states = {f"state/{name}": value for name, value in snapshot.arrays.items()}
    np.savez(buffer, allow_pickle=False, header=header, **states)
    payload = buffer.getvalue()
    return _MAGIC + hashlib.sha256(payload).digest() + payload


def unpack(
    data: bytes | bytearray | memoryview, fingerprint: str, lanes: int | None, shapes: Mapping[str, tuple[int, ...]]
) -> Snapshot:
    """Parse a snapshot and check that it fits the model.

    Args:
        data: result of `pack`: bytes, or an object with the buffer protocol.
        fingerprint, lanes, shapes: of the model, as in `Snapshot`.

    Raises:
        SnapshotError: `data` is not bytes, is damaged, or is of another version, another model or other lanes.
    """
    snapshot = _parse(_as_bytes(data))
    if snapshot.fingerprint != fingerprint:
        raise SnapshotError(
            f"The snapshot is of another model (fingerprint {snapshot.fingerprint[:12]}..., this is "
            f"{fingerprint[:12]}...). Restore it in a session of the model it was taken from."
        )
    if snapshot.lanes != lanes:
        held = "one lane" if snapshot.lanes is None else f"all {snapshot.lanes} lanes"
        wanted = "one lane" if lanes is None else f"all {lanes} lanes"
        raise SnapshotError(f"The snapshot holds {held}, the call restores {wanted}. Give `lane` for one lane.")
    for name, shape in shapes.items():
        if snapshot.arrays.get(name, np.empty(0)).shape != shape:
            raise SnapshotError(f"The snapshot does not hold {name} of shape {list(shape)}.")
    return snapshot


def fitting(data: bytes | bytearray | memoryview, fingerprint: str, spec: StepSpec, one_lane: bool) -> Snapshot:
    """Parse a snapshot of one lane or of all, and convert its states for a session.

    Raises:
        SnapshotError: as for `unpack`, or a state is invalid for the model.
    """
    shapes = {state.name: lane_shape(state) if one_lane else state.shape for state in spec.states}
    held = unpack(data, fingerprint, None if one_lane else spec.batch, shapes)
    try:
        arrays = {
            item.name: checked_state(held.arrays, item, spec.chunk_size, shapes[item.name]) for item in spec.states
        }
        return replace(held, arrays=arrays)
    except InputError as error:
        raise SnapshotError(f"The snapshot does not fit this model: {error} Take it again.") from error


def _as_bytes(data: object) -> bytes:
    if isinstance(data, bytes):
        return data
    try:
        return bytes(memoryview(data))  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:  # ValueError: the memory was released
        raise SnapshotError(
            f"A snapshot is bytes; given a {type(data).__name__}: {error}. Expected what Session.snapshot() "
            "returned, of a file what Path.read_bytes() returns."
        ) from error


def _parse(data: bytes) -> Snapshot:
    found = _ANY_VERSION.match(data)
    if found and int(found[1]) != _VERSION:
        raise SnapshotError(
            f"The snapshot has the format version {int(found[1])}, and this nsm reads version {_VERSION}. Restore it "
            "with the nsm version that took it, or restart the stream and take another."
        )
    body = data[len(_MAGIC) :]
    if not data.startswith(_MAGIC) or hashlib.sha256(body[32:]).digest() != body[:32]:
        raise SnapshotError(
            "These bytes are not a snapshot, or they are damaged: the hash does not fit. "
            "Expected what Session.snapshot() returned."
        )
    # The hash detects damage, not forgery: a forged snapshot can have a matching hash.
    try:
        held = read_arrays(io.BytesIO(body[32:]))
        header = json.loads(str(held["header"]))
        states = {name.removeprefix("state/"): value for name, value in held.items() if name.startswith("state/")}
        lanes, tokens = header["lanes"], header.get("tokens")
        if tokens is not None and not _are_counts(tokens, lanes):
            raise ValueError(f"its tokens are {str(tokens)[:80]}, and not a count for each lane")
        return Snapshot(str(header["fingerprint"]), lanes, states, tokens)
    except Exception as error:  # errors of zipfile and numpy have no common base
        raise SnapshotError(
            f"These bytes are not a snapshot, although their hash fits: {error}. "
            "Expected what Session.snapshot() returned."
        ) from error


def _are_counts(tokens: object, lanes: object) -> bool:
    """Return whether `tokens` is a valid token count for each lane."""
    counts = tokens if isinstance(tokens, list) else []
    whole = all(isinstance(count, int) and not isinstance(count, bool) for count in counts)
    return whole and len(counts) == (lanes or 1) and all(0 <= count < 2**62 for count in counts)
