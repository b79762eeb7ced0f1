from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import nsm
from nsm.errors import UnsupportedError
from nsm.runtimes.backends.buffered import BoundGraph, BufferedRuntime
from nsm.runtimes.bench import session_overhead as module
from nsm.runtimes.bench.session_overhead import overhead
from nsm.runtimes.session.session import Session
from nsm.trace import Array, Arrays
from tests.runtimes.buffered import buffered_session
from tests.runtimes.fake import fake_session, fake_spec


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CALLS", 4)


def tokens_of(session: Session) -> Array:
    spec = session.spec.entry("step").inputs[0]
    return np.zeros((3, *spec.shape), np.int64)


@pytest.mark.usefixtures("few")
def test_the_difference_is_what_the_session_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    session, graphs = buffered_session(fake_spec())
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    real: Callable[..., object] = session.step

    def slower(tokens: Array) -> object:
        clock[0] += 12e-6
        return real(tokens)

    bind = graphs["step"].bind

    def taking(read: Arrays, written: Arrays) -> BoundGraph:
        run, point, _ = bind(read, written)

        def timed() -> object:
            clock[0] += 100e-6
            return run()

        def documented() -> object:
            clock[0] += 3e-6
            return timed()

        return BoundGraph(timed, point, documented)

    monkeypatch.setattr(graphs["step"], "bind", taking)
    monkeypatch.setattr(session, "step", slower)
    seen: list[tuple[int, int]] = []
    found = overhead(session, session.runtime, tokens_of(session), 6, lambda done, total: seen.append((done, total)))
    assert found.step_us == pytest.approx(112)
    assert found.bare_us == pytest.approx(103), "by the call that users know"
    assert (found.median, found.low, found.high) == pytest.approx((9, 9, 9))
    assert seen == [(done, 6) for done in range(1, 7)]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_the_bare_call_is_the_stream_itself_and_the_session_is_of_use_afterwards(target: str, exported: Path) -> None:
    with nsm.open(exported, target) as session:
        tokens = np.ones(session.spec.entry("step").inputs[0].shape, np.int64)
        wanted = [session.step(tokens)["outputs"] for _ in range(4)]
        session.reset()
        session.step(tokens)
        runtime = session.runtime
        assert isinstance(runtime, BufferedRuntime)
        bare = runtime.bare("step")
        for _ in range(2):
            bare()
        np.testing.assert_array_equal(session.step(tokens)["outputs"], wanted[3])
        found = overhead(session, runtime, tokens_of(session), 3)
        assert found.step_us > 0
        assert found.bare_us > 10
        session.reset()
        np.testing.assert_array_equal(session.step(tokens)["outputs"], wanted[0])


def test_a_runtime_on_a_device_is_refused() -> None:
    session = fake_session(fake_spec())
    with pytest.raises(UnsupportedError, match="backends that work on the host's memory"):
        overhead(session, session.runtime, tokens_of(session))
