"""Chromium without a window, driven over a pipe in its own protocol: pages are opened, looked at, clicked, drawn in."""

from __future__ import annotations

import base64
import functools
import http.server
import json
import os
import select
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

from nsm.trace import Array

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# What a browser in a closed network must not try, each at every start.
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_DEADLINE = 60.0  # seconds
# The browser reads from its file 3 and writes to its file 4.
_START = 'from=$1 to=$2; shift 2; exec "$@" 3<&$from 4>&$to'


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a plain file server over a folder."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class Browser:
    """A browser with one page; use it in a `with` block.

    Args:
        folder: where it keeps what it keeps.
    """

    def __init__(self, folder: Path) -> None:
        (reads, self._write), (self._read, writes) = os.pipe(), os.pipe()
        browser = [str(CHROMIUM), *_FLAGS, f"--user-data-dir={folder}", "--remote-debugging-pipe", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", _START, "bash", str(reads), str(writes), *browser],
            pass_fds=(reads, writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(reads)
        os.close(writes)
        self._received = bytearray()
        self._count = 0
        self._session: str | None = None
        targets = self._ask("Target.getTargets")["targetInfos"]
        (page,) = (target["targetId"] for target in targets if target["type"] == "page")
        self._session = self._ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def size(self, width: int, height: int, phone: bool = False) -> None:
        """Of the window, in pixels of the page."""
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def open(self, address: str) -> None:
        self._ask("Page.navigate", url=address)

    def value(self, code: str) -> Any:
        """Of an expression in the page; a promise is awaited."""
        answer = self._ask("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until an expression holds in the page."""
        end = time.monotonic() + _DEADLINE
        while not self.value(condition):
            assert time.monotonic() < end, f"{condition} did not come true; {self.value('document.body.innerText')}"
            time.sleep(0.02)

    def click(self, name: str) -> None:
        """Click on the middle of the element of that id, as a mouse does."""
        box = self.box(name)
        self.drag([(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)])

    def drag(self, points: list[tuple[float, float]]) -> None:
        """Press the mouse on the first point of the window, move it over the others, let go on the last."""
        kinds = ["mousePressed", *["mouseMoved"] * (len(points) - 1), "mouseReleased"]
        for kind, (x, y) in zip(kinds, [*points, points[-1]], strict=True):
            down = int(kind != "mouseReleased")
            self._ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=down, clickCount=1)

    def box(self, name: str) -> dict[str, float]:
        """Where the element of that id lies in the window, brought into view: x, y, width, height."""
        code = f"(e => (e.scrollIntoView(), e.getBoundingClientRect().toJSON()))(document.getElementById('{name}'))"
        found: dict[str, float] = self.value(code)
        return found

    def pixels(self, canvas: str) -> Array:
        """Of the canvas that a selector finds: [height, width, 4], red, green, blue, alpha."""
        found = self.value(
            f"""(canvas => {{
              const {{ width, height, data }} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
              return [height, width, btoa(Array.from(data, byte => String.fromCharCode(byte)).join(""))];
            }})(document.querySelector({json.dumps(canvas)}))"""
        )
        height, width, data = found
        return np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and take its answer; what else the browser says meanwhile is left out."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + _DEADLINE
        while (answer := self._next(end)).get("id") != self._count:
            pass
        assert "error" not in answer, answer["error"]
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser said nothing for a minute"
            data = os.read(self._read, 1 << 16)
            assert data, "the browser ended"
            self._received += data
        text, _, rest = bytes(self._received).partition(b"\0")
        self._received = bytearray(rest)
        message: dict[str, Any] = json.loads(text)
        return message
