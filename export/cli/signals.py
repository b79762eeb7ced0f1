"""A command that is told to end cleans up first, as it does after Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

_ENDING = ("SIGTERM", "SIGHUP")


@contextlib.contextmanager
def ending_cleanly() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block with `SystemExit`, whose code is 128 and the signal's number.

    A signal that is handled or ignored already stays so (nohup), and all do outside the main thread.
    """
    found = [getattr(signal, name) for name in _ENDING if hasattr(signal, name)]
    here = threading.current_thread() is threading.main_thread()
    taken = [item for item in found if here and signal.getsignal(item) is signal.SIG_DFL]
    for item in taken:
        signal.signal(item, _end)
    try:
        yield
    finally:
        for item in taken:
            signal.signal(item, signal.SIG_DFL)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
