"""ONNX Runtime with device memory, where the device is the processor; on a real GPU: test_gpu.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import nsm
from nsm.bundle import Bundle
from nsm.errors import BuildError, DeviceUnavailableError, RunError, StreamError, UnsupportedError
from nsm.export.verify.another_target import add_target
from nsm.runtimes.backends import onnxruntime_cuda
from nsm.runtimes.backends.onnxruntime_cuda import PROVIDER, OnCuda
from nsm.runtimes.parity.budgets import find_budget
from nsm.runtimes.parity.comparison import compare
from nsm.runtimes.session.session import Session
from tests.runtimes.fake import assert_same, fake_spec


def files_of(bundle: Bundle) -> Mapping[str, Path]:
    return {entry.name: bundle.path / "graphs" / f"{entry.name}.onnx" for entry in bundle.manifest.spec.entries}


def device_session(bundle: Bundle) -> Session:
    manifest = bundle.manifest
    runtime = OnCuda(files_of(bundle), manifest.spec, "cpu", 1)
    return Session(runtime, manifest.spec, bundle.state_init(), manifest.fingerprint, "onnxruntime-cuda")


def ids(tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 20, (2, tokens))


def test_its_streams_are_the_models(bundle: Bundle) -> None:
    with device_session(bundle) as session:
        report = compare(bundle.trace(), session, find_budget("fp32"))
        assert session.effective_precision == "fp32"
    assert report.passed, report.verdict()


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_call_that_runs_several_times_is_one_step(
    bundle: Bundle, repeats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As calls do that capture a graph; see the class."""
    once: Callable[..., Any] = ort.InferenceSession.run_with_iobinding

    def run(self: ort.InferenceSession, *arguments: Any) -> None:
        for _ in range(repeats):
            once(self, *arguments)

    splits = (16, 1, 3, 8, 1, 30)
    with nsm.open(bundle.path, "onnxruntime", threads=1) as plain, device_session(bundle) as session:
        for seed, tokens in enumerate(splits):
            wanted = plain.run(ids(tokens, seed))["outputs"]
            with monkeypatch.context() as patch:
                patch.setattr(ort.InferenceSession, "run_with_iobinding", run)
                given = session.run(ids(tokens, seed))["outputs"]
            np.testing.assert_array_equal(given, wanted)
            assert_same(session.read_state(), plain.read_state())


def test_a_state_that_is_not_finite_is_seen(bundle: Bundle) -> None:
    runtime = OnCuda(files_of(bundle), bundle.manifest.spec, "cpu", 1)
    state = bundle.state_init()
    assert runtime.finite(runtime.load_state(state))
    name = next(item.name for item in bundle.manifest.spec.states if item.dtype == "float32")
    state[name].flat[-1] = np.nan
    assert not runtime.finite(runtime.load_state(state))


def test_a_consumed_state_and_a_closed_runtime_are_refused(bundle: Bundle) -> None:
    runtime = OnCuda(files_of(bundle), bundle.manifest.spec, "cpu", 1)
    old = runtime.load_state(bundle.state_init())
    state = runtime.load_state(bundle.state_init())
    with pytest.raises(StreamError, match="consumed"):
        runtime.read_state(old)
    runtime.close()
    for use in (runtime.read_state, runtime.finite, lambda state: runtime.call("step", {}, state)):
        with pytest.raises(StreamError, match="closed"):
            use(state)


def test_what_the_backend_raises_is_a_run_error(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error 700")

    with device_session(bundle) as session:
        monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", fail)
        with pytest.raises(RunError, match="failed while it ran step on cpu: CUDA error 700"):
            session.step(ids(8))


def test_states_that_are_appended_to_are_refused(bundle: Bundle) -> None:
    with pytest.raises(UnsupportedError, match="appended"):
        OnCuda(files_of(bundle), fake_spec(ring=True), "cpu", 1)


# -- without a GPU -----------------------------------------------------------------------------------------------------


def test_without_cuda_it_says_what_to_install(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(DeviceUnavailableError, match=r'no CUDA.*pip install "nsm-toolkit\[gpu\]"'):
        onnxruntime_cuda.load(files_of(bundle), bundle.manifest.spec, "cuda", None)


def test_it_can_be_built_where_it_cannot_be_run(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    artifact = add_target(bundle_copy, "cuda")
    assert (artifact.target, artifact.device) == ("onnxruntime-cuda", "cuda")
    assert artifact.parity.status == "not_run"
    assert "no CUDA" in str(artifact.parity.reason)
    with pytest.raises(DeviceUnavailableError):
        nsm.open(bundle_copy, "cuda")


class Opened:
    """ONNX Runtime's session, which a GPU would be needed for."""

    asked: list[list[Any]]
    refuses_to_capture: bool
    providers: list[str]

    def __init__(
        self, path: str, options: ort.SessionOptions, providers: list[Any], disabled_optimizers: list[str]
    ) -> None:
        assert not disabled_optimizers, "what is slow on a processor need not be on a GPU"
        self.asked.append(providers)
        if self.refuses_to_capture and providers[0][1].get("enable_cuda_graph"):
            raise RuntimeError("not all nodes have been partitioned to CUDA")

    def get_providers(self) -> list[str]:
        return self.providers


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> type[Opened]:
    Opened.asked, Opened.refuses_to_capture, Opened.providers = [], False, [PROVIDER, "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "InferenceSession", Opened)
    return Opened


def test_calls_are_captured_and_tf32_is_off(opened: type[Opened]) -> None:
    _, captures = onnxruntime_cuda._session(Path("step.onnx"), "cuda", None)
    assert captures
    ((name, options),) = opened.asked[0]
    assert (name, options["use_tf32"], options["enable_cuda_graph"]) == (PROVIDER, "0", "1")


def test_a_graph_that_cannot_be_captured_runs_without(opened: type[Opened]) -> None:
    opened.refuses_to_capture = True
    _, captures = onnxruntime_cuda._session(Path("step.onnx"), "cuda", None)
    assert not captures
    (name, options), fallback = opened.asked[-1]
    assert (name, options["use_tf32"], fallback) == (PROVIDER, "0", "CPUExecutionProvider")
    assert "enable_cuda_graph" not in options


@pytest.mark.parametrize("refuses_to_capture", [False, True])
def test_a_session_that_fell_back_to_the_processor_is_no_gpu(opened: type[Opened], refuses_to_capture: bool) -> None:
    opened.refuses_to_capture, opened.providers = refuses_to_capture, ["CPUExecutionProvider"]
    with pytest.raises(DeviceUnavailableError, match="could not start CUDA"):
        onnxruntime_cuda._session(Path("step.onnx"), "cuda", None)


def test_a_damaged_graph_is_named(tmp_path: Path) -> None:
    (tmp_path / "step.onnx").write_bytes(b"nothing")
    with pytest.raises(BuildError, match=r"cannot open .*step\.onnx"):
        onnxruntime_cuda._session(tmp_path / "step.onnx", "cpu", None)
