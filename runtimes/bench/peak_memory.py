"""Peak memory of one artifact, measured in a separate process that opens nothing else.

python -m nsm.runtimes.bench.peak_memory BUNDLE TARGET PRECISION [THREADS]

A process with several sessions has one common peak, which does not tell the sessions apart.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from nsm.bundle import Bundle
from nsm.errors import RunError
from nsm.runtimes.bench.rounds import Calls
from nsm.runtimes.opening import open_artifact

_STEPS = 10


def fresh_peak_mb(bundle: Path, target: str, precision: str, threads: int | None = None) -> float:
    """Peak resident memory, in MB (10^6 bytes), of a new process that opens an artifact and runs a few calls.

    Python, numpy and the backend's libraries are part of it. The bundle's files have been verified by the caller.

    Args:
        bundle: its directory.
        target, precision: of the artifact.
        threads: of the backend (default: its own choice).

    Raises:
        RunError: the process failed; holds the last line it wrote.
    """
    # -P: modules in the current folder are not imported by accident.
    command = [sys.executable, "-P", "-m", "nsm.runtimes.bench.peak_memory", str(bundle), target, precision]
    if threads is not None:
        command.append(str(threads))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "it wrote nothing").splitlines()[-1]
        raise RunError(
            f"The process that measures the memory of {target} in {bundle} ended with {done.returncode}: {last}"
        )
    return float(json.loads(done.stdout)["peak_rss_mb"])


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MB (10^6 bytes)."""
    # Not getrusage: on Linux its maximum begins with that of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


def main(arguments: list[str]) -> None:
    """Open BUNDLE for TARGET in PRECISION with THREADS, run a few calls of every entry, and print the peak as JSON."""
    path, target, precision, *threads = arguments
    bundle = Bundle(path)
    with open_artifact(
        bundle, bundle.artifact(target, precision), threads=int(threads[0]) if threads else None
    ) as session:
        inputs = {entry.name: entry.inputs[0] for entry in session.spec.entries if entry.inputs}
        tokens = {name: np.zeros(item.shape, item.numpy_dtype) for name, item in inputs.items()}
        step = Calls(session, session.step, session.spec.entry("step").tokens)
        for _ in range(_STEPS):
            step(tokens["step"])
        if "decode" in tokens:
            session.reset()
            decode = Calls(session, session.decode, 1)
            for _ in range(session.spec.chunk_size):
                decode(tokens["decode"])
    print(json.dumps({"peak_rss_mb": peak_rss_mb()}))


if __name__ == "__main__":
    main(sys.argv[1:])
