"""One session in several threads, a lane each: outputs and state are those of the lane alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from nsm.errors import StreamError
from nsm.runtimes.session.session import Session
from nsm.trace import Array, Arrays
from tests.runtimes.fake import assert_same, fake_session, fake_spec
from tests.runtimes.streams import DEFAULTS, PLAIN, TOP_K, Opener, lane_of, make_tokens

LANES, CALLS = 8, 25


@pytest.fixture(
    params=[
        ("fake", "ids"),
        ("fake", "ring"),
        *((target, name) for target in ("onnxruntime", "openvino") for name in (TOP_K, DEFAULTS, PLAIN)),
    ],
    ids=lambda param: f"{param[0]}: {param[1]}",
)
def wide(request: pytest.FixtureRequest) -> tuple[Session, Array]:
    """A session with a lane for each thread, and tokens [LANES, T, ...] for it."""
    target, name = request.param
    if target == "fake":
        session = fake_session(fake_spec(LANES, ring=name == "ring"))
        return session, np.random.default_rng(0).integers(0, 11, (LANES, 200))
    opener: Opener = request.getfixturevalue("opener")
    exported, session = opener(name, target, LANES)
    return session, make_tokens(exported.model, LANES, 200, 0)


def live(session: Session, tokens: Array, lane: int, between: Callable[[], object]) -> tuple[list[Arrays], Arrays]:
    """The random life of one lane: what it was given, and its state in the end."""
    random = np.random.default_rng(lane)
    given: list[Arrays] = []
    kept = session.snapshot(lane)
    for _ in range(CALLS):
        between()
        length = int(random.integers(1, 8))
        start = int(random.integers(0, tokens.shape[1] - length))
        batch = np.zeros((LANES, length, *tokens.shape[2:]), tokens.dtype)
        batch[lane] = tokens[lane, start : start + length]
        outputs = session.feed(batch, np.where(np.arange(LANES) == lane, length, 0))
        given.append({name: value[lane] for name, value in outputs.items()})  # views, held to the end
        match random.integers(8):
            case 0:
                session.reset(lane)
            case 1:
                kept = session.snapshot(lane)
            case 2:
                session.restore(kept, lane)
            case 3:
                session.fork(lane, lane)
            case 4:
                assert session.offsets[lane] >= 0
    return given, lane_of(session, lane)


def test_lanes_in_threads_are_what_they_are_alone(wide: tuple[Session, Array]) -> None:
    session, tokens = wide
    alone = []
    for lane in range(LANES):
        session.reset()
        alone.append(live(session, tokens, lane, lambda: None))
    session.reset()
    together = threading.Barrier(LANES, timeout=60)
    with ThreadPoolExecutor(LANES) as pool:
        lives = list(pool.map(lambda lane: live(session, tokens, lane, together.wait), range(LANES)))
    for (given, state), (wanted, end) in zip(lives, alone, strict=True):
        assert_same(state, end)
        for found, expected in zip(given, wanted, strict=True):
            assert_same(found, expected)
    assert np.abs(next(iter(alone[0][0][0].values()))).max() > 0


def test_whole_calls_in_threads_happen_one_after_the_other() -> None:
    """All lanes take the same tokens, so the state tells how many calls there were; none is lost."""
    session, honest = fake_session(), fake_session()
    tokens = np.ones((2, 7), np.int64)
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(lambda _: session.run(tokens)["outputs"], range(64)))
    wanted = [honest.run(tokens)["outputs"] for _ in range(64)]
    assert_same(session.read_state(), honest.read_state())
    assert session.offsets.tolist() == honest.offsets.tolist()
    assert sorted(value.tobytes() for value in given) == sorted(value.tobytes() for value in wanted)


def test_coroutines_share_a_session_through_threads() -> None:
    session, alone = fake_session(fake_spec(LANES)), fake_session(fake_spec(LANES))
    tokens = np.random.default_rng(0).integers(0, 11, (LANES, 40))

    async def client(lane: int) -> list[Array]:
        outputs = []
        for start in range(0, 40, 5):
            batch = np.zeros((LANES, 5), np.int64)
            batch[lane] = tokens[lane, start : start + 5]
            valid = np.where(np.arange(LANES) == lane, 5, 0)
            outputs.append((await asyncio.to_thread(session.feed, batch, valid))["outputs"][lane])
        return outputs

    async def serve() -> list[list[Array]]:
        return await asyncio.gather(*(client(lane) for lane in range(LANES)))

    found = np.stack([np.concatenate(outputs) for outputs in asyncio.run(serve())])
    np.testing.assert_array_equal(found, alone.run(tokens)["outputs"])
    assert_same(session.read_state(), alone.read_state())


def test_a_session_is_closed_between_the_calls_of_other_threads() -> None:
    session = fake_session()
    refused: list[str] = []
    started = threading.Barrier(5, timeout=60)

    def use() -> None:
        started.wait()
        try:
            while True:
                session.run(np.ones((2, 9), np.int64))
        except StreamError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    started.wait()
    session.close()
    for thread in threads:
        thread.join()
    assert refused == ["The session is closed. Open the bundle again."] * 4
