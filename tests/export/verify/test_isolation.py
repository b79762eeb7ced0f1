"""A backend that crashes ends a child process, never the export: the error names it, and known remedies are tried."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import nsm
from nsm.bundle import Bundle
from nsm.errors import BuildError, BundleDamagedError, UnsupportedError
from nsm.export.verify import isolation
from nsm.export.verify.artifact import build_target, try_artifact
from nsm.manifest import MANIFEST, Artifact
from nsm.runtimes import targets
from nsm.runtimes.targets import Target, find_target
from tests.export.attentions import LAYERS, WIDTH, WINDOW, Attentions, frames
from tests.export.helpers import invoke, names, refused, short, succeeded, the_json

pytestmark = pytest.mark.usefixtures("child_process")

_MODULE = """
import os, signal, time
import nsm.runtimes.backends.onnxruntime as ort
from nsm.errors import BuildError, UnsupportedError
from nsm.export.verify.artifact import Built

def die():
    os.kill(os.getpid(), signal.SIGSEGV)

def build(request):
    fault = request.device
    if fault == "dies-building":
        die()
    if fault == "ends":
        os.write(2, b"the last words\\n")
        os._exit(9)
    if fault == "lacks":
        raise UnsupportedError("there is no such operator")
    if fault == "says-no":
        raise BuildError("it does not build", request.directory / "a.log")
    if fault == "stumbles":
        raise ValueError("a fault of the builder's own")
    if fault == "sleeps":
        (request.directory / "started").touch()
        time.sleep(60)
    files = sorted(path for path in request.graphs.iterdir() if path.is_file())
    return Built(tuple(path.relative_to(request.directory).as_posix() for path in files), fault, ("a note",))

def load(files, spec, device, threads, precision="fp32", options={}):
    if device == "dies-opening" and options != {"FAST": "NO"}:
        die()
    if device == "dies-always" or device == "dies-with-one-thread" and threads == 1 and not options:
        die()
    if device == "opens-no-more" and options:
        raise ValueError("there is no option FAST")
    if device == "opens-no-more":
        die()
    return ort.load(files, spec, "cpu", threads, precision)
"""

FAULTS = (
    "cpu",
    "dies-building",
    "dies-opening",
    "dies-always",
    "dies-with-one-thread",
    "opens-no-more",
    "ends",
    "lacks",
    "says-no",
    "stumbles",
    "sleeps",
)


@pytest.fixture
def fragile(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Target:
    """A target in a module that a new process finds; its device says how it fails."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "fragile_target.py").write_text(_MODULE)
    monkeypatch.syspath_prepend(folder)
    row = Target(
        name="fragile",
        runtime="fragile_target",
        builder="fragile_target",
        packages=("onnxruntime",),
        extra="onnxruntime",
        suffix=".onnx",
        folder="graphs",
        devices=FAULTS,
        summary="it crashes",
        trial_threads=(1, None),
        remedies=({"SAFE": "YES"}, {"FAST": "NO"}),
    )
    monkeypatch.setitem(targets._ROWS, row.name, row)
    return row


def built(bundle: Path, target: Target, device: str) -> Artifact:
    return build_target(bundle, Bundle(bundle).manifest.spec, target, device)


def test_what_works_is_built_as_ever(fragile: Target, bundle_copy: Path) -> None:
    artifact = built(bundle_copy, fragile, "cpu")
    assert (artifact.device, artifact.notes, artifact.options) == ("cpu", ("a note",), {})
    assert "graphs/step.onnx" in [record.path for record in artifact.files]


def test_a_builder_that_is_killed_is_an_error_that_names_target_and_signal(fragile: Target, bundle_copy: Path) -> None:
    with pytest.raises(BuildError) as caught:
        built(bundle_copy, fragile, "dies-building")
    assert str(caught.value) == (
        "The target fragile crashed: its process was killed by signal 11 (SIGSEGV) while building it. This is a bug "
        "of the package onnxruntime. Build another target, try another version of the package, or change the model."
    )
    assert caught.value.exit_code == 4


