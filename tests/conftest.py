"""Fixtures that several rooms share: small models, a checkpoint, and one bundle exported from it."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx
import pytest
import torch
from filelock import FileLock

import nsm
from nsm.bundle import Bundle
from nsm.export.graphs import exporter as onnx_export
from nsm.export.options import ExportOptions
from nsm.export.pipeline import export
from nsm.export.verify import artifact as export_build
from nsm.export.verify import isolation
from nsm.export.verify import trial as trial_process
from nsm.models.base import StepModel
from nsm.models.checkpoint import fingerprint
from nsm.models.simple import SimpleNSM
from nsm.models.stream import StreamModel
from nsm.spec import EntrySpec, StepSpec
from tests.small_models import make_model, make_sequences

# Tracing makes objects by the million, and looking for cycles among them took a fifth of the tests' time.
gc.set_threshold(100_000, 50, 50)


def pytest_configure(config: pytest.Config) -> None:
    """Give every worker a processor of its own: the backends take as many threads as they see processors, and spin."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and hasattr(os, "sched_setaffinity"):
        processors = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {processors[int(worker.removeprefix("gw")) % len(processors)]})


# The files that take more than 20 s start first, so that no worker is left with one of them at the end.
LONG = (
    "clients/test_web",
    "cli/test_cli_export",
    "test_house",
    "clients/test_cpp",
    "graphs/test_low_precision",
    "cli/test_cli",
    "graphs/test_exporter",
    "session/test_streams",
    "models/test_stream",
    "session/test_session",
    "test_recall",
    "test_pipeline",
    "verify/test_capacity",
    "builders/test_triton",
    "baselines/test_graphs",
    "verify/test_artifact",
    "verify/test_offline",
    "capture/test_rewrite",
    "sources/test_foreign",
    "test_site",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONG))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _graphs_are_exported_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what torch's exporter gives for a model and an entry: most of the suite's time would be spent in it.

    In a folder that the workers share, by a hash of all that the graph is made from.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "graphs"
    folder.mkdir(exist_ok=True)
    real, exporter = onnx_export._export_entry, torch.onnx.export

    def kept(model: StepModel, spec: StepSpec, entry: EntrySpec, opset: int) -> onnx.ModelProto:
        if not isinstance(model, StreamModel) or torch.onnx.export is not exporter:
            return real(model, spec, entry, opset)
        key = hashlib.sha256(f"{fingerprint(model)} {spec} {entry} {opset}".encode()).hexdigest()
        path = folder / f"{key}.onnx"
        if not path.is_file():
            # In a thread, that is on a stack of its own: at some depths of it CPython 3.11 asks the system for memory
            # at every call and gives it back, and exports take three times as long.
            grad = torch.is_grad_enabled()
            with ThreadPoolExecutor(1, initializer=torch.set_grad_enabled, initargs=(grad,)) as pool:
                proto = pool.submit(real, model, spec, entry, opset).result()
            part = path.with_suffix(f".{os.getpid()}")
            part.write_bytes(proto.SerializeToString())
            part.replace(path)
        return onnx.load_model_from_string(path.read_bytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "_export_entry", kept)
        yield


@pytest.fixture(scope="session", autouse=True)
def build_in_process() -> Iterator[None]:
    """Build in the process of the test: a child process for each build would take a third of the tests' time."""

    def build_here(trial: isolation.Trial) -> isolation.Tried:
        try:
            built = trial_process.build(trial)
        except Exception as error:
            raise isolation.raised(trial_process.told(trial, error)) from error
        return isolation.Tried(isolation.Reply(built.files, built.device, built.notes), {}, "")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_build, "try_target", build_here)
        patch.setattr(export_build, "try_opening", lambda trial: None)
        yield


@pytest.fixture
def child_process(build_in_process: None) -> Iterator[None]:
    """Build and open artifacts in a child process, as users do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_build, "try_target", isolation.try_target)
        patch.setattr(export_build, "try_opening", isolation.try_opening)
        yield


@pytest.fixture(scope="session")
def model() -> SimpleNSM:
    return make_model()


@pytest.fixture(scope="session")
def checkpoint(model: SimpleNSM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `.pt` with samples, written by nsm.save."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
    nsm.save(model, path, samples=make_sequences(16, 520))
    return path


@pytest.fixture(scope="session")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with two lanes for every target, which the workers share. Do not change it: use `bundle_copy`."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exported"
    output = folder / "model.nsm"
    targets = ["onnx", "onnxruntime", "openvino", "tensorrt"]
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not output.exists():
            export(checkpoint, ExportOptions(targets=targets, output=output, batch=2))
    return output


@pytest.fixture
def bundle(exported: Path) -> Bundle:
    return Bundle(exported)


@pytest.fixture
def bundle_copy(exported: Path, tmp_path: Path) -> Path:
    """A bundle of its own for tests that damage or change one."""
    return Path(shutil.copytree(exported, tmp_path / "copy.nsm"))


@pytest.fixture(scope="session")
def model_factory() -> Callable[..., SimpleNSM]:
    return make_model


@pytest.fixture(params=["onnx", "onnxruntime", "openvino"])
def target(request: pytest.FixtureRequest) -> str:
    """Every target that runs on a CPU."""
    return str(request.param)
