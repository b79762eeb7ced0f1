"""How many threads a session gives its backend, where nobody says it."""

from __future__ import annotations

from collections.abc import Mapping

from nsm.manifest import EntryWork

# A second thread has to be waited for after every operation, some 50 to 200 times a call. On 2 cores of a Xeon it makes
# a step of 2 MFLOP 1.4 (ONNX Runtime) and 1.8 times (OpenVINO) as slow, one of 34 MFLOP and 6 MB 1.2 times; one of 67
# MFLOP and 10 MB it makes no faster, but single tokens by a tenth (docs/benchmark.md, "Threads").
_SMALL_FLOPS, _SMALL_BYTES = 50e6, 7e6


def chosen_threads(asked: int | None, work: Mapping[str, EntryWork]) -> int | None:
    """Those that were asked for; else one for a model whose step is over before a second one pays.

    Args:
        asked: by the user, or None.
        work: of a call of each entry, from the manifest; a missing step counts as large.

    Returns:
        None leaves it to the backend.
    """
    if asked is not None:
        return asked
    step = work.get("step")
    return 1 if step is not None and step.flops < _SMALL_FLOPS and step.nbytes < _SMALL_BYTES else None
