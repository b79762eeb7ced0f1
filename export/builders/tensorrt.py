"""The target tensorrt: engines of TensorRT, or of TensorRT for RTX if that is installed."""

from __future__ import annotations

import importlib
import itertools
import os
from pathlib import Path
from typing import Any

from nsm.errors import BuildError, UnsupportedError
from nsm.export.builders.base import Built, Request, lacking
from nsm.files import write_json
from nsm.runtimes import find_target
from nsm.spec import EntrySpec, StepSpec

LOG = "build.log"
LAYERS = "layers.json"


def build(request: Request) -> Built:
    """Build one engine per entry, strongly typed and without TF32, so that the graph decides the precision.

    TensorRT for RTX builds without a GPU. By default its engine is portable: it runs on every supported GPU from
    compute capability 8.0 on; a device such as sm86 restricts it. TensorRT needs a GPU. By default it builds for the
    GPU of this machine; "portable" selects its compatibility mode for Ampere and later.

    Raises:
        UnsupportedError: the installed package cannot build for the device, or lacks an operator.
        BuildError: parsing or building failed. The builder's log, with the parsed layers, is kept beside the bundle.
    """
    package = find_target("tensorrt").require()
    trt = importlib.import_module(package)
    device = request.device or ("portable" if package == "tensorrt_rtx" else "current")
    request.folder.mkdir(exist_ok=True)
    log = _Log(trt)
    files: list[Path] = []
    layers: dict[str, list[str]] = {}
    for entry in request.spec.entries:
        path = request.folder / f"{entry.name}.engine"
        layers[entry.name] = []
        try:
            path.write_bytes(_build_entry(trt, log.logger, request, entry, device, layers[entry.name]))
        except BuildError as error:
            log.lines += [f"layer of {name}: {layer}" for name, found in layers.items() for layer in found]
            raise BuildError(f"{error} {log.last_error()}".rstrip(), log.keep(request, device)) from error
        files.append(path)
    log.write(request.folder / LOG)
    write_json(request.folder / LAYERS, layers)
    files += [request.folder / LOG, request.folder / LAYERS]
    notes = (
        f"built by {package} {trt.__version__} for {device}",
        "an engine runs only on the kind of GPU it was built for, with the same TensorRT version",
    )
    return Built(tuple(path.relative_to(request.directory).as_posix() for path in files), device, notes)


def _build_entry(
    trt: Any, logger: Any, request: Request, entry: EntrySpec, device: str, layers: list[str]
) -> memoryview:
    """Return the serialised engine; append a line per parsed layer to `layers`, even if building fails."""
    builder = trt.Builder(logger)
    flags = trt.NetworkDefinitionCreationFlag
    strongly = getattr(flags, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly is None else 1 << int(strongly))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(request.graph(entry.name))):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        reason = "; ".join(map(str, errors))
        nodes = [(item.node_operator(), item.node_name()) for item in errors if "UNSUPPORTED_NODE" in str(item.code())]
        if nodes:
            raise lacking("TensorRT", request.graph(entry.name), nodes, reason)
        raise BuildError(f"TensorRT cannot parse {entry.name}.onnx: {reason}")
    layers += [f"{layer.name} {layer.type}" for layer in map(network.get_layer, range(network.num_layers))]
    _check_network(trt, network, request.spec, entry)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)
    _set_device(trt, config, device)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildError(f"TensorRT parsed {entry.name}.onnx but could not build an engine for {device}.")
    return memoryview(engine)


def _set_device(trt: Any, config: Any, device: str) -> None:
    known = getattr(trt, "ComputeCapability", None)
    if known is None:
        if device == "portable":
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        elif device != "current":
            raise UnsupportedError(
                f"TensorRT {trt.__version__} builds for the GPU of this machine (current) or for Ampere and later "
                f"(portable); given --device {device}. For other devices, install TensorRT for RTX: pip install "
                "tensorrt-rtx"
            )
    elif device != "portable":
        names = {name.lower(): value for name, value in known.__members__.items() if name != "NONE"}
        if device not in names:
            raise UnsupportedError(
                f"{trt.__name__} {trt.__version__} does not build for --device {device}. Expected one of: "
                f"{', '.join(names)}."
            )
        config.num_compute_capabilities = 1
        config.set_compute_capability(names[device], 0)


def _check_network(trt: Any, network: Any, spec: StepSpec, entry: EntrySpec) -> None:
    """Check the names, shapes and dtypes of the parsed network, states included."""
    wanted = {item.name: (item.shape, item.dtype) for item in (*entry.inputs, *entry.outputs)}
    tokens = entry.inputs[0].shape[1] if entry.inputs else 0
    wanted |= {state.past: (state.shape, state.dtype) for state in spec.states_of(entry.reads)}
    wanted |= {state.present: (state.present_shape(tokens), state.dtype) for state in spec.states_of(entry.writes)}
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    given = {item.name: (tuple(item.shape), trt.nptype(item.dtype).__name__) for item in tensors}
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise BuildError(
                f"TensorRT parsed {name} as {given.get(name, 'absent')}; expected {wanted.get(name, 'absent')}."
            )


class _Log:
    """Collects TensorRT's messages of severity INFO and above as lines."""

    def __init__(self, trt: Any) -> None:
        lines: list[str] = []

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if int(severity) <= int(trt.ILogger.INFO):
                    lines.append(f"{severity} {message}")

        self.lines = lines
        self.logger = Logger()

    def last_error(self) -> str:
        return next((line for line in reversed(self.lines) if "ERROR" in line), "")

    def write(self, path: Path) -> None:
        path.write_text("\n".join(self.lines) + "\n", encoding="utf-8")

    def keep(self, request: Request, device: str) -> Path:
        """Write the log beside the unfinished bundle, which is deleted; number it if the name is taken."""
        for number in itertools.count(1):
            path = request.directory.parent / f"tensorrt-{device}-build{f'-{number}' if number > 1 else ''}.log"
            if not os.path.lexists(path):
                break
        self.write(path)
        return path
