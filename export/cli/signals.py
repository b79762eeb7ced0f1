"""SIGTERM and SIGHUP end a command as Ctrl-C does: it cleans up first."""

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
    """Raise `SystemExit` in the block on SIGTERM and SIGHUP, with 128 plus the signal's number as exit code.

    The block leaves a signal alone that is already handled or ignored (nohup). Outside the main thread it changes
    nothing.
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