def test_a_builder_that_ends_its_process_is_an_error_with_what_it_wrote_last(
    fragile: Target, bundle_copy: Path
) -> None:
    message = r"ended with exit status 9 while building it \(its last output: the last words\)"
    with pytest.raises(BuildError, match=message):
        built(bundle_copy, fragile, "ends")


@pytest.mark.parametrize("fault", ["dies-opening", "dies-with-one-thread"])
def test_a_crash_on_opening_is_retried_with_the_remedies_and_the_one_that_helps_is_recorded(
    fragile: Target, bundle_copy: Path, fault: str
) -> None:
    artifact = built(bundle_copy, fragile, fault)
    options = {"FAST": "NO"} if fault == "dies-opening" else {"SAFE": "YES"}
    assert (artifact.device, dict(artifact.options)) == (fault, options)
    shown = isolation.shown_options(options)
    assert artifact.notes == (
        "a note",
        f"without {shown} the compiler of fragile crashed here (its process was killed by signal 11 (SIGSEGV) while "
        "opening it): every session sets this compile option, and any other program that loads the files must "
        "set it too",
    )
    try_artifact(Bundle(bundle_copy), artifact)
    with pytest.raises(BuildError, match=r"differs here\. Build it again on this machine: nsm build BUNDLE"):
        try_artifact(Bundle(bundle_copy), replace(artifact, options={}))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("dies-always", r"With FAST=NO it failed as well: its process was killed by signal 11"),
        ("opens-no-more", r"With FAST=NO it failed as well: ValueError: there is no option FAST\. This is a bug"),
    ],
)
def test_a_crash_that_no_remedy_avoids_says_what_was_tried(
    fragile: Target, bundle_copy: Path, fault: str, message: str
) -> None:
    with pytest.raises(BuildError, match=rf"while opening it\. With SAFE=YES .*{message}"):
        built(bundle_copy, fragile, fault)


def test_what_a_builder_raises_reaches_the_caller_as_it_was(fragile: Target, bundle_copy: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"^there is no such operator$"):
        built(bundle_copy, fragile, "lacks")
    with pytest.raises(BuildError, match=r"it does not build\nThe builder's log: .*a\.log$") as caught:
        built(bundle_copy, fragile, "says-no")
    assert caught.value.log == bundle_copy / "a.log"
    with pytest.raises(
        BuildError, match=r"builder of fragile failed: ValueError: a fault of the builder's own\n"
    ) as own:
        built(bundle_copy, fragile, "stumbles")
    assert any("fragile_target.py" in note for note in own.value.__notes__)


def test_an_export_that_crashes_leaves_nothing_behind(
    fragile: Target, checkpoint: Path, ready_graph: Callable[[float], None], tmp_path: Path
) -> None:
    ready_graph(1.0)
    before = names(tmp_path)
    arguments = short(checkpoint, tmp_path / "made.nsm", "-t", "fragile", "--device", "dies-building")
    refused(invoke(*arguments, "--json"), 4, "The target fragile crashed", "signal 11 (SIGSEGV)")
    assert names(tmp_path) == before


def test_every_later_opening_uses_the_recorded_options(
    fragile: Target, checkpoint: Path, ready_graph: Callable[[float], None], tmp_path: Path
) -> None:
    """A session without them would kill this process."""
    ready_graph(1.0)
    path = tmp_path / "made.nsm"
    succeeded(invoke(*short(checkpoint, path, "-t", "fragile", "--device", "dies-opening")))
    (artifact,) = Bundle(path).manifest.artifacts
    assert (artifact.parity.status, artifact.options) == ("passed", {"FAST": "NO"})
    with nsm.open(path, target="fragile") as session:
        session.reset()
    assert the_json(invoke("parity", path, "--json"))["passed"]


