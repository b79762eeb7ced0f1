"""One file of weights for several graphs: equal tensors are stored once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx
from onnx.external_data_helper import uses_external_data
from onnx.helper import find_min_ir_version_for

from nsm.bundle import graph_file
from nsm.errors import BuildError

# Smaller tensors stay inside the graph, where a reader sees them.
MIN_BYTES = 1024
# Readers map the file into memory; tensors begin on the boundary of a cache line.
_ALIGNMENT = 64


def save_shared(graphs: Mapping[str, onnx.ModelProto], directory: Path, weights: str) -> list[Path]:
    """Write `{name}.onnx` for each graph, and their larger tensors once for all into the file `weights`.

    The graphs are changed: their tensors refer to the file afterwards, and each has the lowest IR version that its
    operator sets allow, since a runtime refuses one that is newer than itself.

    Args:
        graphs: by name.
        directory: where they go; must exist.
        weights: name of the file of weights, beside the graphs.

    Returns:
        The paths of the graphs.
    """
    places: dict[bytes, int] = {}
    with (directory / weights).open("wb") as file:
        for graph in graphs.values():
            graph.ir_version = find_min_ir_version_for(list(graph.opset_import), ignore_unknown=True)
            for tensor in graph.graph.initializer:
                data = onnx.numpy_helper.to_array(tensor).tobytes()
                if len(data) < MIN_BYTES:
                    continue
                digest = hashlib.sha256(data).digest()
                if digest not in places:
                    file.write(bytes(-file.tell() % _ALIGNMENT))
                    places[digest] = file.tell()
                    file.write(data)
                _refer(tensor, weights, places[digest], len(data))
    paths = []
    for name, graph in graphs.items():
        paths.append(directory / graph_file(name))
        onnx.save(graph, str(paths[-1]))
    return paths


def check_graphs(paths: Iterable[Path]) -> None:
    """Raise `BuildError` for the first graph that is not valid ONNX."""
    for path in paths:
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except Exception as error:  # raised from C++
            raise BuildError(f"The graph of {path.stem} is not valid ONNX: {error}") from error


def load_shared(path: Path) -> onnx.ModelProto:
    """A graph that `save_shared` wrote, with its tensors.

    `onnx.load` refuses weights with more than one hard link, and those of a bundle being replaced have two.
    """
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            place = {item.key: item.value for item in tensor.external_data}
            with (path.parent / Path(place["location"]).name).open("rb") as file:
                file.seek(int(place["offset"]))
                tensor.raw_data = file.read(int(place["length"]))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    return model


def _refer(tensor: onnx.TensorProto, weights: str, offset: int, length: int) -> None:
    """Make a tensor's values those at a place in the file."""
    for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
        tensor.ClearField(field)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", weights), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
