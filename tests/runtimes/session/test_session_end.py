"""The end of a session: closing it, errors on the way, and what cannot be copied."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nsm.errors import NotCopyableError, NsmError, RunError, StreamError
from nsm.runtimes.session.session import Session
from tests.runtimes.fake import CHUNK, FakeRuntime, assert_same, fake_initial, fake_session, fake_spec
from tests.runtimes.sessions import ids

# Every method, with arguments that would be refused for another reason too.
CALLS: dict[str, Callable[[Session], object]] = {
    "step": lambda session: session.step([[0] * 3] * 2),
    "decode": lambda session: session.decode("a"),
    "feed": lambda session: session.feed("a", [9]),
    "run": lambda session: session.run([]),
    "reset": lambda session: session.reset(),
    "reset of a lane": lambda session: session.reset(7),
    "snapshot": lambda session: session.snapshot(),
    "snapshot of a lane": lambda session: session.snapshot(7),
    "restore": lambda session: session.restore(b"no snapshot"),
    "fork": lambda session: session.fork(7, 8),
    "read_state": lambda session: session.read_state(),
    "load_state": lambda session: session.load_state({"unknown": 1}),
    "is_fresh": lambda session: session.is_fresh(),
    "offsets": lambda session: session.offsets,
    "tokens_left": lambda session: session.tokens_left,
    "with": lambda session: session.__enter__(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_method_of_a_closed_session_says_first_that_it_is_closed(
    call: Callable[[Session], object], session: Session
) -> None:
    session.close()
    session.close()
    with pytest.raises(StreamError, match=r"^The session is closed\. Open the bundle again\.$"):
        call(session)
    assert session.batch == 2


def test_no_method_was_left_out() -> None:
    public = {name for name in vars(Session) if not name.startswith("_")}
    assert public - {"batch", "runtime", "close"} == {name.split()[0] for name in CALLS} - {"with"}


class FailsToClose(FakeRuntime):
    """A runtime that fails when it is closed the first time."""

    closings = 0

    def close(self) -> None:
        super().close()
        self.closings += 1
        if self.closings == 1:
            raise RunError("CUDA failed: cudaErrorUnknown.")


def failing() -> tuple[Session, FailsToClose]:
    spec = fake_spec()
    runtime = FailsToClose(spec)
    return Session(runtime, spec, fake_initial(spec), "f", "fake"), runtime


def test_an_error_while_closing_does_not_hide_the_one_before() -> None:
    session, runtime = failing()
    with pytest.raises(KeyError, match="the cause") as caught, session:
        raise KeyError("the cause")
    assert caught.value.__notes__ == ["Closing the session failed as well: CUDA failed: cudaErrorUnknown."]
    assert runtime.closed


def test_an_error_while_closing_is_raised_where_there_was_none_and_the_session_is_closed() -> None:
    session, runtime = failing()
    with pytest.raises(RunError, match="cudaErrorUnknown"), session:
        pass
    with pytest.raises(StreamError, match="The session is closed"):
        session.step(ids(session))
    session.close()
    assert runtime.closings == 2


def test_a_session_may_be_closed_inside_its_block() -> None:
    with fake_session() as session:
        session.close()


COPIES: dict[str, Callable[[Any], object]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "in a list": lambda item: copy.deepcopy([item]),
}


@pytest.mark.parametrize("made", COPIES.values(), ids=COPIES)
def test_a_session_is_not_copied_and_goes_on(made: Callable[[Any], object], session: Session) -> None:
    tokens = ids(session, 2)
    session.step(tokens[0])
    before = session.read_state()
    with pytest.raises(NotCopyableError, match=r"A Session can be neither copied .*fork\(lane, into\).*snapshot\(\)"):
        made(session)
    assert_same(session.read_state(), before)
    session.step(tokens[1])


def test_runtimes_and_their_states_are_not_copied(session: Session) -> None:
    assert session._standing.at is not None
    for item in (session._standing.at[0], session.runtime):
        if isinstance(item, FakeRuntime):
            continue
        for made in COPIES.values():
            with pytest.raises(TypeError, match=f"A {type(item).__name__} can be neither copied nor pickled"):
                made(item)
    assert issubclass(NotCopyableError, NsmError)
    session.step(np.zeros((2, session.spec.chunk_size), int), [CHUNK, 0])
