"""The pipe to Node; what runs in it is tested in tests/clients/test_web.py."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from nsm.errors import RunError, StreamError
from nsm.runtimes.backends.web import WebRuntime
from nsm.trace import Array, Arrays
from tests.runtimes.fake import fake_initial, fake_spec
from tests.runtimes.sessions import with_a_deadline

# Takes frames and answers each with nothing, as node.js does after a load.
ANSWERS = """
import json, struct, sys
answer = json.dumps({"ok": True, "finite": True, "arrays": []}).encode()
while length := sys.stdin.buffer.read(4):
    head = json.loads(sys.stdin.buffer.read(struct.unpack("<I", length)[0]))
    sys.stdin.buffer.read(sum(item["bytes"] for item in head["arrays"]))
    %s
    sys.stdout.buffer.write(struct.pack("<I", len(answer)) + answer)
    sys.stdout.buffer.flush()
"""

# Answers frame n with the number n. At the second frame it is interrupted, early or late, whom it answers.
COUNTS = """
import json, os, signal, struct, sys, time

def interrupt(place):
    if count == 2 and place == %r:
        os.kill(os.getppid(), signal.SIGUSR1)
        time.sleep(0.2)

count = 0
while length := sys.stdin.buffer.read(4):
    count += 1
    head = json.loads(sys.stdin.buffer.read(struct.unpack("<I", length)[0]))
    interrupt("while the frame is written")
    sys.stdin.buffer.read(sum(item["bytes"] for item in head["arrays"]))
    interrupt("before the answer")
    item = {"name": "outputs", "dtype": "int64", "shape": [1], "bytes": 8}
    answer = json.dumps({"ok": True, "finite": True, "arrays": [item]}).encode()
    answer = struct.pack("<I", len(answer)) + answer + struct.pack("<q", count)
    parts = {"inside the head": answer[:20], "inside the arrays": answer[20:-3], "after the answer": answer[-3:]}
    for place, part in parts.items():
        sys.stdout.buffer.write(part)
        sys.stdout.buffer.flush()
        interrupt(place)
"""

Start = Callable[[str], WebRuntime]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts Python in place of Node, and ends it."""
    started: list[WebRuntime] = []

    def start(code: str) -> WebRuntime:
        started.append(WebRuntime([sys.executable, "-c", code], fake_spec(), "fp32"))
        return started[-1]

    yield start
    for runtime in started:
        runtime.close()


def load(runtime: WebRuntime) -> None:
    """Put a state there; fails where no answer comes."""

    def put(bank: Array) -> Arrays:
        return runtime.read_state(runtime.load_state({**fake_initial(fake_spec()), "0.bank": bank}))

    with_a_deadline(put, fake_initial(fake_spec())["0.bank"])


def test_a_process_that_complains_a_lot_goes_on(start: Start) -> None:
    """More than a pipe holds."""
    load(start(ANSWERS % "sys.stderr.write('a warning\\n' * 100_000)"))


@pytest.mark.parametrize(
    ("said", "quoted"),
    [
        ("'a warning\\n' * 100_000 + 'Error: spoiled\\n  at x\\n'", "Error: spoiled"),
        ("'Error: ' + 'x' * 100_000", "x" * 500),
        ("'spoiled'", "spoiled"),
        ("''", "it said nothing"),
    ],
    ids=["a lot", "a long line", "no error", "nothing"],
)
def test_the_last_words_of_a_process_are_quoted_in_short(start: Start, said: str, quoted: str) -> None:
    runtime = start(ANSWERS % f"sys.stderr.write({said}); sys.exit(1)")
    with pytest.raises(RunError, match="Node ended while it ran the bundle") as caught:
        load(runtime)
    assert str(caught.value).endswith(quoted)
    assert len(str(caught.value)) < 600
    runtime.close()
    with pytest.raises(StreamError, match="The session is closed"):
        load(runtime)


@pytest.mark.parametrize(
    "place", ["while the frame is written", "before the answer", "inside the head", "inside the arrays"]
)
def test_a_call_that_is_interrupted_ends_the_session(start: Start, place: str) -> None:
    """What is left of its answer must not be taken for the answer to the next call."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    runtime = start(COUNTS % place)
    process = runtime._process
    assert process is not None
    state = runtime.load_state(fake_initial(fake_spec()))
    tokens = np.zeros((2, 100_000), np.int64)  # more than a pipe holds
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            runtime.call("step", {"tokens": tokens}, state)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert process.poll() is not None
    calls: list[Callable[[], object]] = [
        lambda: runtime.call("step", {"tokens": tokens}, state),
        lambda: runtime.load_state(fake_initial(fake_spec())),
        lambda: runtime.read_state(state),
        lambda: runtime.finite(state),
    ]
    for call in calls:
        with pytest.raises(StreamError, match=r"The session is closed: a call was interrupted.*Open the bundle again"):
            call()
    runtime.close()


def test_an_error_in_an_answer_leaves_the_session_open(start: Start) -> None:
    """Its answer is whole, and the next one is that of the next call."""
    said = "{'ok': head['op'] != 'call', 'error': 'spoiled', 'finite': True, 'arrays': []}"
    runtime = start(ANSWERS % f"answer = json.dumps({said}).encode()")
    state = runtime.load_state(fake_initial(fake_spec()))
    with pytest.raises(RunError, match="ONNX Runtime Web failed: spoiled"):
        runtime.call("step", {}, state)
    assert runtime.read_state(state) == {}


def test_a_session_whose_process_ended_is_closed(start: Start) -> None:
    runtime = start(ANSWERS % "sys.exit(1)")
    with pytest.raises(RunError, match="Node ended while it ran the bundle"):
        load(runtime)
    with pytest.raises(StreamError, match=r"The session is closed.*Open the bundle again"):
        load(runtime)
