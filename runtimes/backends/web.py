"""ONNX Runtime Web in Node: the same JavaScript and WebAssembly as in a browser, driven over a pipe."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np

from nsm.errors import BundleDamagedError, DeviceUnavailableError, RunError, StreamError
from nsm.files import sha256
from nsm.runtimes.base import CheckedRuntime, Handles, Runtime, State
from nsm.spec import StepSpec
from nsm.trace import Array, Arrays

CLIENT = "web"
"""Bundle folder of the client."""

ORT: Mapping[str, str] = {
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
"""The files of onnxruntime-web 1.30.0 that a bundle holds, with their SHA-256."""

_MAX_HEADER = 16 * 2**20

_LAST_WORDS, _QUOTED = 2**16, 500
"""Bytes of Node's last output to read when it ends, and characters of it to quote."""


def load(
    files: Mapping[str, Path],
    spec: StepSpec,
    device: str,  # noqa: ARG001
    threads: int | None,  # noqa: ARG001
    precision: str = "fp32",
) -> Runtime:
    """Start Node on the client in a bundle. WebAssembly always runs on one thread.

    Args:
        files: the `.onnx` file of each entry, in the folder `graphs` of the bundle.
        spec: spec of the model.
        device: "wasm", the only device of this target.
        threads: ignored.
        precision: precision of the artifact.

    Raises:
        DeviceUnavailableError: Node is not installed.
        BundleDamagedError: the client in the bundle is not that of this version, and is not run.
    """
    node = shutil.which("node")
    if node is None:
        raise DeviceUnavailableError(
            "Checking the web artifact needs Node.js, and the command node was not found. Browsers do not need it. "
            "Install Node.js 20 or later."
        )
    folder = next(iter(files.values())).parent.parent
    _check_client(folder / CLIENT)
    return WebRuntime([node, str(folder / CLIENT / "node.js"), str(folder)], spec, precision)


def _check_client(folder: Path) -> None:
    """Raise `BundleDamagedError` unless all code in the bundle is that of this version.

    The hashes in the manifest do not prove this, because an attacker can change them with the files. Opening a bundle
    must never run code that came with it.
    """
    wanted = {name: item.read_bytes() for name, item in client_files().items() if name.endswith(".js")}
    other = [name for name, data in wanted.items() if not _holds(folder / name, data)]
    other += [f"ort/{name}" for name, digest in ORT.items() if not _has_hash(folder / "ort" / name, digest)]
    if other:
        raise BundleDamagedError(
            f"{folder}: {', '.join(other)} differ from the files of this nsm version, and nsm does not run code from a "
            "bundle. If you trust its graphs, build it again: nsm build BUNDLE --target web --force"
        )


def client_files() -> dict[str, Traversable]:
    """Return the installed files of the page and the client, by name."""
    found = resources.files("nsm.export.builders.web_client").iterdir()
    return {item.name: item for item in found if item.name.endswith((".js", ".html"))}


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def _has_hash(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest


class WebRuntime(CheckedRuntime):
    """A runtime in another process.

    Args:
        command: command that starts Node.
        spec: spec of the model.
        effective_precision: precision of the graphs.
    """

    def __init__(self, command: list[str], spec: StepSpec, effective_precision: str) -> None:
        self.effective_precision = effective_precision
        self._spec = spec
        super().__init__(Handles())
        self._finite = True
        self._cut_off = False
        # stderr goes into a file: an unread pipe fills up and then blocks Node for ever.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said
        )

    def load_state(self, arrays: Mapping[str, Array]) -> State:
        dtypes = {state.name: state.numpy_dtype for state in self._spec.states}
        given = {name: np.asarray(arrays[name], dtype) for name, dtype in dtypes.items()}
        self._check_open()
        self._handles.consume()
        self._ask({"op": "load"}, given)
        return self._handles.new()

    def call(self, entry: str, inputs: Mapping[str, Array], state: State) -> tuple[Arrays, State]:
        self._check(state)
        self._handles.consume()
        try:
            outputs = self._ask({"op": "call", "entry": entry}, inputs)
        except RunError:  # the state in Node is unchanged
            self._handles.give_back(state)
            raise
        return outputs, self._handles.new()

    def read_state(self, state: State) -> Arrays:
        self._check(state)
        finite = self._finite
        arrays = self._ask({"op": "read"}, {})
        self._finite = finite
        return arrays

    def finite(self, state: State) -> bool:
        self._check(state)
        return self._finite

    def close(self) -> None:
        self._open = False
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # unsent data is flushed on close
                        pipe.close()
            self._said.close()

    def __del__(self) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._cut_off:
            raise StreamError(
                "The session is closed: a call was interrupted before its reply was complete. Open the bundle again."
            )
        super()._check_open()

    def _ask(self, head: dict[str, Any], arrays: Mapping[str, Array]) -> Arrays:
        """Send a frame and return the reply; node.js describes the protocol."""
        self._check_open()
        whole = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
        listed = [
            {"name": name, "dtype": str(value.dtype), "shape": list(value.shape), "bytes": value.nbytes}
            for name, value in whole.items()
        ]
        text = json.dumps({**head, "arrays": listed}).encode()
        frame = struct.pack("<I", len(text)) + text + b"".join(value.tobytes() for value in whole.values())
        try:
            said, found = self._exchange(frame)
        except BaseException:  # also Ctrl-C: the next call would read the rest of this reply
            self._cut_off = True
            self.close()
            raise
        if not said["ok"]:
            raise RunError(f"ONNX Runtime Web failed: {said['error']}")
        self._finite = said["finite"]
        return found

    def _exchange(self, frame: bytes) -> tuple[dict[str, Any], Arrays]:
        """Return the head and the arrays of the reply to a frame. After an error the pipe is unusable."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(frame)
            self._process.stdin.flush()
            (length,) = struct.unpack("<I", self._read(4))
            if length > _MAX_HEADER:
                raise EOFError
            head = json.loads(self._read(length))
            return head, {
                item["name"]: np.frombuffer(self._read(item["bytes"]), item["dtype"]).reshape(item["shape"]).copy()
                for item in head["arrays"]
            }
        except (OSError, EOFError) as error:
            raise RunError(f"Node ended while it ran the bundle: {self._last_words()}") from error

    def _read(self, count: int) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        data = self._process.stdout.read(count)
        if len(data) < count:
            raise EOFError
        return data

    def _last_words(self) -> str:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - _LAST_WORDS))
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        errors = [line for line in lines if "Error" in line]
        return (errors or lines or ["it said nothing"])[0][:_QUOTED]
