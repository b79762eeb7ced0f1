"""A foreign ONNX file: read safely, with its inputs, outputs and shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ValueInfoProto, numpy_helper
from onnx.inliner import inline_local_functions

from nsm.errors import InputError, UnsupportedError
from nsm.export.graphs import dtype_of, sort_nodes
from nsm.export.sources.onnx.file.limits import check_functions, load_weights
from nsm.export.sources.onnx.file.operators import check_operators
from nsm.export.sources.onnx.file.recurrent_layout import put_time_first
from nsm.files import check_regular
from nsm.spec import LARGEST
from nsm.trace import Array

OLDEST = 13
"""Oldest operator set that a file is converted to; before it, many inputs of operators were attributes."""

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Port:
    """An input or output; a symbolic dimension is its name, or "?" without a name."""

    name: str
    shape: Shape
    dtype: str


def read_onnx(path: Path) -> onnx.ModelProto:
    """The model of a file, with its weights in memory.

    Raises:
        InputError: no such file, no ONNX model, or weights that are damaged, missing, or outside the file's folder.
        UnsupportedError: it is too large, has operators that are no step's, or an operator set that cannot be
            converted.
    """
    try:
        check_regular(path, "onnx")
        model = onnx.load(str(path), load_external_data=False)
        if not model.graph.node:
            raise ValueError("it has no nodes")
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.") from error
    except Exception as error:  # protobuf's errors have no common base
        raise InputError(f"{path} cannot be read as an ONNX model: {error}. Was it copied whole?") from error
    if model.functions:
        check_functions(path, model)
        model = inline_local_functions(model)
    load_weights(path, model)
    sort_nodes(model)
    check_operators(path, model)
    _name_axes(model)
    put_time_first(model)
    version = opset_of(model)
    if version < OLDEST:
        try:
            onnx.version_converter.convert_version(model, OLDEST)
        except Exception as error:  # C++ exceptions of the converter
            raise UnsupportedError(
                f"{path} has operator set {version}, and cannot be converted to {OLDEST}: {error}. Export it anew with "
                f"opset_version >= {OLDEST}."
            ) from error
    return model


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the standard operators that a model takes; 0 where it does not say."""
    return next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)


def _name_axes(model: onnx.ModelProto) -> None:
    """Give a name to each open axis of an input that has none; old exporters write -1 for one."""
    for value in model.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if _size(dim) == "?":
                dim.dim_param = f"{value.name}.{axis}"


def ports(values: list[ValueInfoProto]) -> dict[str, Port]:
    """Inputs or outputs by name.

    Raises:
        UnsupportedError: one is no tensor, or too large.
        InputError: one has an element type that there is not.
    """
    found = {}
    for value in values:
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type"):
            raise UnsupportedError(
                f"{value.name} is no tensor. Sequences and optional values cannot be states or inputs."
            )
        shape = tuple(map(_size, kind.shape.dim))
        dtype = dtype_of(kind.elem_type, value.name)
        nbytes = math.prod(size for size in shape if isinstance(size, int)) * dtype.itemsize
        if nbytes > LARGEST:
            raise UnsupportedError(
                f"{value.name} is {dtype}{list(shape)}, {nbytes:,} bytes; a call takes and gives at most {LARGEST:,} "
                "bytes of each. Was the file damaged? Export a smaller step."
            )
        found[value.name] = Port(value.name, shape, str(dtype))
    return found


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | str:
    """Of an axis: its name where it is open, "?" where it has none."""
    if dim.HasField("dim_value"):
        return dim.dim_value if dim.dim_value >= 0 else "?"
    return dim.dim_param or "?"


def real_inputs(model: onnx.ModelProto) -> dict[str, Port]:
    """The inputs that are not initializers, which old files list as inputs too."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return ports([value for value in model.graph.input if value.name not in weights])


def default_inputs(model: onnx.ModelProto) -> dict[str, Port]:
    """The inputs with a default value: those that are initializers too."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return ports([value for value in model.graph.input if value.name in weights])


