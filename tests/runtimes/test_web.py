"""The pipe to Node; what runs in it is tested in tests/clients/test_web.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest

from nsm.errors import RunError, StreamError
from nsm.runtimes.web import WebRuntime
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
