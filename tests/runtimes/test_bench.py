from __future__ import annotations

import time

import numpy as np
import pytest

from nsm.errors import InputError
from nsm.runtimes.bench import BLOCK, bench, peak_rss_mb
from nsm.runtimes.session import Session
from nsm.trace import Array, Arrays
from tests.runtimes.fake import CHUNK, FINGERPRINT, VOCABULARY, FakeRuntime, fake_initial, fake_session, fake_spec

TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (3, 2, CHUNK))


def logging_session(name: str, log: list[str]) -> Session:
    def after(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
        log.append(name)

    spec = fake_spec()
    return Session(FakeRuntime(spec, after), spec, fake_initial(spec), FINGERPRINT, name)


def test_numbers_are_positive_and_in_order() -> None:
    (latency,) = bench([fake_session()], 20, TOKENS)
    assert 0 < latency.p50_us <= latency.p99_us
    assert latency.tokens_per_second == pytest.approx(2 * CHUNK / latency.p50_us * 1e6)


def test_sessions_take_turns_in_blocks_after_a_warm_up_each() -> None:
    log: list[str] = []
    progress: list[tuple[int, int]] = []
    steps = 2 * BLOCK + 7
    sessions = [logging_session("a", log), logging_session("b", log)]
    assert len(bench(sessions, steps, TOKENS, lambda done, total: progress.append((done, total)))) == 2
    turns = [("a", BLOCK), ("b", BLOCK)] * 3 + [("a", 7), ("b", 7)]
    assert log == [name for name, count in turns for _ in range(count)]
    assert progress == [(1, 3), (2, 3), (3, 3)]


def test_times_are_those_of_the_calls_and_in_the_order_of_the_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def sleeper(seconds: float) -> Session:
        def after(calls: int, outputs: Arrays, state: Arrays, before: Arrays) -> None:
            nonlocal now
            now += seconds

        return fake_session(after=after)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    fast, slow = bench([sleeper(1e-3), sleeper(4e-3)], 60, TOKENS)
    assert [fast.p50_us, fast.p99_us] == pytest.approx([1000, 1000])
    assert [slow.p50_us, slow.p99_us] == pytest.approx([4000, 4000])
    assert fast.tokens_per_second == pytest.approx(2 * CHUNK / 1e-3)


def test_real_inputs_are_taken_round_and_round() -> None:
    session = fake_session()
    seen: list[Array] = []
    step = session.step

    def spy(tokens: Array) -> Arrays:
        seen.append(tokens)
        return step(tokens)

    session.step = spy  # type: ignore[method-assign, assignment]
    bench([session], 10, TOKENS)
    for index, tokens in enumerate(seen[:10]):
        np.testing.assert_array_equal(tokens, TOKENS[index % 3])


def test_a_stream_inside_a_chunk_is_started_afresh() -> None:
    session = fake_session()
    session.step(TOKENS[0], [1, 1])
    (latency,) = bench([session], 10, TOKENS)
    assert latency.p50_us > 0


@pytest.mark.parametrize("steps", [9, 0, -1])
def test_too_few_steps_are_refused(steps: int) -> None:
    with pytest.raises(InputError, match=f"at least 10 steps; given {steps}"):
        bench([fake_session()], steps, TOKENS)


def test_peak_memory_is_that_of_this_process_in_megabytes() -> None:
    with open("/proc/self/status", encoding="ascii") as file:
        kibibytes = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    assert peak_rss_mb() == pytest.approx(kibibytes * 1024 / 1e6, rel=0.1)


def test_a_benchmark_without_inputs_is_refused() -> None:
    with pytest.raises(InputError, match="needs inputs for at least one step"):
        bench([fake_session()], 10, TOKENS[:0])
