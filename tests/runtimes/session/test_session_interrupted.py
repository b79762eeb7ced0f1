"""An exception between any two instructions of a call: the session is never silently wrong afterwards."""

from __future__ import annotations

import contextlib
import linecache
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any

import numpy as np
import pytest

from nsm.bundle import Bundle
from nsm.errors import StreamError
from nsm.runtimes.backends.buffered import BufferedRuntime
from nsm.runtimes.base import State
from nsm.runtimes.opening.artifacts import open_bundle
from nsm.runtimes.session.session import Session
from nsm.spec import OFFSET, StepSpec
from nsm.trace import Array, Arrays
from tests.runtimes.buffered import Graph
from tests.runtimes.fake import CHUNK, FINGERPRINT, assert_same, fake_initial, fake_session, fake_spec

# Two calls of step, then single tokens over the end of a chunk: step, decode and commit.
LENGTHS = (CHUNK + 2, 3)


# Where a session and its runtime hold the state.
HOLDERS = ("session.py", "standing.py", "place.py", "base.py", "buffered.py", "fake.py")


class Interrupter:
    """Raises `KeyboardInterrupt` before the n-th instruction of what holds the state.

    Not on the lines of a `with` statement: there the interpreter takes a lock and releases it, and looks for signals
    before and afterwards only.
    """

    def __init__(self, at: int | None) -> None:
        self.at, self.seen = at, 0

    def __enter__(self) -> Interrupter:
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename.rsplit("/", 1)[-1]
        if name not in HOLDERS or frame.f_code.co_name in ("fake_run", "_commit", "_zeros"):
            return None
        frame.f_trace_opcodes = True
        return self._traced

    def _traced(self, frame: FrameType, event: str, argument: Any) -> Any:
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno or 0).strip()
        if event == "opcode" and not line.startswith("with "):
            if self.seen == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
            self.seen += 1
        return self._traced


def buffered(ring: bool) -> Session:
    spec: StepSpec = fake_spec(ring=ring)
    entries = {entry.name: Graph(spec, entry.name).open for entry in spec.entries}
    return Session(BufferedRuntime(spec, entries, "fp32"), spec, fake_initial(spec), FINGERPRINT, "fake")


# Every how many instructions an exception comes; all of them take minutes.
SESSIONS: dict[str, tuple[Callable[[], Session], int]] = {
    "fake": (fake_session, 13),
    "buffered": (lambda: buffered(ring=False), 53),
    "buffered, ring": (lambda: buffered(ring=True), 53),
}


def pieces() -> Iterator[Array]:
    random = np.random.default_rng(0)
    return (random.integers(0, 11, (2, length)) for length in LENGTHS)


def history(session: Session, sequences: Iterable[Array]) -> list[Arrays]:
    """The states that a stream without an interrupt passes through, call by call."""
    states: list[Arrays] = []
    advance = session._standing.advance

    def noted(*given: Any) -> Any:
        states.append(session.read_state())
        return advance(*given)

    session._standing.advance = noted  # type: ignore[method-assign,assignment]
    for sequence in sequences:
        session.feed(sequence)
    session._standing.advance = advance  # type: ignore[method-assign]
    return [*states, session.read_state()]


def check_one_of(session: Session, states: Iterable[Arrays]) -> None:
    """The state is, bit by bit, one of these, and the session knows where its lanes are."""
    state = session.read_state()
    assert session.offsets.tolist() == state[OFFSET].tolist()
    assert any(all(np.array_equal(state[name], value) for name, value in held.items()) for held in states)


def is_known(session: Session) -> bool:
    try:
        session.read_state()
    except StreamError:
        return False
    return True


