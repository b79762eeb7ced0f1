"""Default number of backend threads of a session."""

from __future__ import annotations

from collections.abc import Mapping

from nsm.manifest import EntryWork

# Each operation waits for the second thread, some 50 to 200 times a call. On 2 cores of a Xeon, a second thread slows a
# step of 2 MFLOP by 1.4 (ONNX Runtime) and 1.8 times (OpenVINO), and one of 34 MFLOP and 6 MB by 1.2 times. At 67 MFLOP
# and 10 MB a step gets no faster, but single tokens get a tenth faster (docs/benchmark.md, "Threads").
_SMALL_FLOPS, _SMALL_BYTES = 50e6, 7e6


def chosen_threads(asked: int | None, work: Mapping[str, EntryWork]) -> int | None:
    """Return the requested number of threads; otherwise 1 for a model with a small step.

    Args:
        asked: number that the user requested, or None.
        work: work per call of each entry, from the manifest; a missing step counts as large.

    Returns:
        The number of threads; None leaves the choice to the backend.
    """
    if asked is not None:
        return asked
    step = work.get("step")
    return 1 if step is not None and step.flops < _SMALL_FLOPS and step.nbytes < _SMALL_BYTES else None
