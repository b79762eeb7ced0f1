"""The target mobile: graphs in the ORT format, and the list of operators for a reduced ONNX Runtime build."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path

import onnxruntime as ort

from nsm.errors import BuildError
from nsm.export.builders.base import Built, Request

CONFIGS = {"required_operators.config": False, "required_operators_and_types.config": True}
"""File name of a list of operators -> whether it includes their types."""


def build(request: Request) -> Built:
    """Convert every entry to `.ort`, and list the operators.

    The graphs get the optimisations that are valid on every processor (`ORT_ENABLE_EXTENDED`). An `.ort` file
    contains its weights, so each entry has its own copy.

    Raises:
        BuildError: ONNX Runtime refuses a graph.
    """
    request.folder.mkdir(exist_ok=True)
    graphs = []
    for entry in request.spec.entries:
        path = request.folder / f"{entry.name}.ort"
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(path)
        options.add_session_config_entry("session.save_model_format", "ORT")
        try:
            ort.InferenceSession(str(request.graph(entry.name)), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
            raise BuildError(f"ONNX Runtime cannot convert {entry.name}.onnx: {error}") from error
        graphs.append(path)
    configs = [_config(graphs, request.folder / name, types) for name, types in CONFIGS.items()]
    notes = (
        f"each of the {len(graphs)} graphs contains the weights; an application that only runs whole chunks needs "
        "only step.ort",
    )
    files = [*graphs, *configs]
    return Built(
        tuple(path.relative_to(request.directory).as_posix() for path in files), request.device or "cpu", notes
    )


def _config(graphs: list[Path], path: Path, types: bool) -> Path:
    """Write the configuration for `--include_ops_by_config` of a reduced ONNX Runtime build."""
    from onnxruntime.tools.ort_format_model import create_config_from_models

    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)  # it logs each step
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves files open
        create_config_from_models(graphs, path, types)
    # Remove comments: the tool writes the path of the graphs there, which is temporary.
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    path.write_text("\n".join(lines) + "\n")
    return path