def check_afterwards(session: Session, states: list[Arrays], wanted: Arrays, tokens: Array) -> bool:
    """Whether the state is one of a stream, and the session knows where it stands; or else it says that there is none.

    Either way it can be used from another thread, and streams that start afresh are right.
    """
    known = is_known(session)
    if known:
        check_one_of(session, states)
    else:
        for call in (lambda: session.feed(tokens), session.snapshot, lambda: session.reset(0)):
            with pytest.raises(StreamError, match=r"interrupted while it replaced .*all lanes with reset"):
                call()

    def start_afresh() -> None:
        session.reset()
        assert_same(session.feed(tokens), wanted)

    thread = threading.Thread(target=start_afresh, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "the lock is held"
    return known


@pytest.mark.parametrize(("make", "stride"), SESSIONS.values(), ids=SESSIONS)
def test_state_and_offsets_change_together_wherever_an_exception_comes(
    make: Callable[[], Session], stride: int
) -> None:
    interrupt_each(make, stride)


@pytest.mark.slow
@pytest.mark.parametrize("make", [make for make, _ in SESSIONS.values()], ids=SESSIONS)
def test_every_single_instruction_may_be_the_last(make: Callable[[], Session]) -> None:
    interrupt_each(make, 1)


def interrupt_each(make: Callable[[], Session], stride: int) -> None:
    """Interrupt a session before every instruction, or every `stride`-th, and look at what is left."""
    states = history(make(), pieces())
    tokens = np.concatenate(list(pieces()), 1)
    wanted = make().feed(tokens)
    session = make()
    with Interrupter(None) as counted:
        used(session)
    outcomes: list[bool] = []
    for at in range(0, counted.seen, stride):
        session = make()
        with pytest.raises(KeyboardInterrupt), Interrupter(at):
            used(session)
        outcomes.append(check_afterwards(session, states, wanted, tokens))
    assert set(outcomes) == {True, False}, "both happen"


def used(session: Session) -> None:
    for piece in pieces():
        session.feed(piece)


def interrupted(session: Session, tokens: Array, after: float) -> bool:
    """Feed, with a `KeyboardInterrupt` after so many seconds. Whether it came in time."""
    armed = True

    def interrupt(number: int, frame: object) -> None:
        if armed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, after)
        session.feed(tokens)
        armed = False
    except KeyboardInterrupt:
        return True
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    return False


def test_signals_leave_a_session_right_or_say_that_it_is_not(bundle: Bundle, target: str) -> None:
    """Real ones, at random times: what Ctrl-C does, and a time limit."""
    random = np.random.default_rng(0)
    with open_bundle(bundle, target, threads=1) as session:
        # Single tokens, commits and whole chunks: the lanes begin inside a chunk.
        tokens = random.integers(0, 20, (2, 3 * session.spec.chunk_size))
        session.feed(tokens[:, :3])
        begin = session.snapshot()
        states = history(session, [tokens])
        session.restore(begin)
        began = time.perf_counter()
        wanted = session.feed(tokens)
        took = time.perf_counter() - began
        cut_short = known = 0
        for _ in range(150):
            session.restore(begin)
            cut_short += interrupted(session, tokens, float(random.uniform(1e-5, took)))
            if is_known(session):
                check_one_of(session, states)
                known += 1
        session.restore(begin)
        assert_same(session.feed(tokens), wanted)
        assert cut_short > 20
        assert known > 20


def test_a_signal_handler_may_look_at_the_session_that_it_interrupts() -> None:
    """The handler runs in the thread that has the lock: it finds the state of before or of after the call."""
    session, alone = fake_session(), fake_session()
    tokens = np.random.default_rng(0).integers(0, 11, (2, 40))
    seen: list[tuple[int, Arrays]] = []

    def look(number: int, frame: object) -> None:
        with contextlib.suppress(StreamError):  # right while the state is replaced
            seen.append((int(session.offsets[0]), session.read_state()))

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 2e-4, 2e-4)
    try:
        outputs = [session.decode(tokens[:, [index]])["outputs"] for index in range(40)]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    np.testing.assert_array_equal(
        np.concatenate(outputs, 1),
        np.concatenate([alone.decode(tokens[:, [index]])["outputs"] for index in range(40)], 1),
    )
    assert seen
    assert all(offset == state[OFFSET][0] for offset, state in seen)


def test_a_signal_handler_that_goes_on_with_the_stream_ends_the_call_that_it_interrupts() -> None:
    """Of two calls on one state, one happens, and the other says so."""
    session, honest = fake_session(), fake_session()
    tokens = np.ones((2, CHUNK), np.int64)
    call = session.runtime.call

    def nested(entry: str, inputs: Mapping[str, Array], state: State) -> tuple[Arrays, State]:
        session.runtime.call = call  # type: ignore[method-assign]
        session.step(tokens)
        return call(entry, inputs, state)

    session.runtime.call = nested  # type: ignore[method-assign]
    with pytest.raises(StreamError, match="was interrupted while it replaced the state"):
        session.step(tokens)
    honest.step(tokens)
    assert_same(session.read_state(), honest.read_state())
    assert_same(session.step(tokens), honest.step(tokens))
