"""Limits on foreign ONNX files, checked before memory is allocated: a few bytes can declare terabytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import onnx
from onnx import TensorProto
from onnx.external_data_helper import load_external_data_for_tensor

from nsm.errors import InputError, UnsupportedError
from nsm.export.graphs import dtype_of, node_name, nodes_of, tensors_of
from nsm.files import LIMITS, regular_size

MOST_BYTES = LIMITS["onnx"]
"""Of weights, and of anything else: one protobuf message, which a graph is put together in, holds no more."""

MOST_NODES = 1_000_000
"""Nodes and their attributes, once all functions of a file are put in line."""

DEEPEST = 100
"""How deep functions of a file may call each other."""

MOST_LANES = 4096
"""Streams that a graph is examined with, if it is for a fixed number of them: each alone, and all together."""

MOST_NUMBERS = 1 << 24
"""Of the main input in a call: a graph is examined over some dozens of calls at once."""

# Element types of which several numbers share a byte.
_BITS = {
    TensorProto.UINT4: 4,
    TensorProto.INT4: 4,
    TensorProto.FLOAT4E2M1: 4,
    **{getattr(TensorProto, name): 2 for name in ("UINT2", "INT2") if hasattr(TensorProto, name)},
}

Function = tuple[str, str, str]


@dataclass(frozen=True)
class _Extent:
    """The size of a function or graph when inlined: nodes with attributes, bytes, and depth of calls."""

    parts: int
    nbytes: int
    depth: int


def check_functions(path: Path, model: onnx.ModelProto) -> None:
    """Refuse functions that call each other without end, or so that far too much comes of it.

    Thirty functions of which each calls the one before twice are a thousand million nodes in two kilobytes.

    Raises:
        UnsupportedError: there are too many nodes, too many bytes, or calls too deep.
    """
    bodies: dict[Function, list[onnx.NodeProto]] = {}
    for item in model.functions:
        bodies.setdefault(_key(item.domain, item.name, item.overload), []).extend(nodes_of(item))
    known: dict[Function, _Extent] = {}

    def extent(nodes: list[onnx.NodeProto], level: int) -> _Extent:
        parts = nbytes = depth = 0
        for node in nodes:
            key = _key(node.domain, node.op_type, node.overload)
            own = sum(attribute.ByteSize() for attribute in node.attribute)
            if key not in bodies:
                parts, nbytes = parts + 1 + len(node.attribute), nbytes + node.ByteSize()
                continue
            if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
                raise UnsupportedError(
                    f"{path}: the node {node_name(node)} gives a graph to the function {node.op_type} of the file, "
                    "which is not read here. Export the model without functions of its own."
                )
            if key not in known:
                if level == DEEPEST:
                    raise _too_deep(path)
                known[key] = extent(bodies[key], level + 1)
            called = known[key]
            # Each of its nodes may read the outputs of the call.
            parts, nbytes = parts + called.parts, nbytes + called.nbytes + own * called.parts
            depth = max(depth, called.depth + 1)
        return _Extent(parts, nbytes, depth)

    found = extent(list(nodes_of(model.graph)), 0)
    if found.depth > DEEPEST:
        raise _too_deep(path)
    if found.parts > MOST_NODES or found.nbytes > MOST_BYTES:
        raise UnsupportedError(
            f"{path}: with the functions of the file put in line, which backends need, its graph has "
            f"{found.parts:,} nodes and attributes of {found.nbytes:,} bytes; at most {MOST_NODES:,} and "
            f"{MOST_BYTES:,} are read. Export the model without functions of its own."
        )


def _key(domain: str, name: str, overload: str) -> Function:
    return "" if domain == "ai.onnx" else domain, name, overload


def _too_deep(path: Path) -> UnsupportedError:
    return UnsupportedError(
        f"{path}: its functions call each other more than {DEEPEST} deep, or without end. Export the model without "
        "functions of its own."
    )


def check_main(path: Path, name: str, shape: Sequence[int | str]) -> None:
    """Raise `UnsupportedError` where the main input is too large to examine the graph over many calls."""
    if isinstance(shape[0], int) and shape[0] > MOST_LANES:
        raise UnsupportedError(
            f"{path}: the input {name} is {list(shape)}, for {shape[0]:,} streams; at most {MOST_LANES:,} are taken. "
            "Export the model for one stream, or for any number of them."
        )
    count = math.prod(max(1, size) for size in shape if isinstance(size, int))
    if count > MOST_NUMBERS:
        raise UnsupportedError(
            f"{path}: the input {name} is {list(shape)}, {count:,} numbers; a call takes at most {MOST_NUMBERS:,} of "
            "the main input. Was the file damaged? Export a smaller step."
        )


def load_weights(path: Path, model: onnx.ModelProto) -> None:
    """Load external weights into the model, and check the declared size of each.

    Raises:
        UnsupportedError: they are more than a graph can hold.
        InputError: they are missing, lie outside the file's folder, or have another size than their shapes.
    """
    total = sum(nbytes_of(path, tensor) for tensor in tensors_of(model))
    if total > MOST_BYTES:
        raise UnsupportedError(
            f"{path} has {total / 1e9:.1f} GB of weights; graphs are put together in memory here, up to "
            "2 GB. Split the model, or take a smaller one."
        )
    for tensor in tensors_of(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            _load_beside(path, tensor)
        needed = nbytes_of(path, tensor)
        try:
            onnx.checker.check_tensor(tensor)
            if tensor.raw_data and len(tensor.raw_data) != needed:
                raise ValueError(f"it has {len(tensor.raw_data):,} bytes, and {_kind(tensor)} takes {needed:,}")
        except Exception as error:  # raised from C++
            raise InputError(
                f"{path}: the weight {tensor.name} is damaged: {error}. Copy or export the file again."
            ) from error


def nbytes_of(path: Path, tensor: TensorProto) -> int:
    """Bytes of a tensor's numbers, by its shape and element type.

    Raises:
        InputError: there is no such element type, or a size below 0.
    """
    if any(size < 0 for size in tensor.dims):
        raise InputError(
            f"{path}: the weight {tensor.name} has the shape {list(tensor.dims)}; sizes are 0 or more. Was the file "
            "damaged? Copy or export it again."
        )
    count: int = math.prod(tensor.dims)
    bits = _BITS.get(tensor.data_type) or 8 * dtype_of(tensor.data_type, f"{path}: the weight {tensor.name}").itemsize
    return -(-count * bits // 8)


def _kind(tensor: TensorProto) -> str:
    return f"{TensorProto.DataType.Name(tensor.data_type).lower()}{list(tensor.dims)}"


def _load_beside(path: Path, tensor: TensorProto) -> None:
    entries = {item.key: item.value for item in tensor.external_data}  # the last of a key counts, for the loader too
    location = entries.get("location", "")
    if not _lies_inside(path.parent, location):
        raise InputError(
            f"{path}: the weight {tensor.name} is to lie in {location!r}, which is outside the folder of the file. "
            "Put all files of a model into one folder."
        )
    needed = nbytes_of(path, tensor)
    if "length" in entries and entries["length"] != str(needed):
        raise InputError(
            f"{path}: the weight {tensor.name} is to be {entries['length']} bytes of {location!r}, and {_kind(tensor)} "
            f"takes {needed:,}. Was the file damaged? Copy or export it again."
        )
    if "length" not in entries:  # it need not be there, and then the loader would take all that follows
        tensor.external_data.add(key="length", value=str(needed))
    try:
        _check_room(path.parent / location, int(entries.get("offset", 0)), needed)
        load_external_data_for_tensor(tensor, str(path.parent))
    except Exception as error:  # missing, too short, or refused by the loader itself
        raise InputError(f"{path}: the weight {tensor.name} cannot be read from {location!r}: {error}") from error
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]


def _check_room(path: Path, offset: int, needed: int) -> None:
    """Raise `ValueError` or `OSError` where a file does not hold so many bytes at a place."""
    size = regular_size(path)
    if not 0 <= offset <= size - needed:
        raise ValueError(f"it has {size:,} bytes, too few for {needed:,} from byte {offset:,} on")


def _lies_inside(folder: Path, location: str) -> bool:
    pure = PurePosixPath(location)
    try:
        inside = (folder / location).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # too long, a link to itself, a NUL byte
        return False
    return bool(location) and inside and not pure.is_absolute() and ".." not in pure.parts