@pytest.mark.parametrize("options", [{"CACHE_DIR": "/"}, {"FAST": "YES"}, {"FAST": "NO", "SAFE": "YES"}])
def test_options_that_no_export_writes_are_refused(fragile: Target, bundle_copy: Path, options: dict[str, str]) -> None:
    data = json.loads((bundle_copy / MANIFEST).read_text())
    item = next(item for item in data["artifacts"] if item["target"] == "onnxruntime")
    item.update(target=fragile.name, options=options)
    (bundle_copy / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleDamagedError, match=r"compile options \{.*\}; expected \{\} or \{'SAFE': 'YES'\} or"):
        nsm.open(bundle_copy, target=fragile.name)


def test_an_interrupt_ends_the_child(fragile: Target, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def wait(self, timeout: float | None = None) -> int:
            if not children:
                children.append(self)
                while not (bundle_copy / "started").exists():
                    time.sleep(0.01)
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        built(bundle_copy, fragile, "sleeps")
    assert children[0].poll() == -9


def test_the_child_ends_with_its_parent(fragile: Target, bundle_copy: Path) -> None:
    """However that ended: it is another process here, which is killed."""
    code = (
        "import sys\nfrom pathlib import Path\nimport fragile_target\nfrom nsm.bundle import Bundle\n"
        "from nsm.export.verify.artifact import build_target\nfrom nsm.runtimes import targets\n"
        f"row = targets.Target(**{ {**vars(fragile)}!r})\n"
        f"build_target(Path({str(bundle_copy)!r}), Bundle({str(bundle_copy)!r}).manifest.spec, row, 'sleeps')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) as parent:
        while not (bundle_copy / "started").exists():
            assert parent.poll() is None
            time.sleep(0.01)
        (child,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        parent.kill()
    for _ in range(500):
        if not Path(f"/proc/{child}").exists() or "State:\tZ" in Path(f"/proc/{child}/status").read_text():
            break
        time.sleep(0.01)
    else:
        raise AssertionError("the child goes on")


# -- a model that OpenVINO's compiler crashes on --------------------------------------------------------------------


def _crashes(graph: Path, threads: int | None) -> bool:
    config = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    config |= {} if threads is None else {"INFERENCE_NUM_THREADS": str(threads)}
    code = f"import openvino\nopenvino.Core().compile_model({str(graph)!r}, 'CPU', {config!r})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode < 0


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_model_that_crashes_openvino_is_exported_and_right(lanes: int, tmp_path: Path) -> None:
    """Against a loop of its own. Whether it crashes is seen from plain OpenVINO, whose later versions may not."""
    model, states = Attentions().eval(), [torch.zeros(1, WINDOW, WIDTH)] * LAYERS
    samples = frames(lanes, 40)
    path = tmp_path / "attentions.nsm"
    step = nsm.as_step(model, states, token_shape=samples.shape[2:])
    nsm.export_model(step, ["openvino", "onnxruntime"], path, samples=samples.numpy(), batch=lanes, golden_steps=10)
    wanted, carried = [], [torch.zeros(lanes, WINDOW, WIDTH)] * LAYERS
    with torch.no_grad():
        for t in range(samples.shape[1]):
            output, *carried = model(samples[:, t], *carried)
            wanted.append(output.numpy())
    for threads in (1, 2, None):
        with nsm.open(path, target="openvino", threads=threads) as session:
            found = session.run(samples.numpy())["outputs"]
        np.testing.assert_allclose(found, np.stack(wanted, 1), rtol=0, atol=1e-5)
    crashes = any(_crashes(path / "graphs" / "step.onnx", threads) for threads in (1, None))
    assert dict(Bundle(path).artifact("openvino").options) == ({"SNIPPETS_MODE": "DISABLE"} if crashes else {})
    assert find_target("openvino").remedies == ({"SNIPPETS_MODE": "DISABLE"},)
    assert the_json(invoke("parity", path, "--json"))["passed"]