def take_default(model: onnx.ModelProto, name: str) -> Array:
    """The default value of an input, which has none from then on."""
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    array: Array = numpy_helper.to_array(tensor)
    model.graph.initializer.remove(tensor)
    return array


def fix_shapes(model: onnx.ModelProto, shapes: Mapping[str, str]) -> None:
    """Put sizes, or other names, in the place of open axes of inputs, in place, from text: `1,512` or `batch,576`.

    A name that several inputs have is given the size in all of them.

    Raises:
        InputError: no such input, another number of axes, or a size that the graph has otherwise.
    """
    inputs = real_inputs(model)
    known: dict[str, int | str] = {}
    for name, text in shapes.items():
        if name not in inputs:
            raise InputError(f"--shape {name}={text}: there is no input {name!r}; there are {', '.join(inputs)}.")
        shape = inputs[name].shape
        wanted = [int(part) if part.isdecimal() else part for part in map(str.strip, text.split(","))]
        fits = len(wanted) == len(shape) and all(
            part == size or (isinstance(size, str) and part and known.get(size, part) == part)
            for part, size in zip(wanted, shape, strict=True)
        )
        if not fits or 0 in wanted:
            raise InputError(
                f"--shape {name}={text}: the input {name} has the shape {list(shape)}; expected a size, or a name "
                "to leave it open, for each of its axes, and where the graph has a size, that one."
            )
        known |= {size: part for part, size in zip(wanted, shape, strict=True) if isinstance(size, str)}
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            new = known.get(dim.dim_param, dim.dim_param)
            if isinstance(new, int):
                dim.dim_value = new
            elif new:
                dim.dim_param = new


def fix_inputs(model: onnx.ModelProto, constants: Mapping[str, str]) -> None:
    """Make constants of inputs, in place, from numbers as text: `16000`, or `1,0,0`.

    Raises:
        InputError: no such input, no such numbers, or too many.
    """
    for name in constants:
        if name in default_inputs(model):
            take_default(model, name)
    inputs = real_inputs(model)
    for name, text in constants.items():
        if name not in inputs:
            raise InputError(f"--constant {name}={text}: there is no input {name!r}; there are {', '.join(inputs)}.")
        port = inputs[name]
        sizes = [size if isinstance(size, int) else 1 for size in port.shape]
        try:
            given = _numbers(text, np.dtype(port.dtype))
            array = np.broadcast_to(given.reshape(()), sizes) if given.size == 1 else given.reshape(sizes)
        except (ValueError, OverflowError) as error:
            raise InputError(
                f"--constant {name}={text}: the input {name} takes {port.dtype}{list(port.shape)}; expected a "
                f"number that this dtype holds, or as many as it takes, between commas ({error})."
            ) from error
        model.graph.initializer.append(numpy_helper.from_array(np.array(array), name))
        (value,) = (value for value in model.graph.input if value.name == name)
        model.graph.input.remove(value)


def _numbers(text: str, dtype: np.dtype[Any]) -> Array:
    """Numbers as text, exactly: none is rounded to an integer, and none overflows.

    Raises:
        ValueError: one is none, or is not in the range of the dtype.
        OverflowError: the same, as numpy says it.
    """
    parts = [part.strip() for part in text.split(",")]
    if dtype.kind == "b":
        words = {"0": False, "1": True, "false": False, "true": True}
        if unknown := [part for part in parts if part.lower() not in words]:
            raise ValueError(f"{unknown[0]} is not one of {', '.join(words)}")
        return np.array([words[part.lower()] for part in parts])
    if dtype.kind in "iu":
        return np.array([int(part) for part in parts], dtype)
    with np.errstate(over="ignore"):
        numbers = np.array([float(part) for part in parts]).astype(dtype)
    if not np.isfinite(numbers).all():
        raise ValueError("not finite")
    return numbers
