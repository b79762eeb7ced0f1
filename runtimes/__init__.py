"""Sessions: one `Session` over every backend.

Nothing here imports torch. A backend is imported when a session on it is opened. `backends` wraps the backends,
`parity` compares a session with a golden trace, `bench` measures it, `generate` samples and scores with it.
"""

import sys

from nsm.runtimes.base import CheckedRuntime, Handles, NotCopyable, Progress, Runtime, State, all_finite
from nsm.runtimes.opening import open_bundle
from nsm.runtimes.parity import BUDGETS, Budget, ParityReport, compare, find_budget
from nsm.runtimes.session import Session
from nsm.runtimes.targets import TARGETS, Target, find_target

# OpenVINO's telemetry reports imports and conversions, each from a fork of the whole process. nsm turns it off by
# hiding the telemetry package, without which OpenVINO sends nothing. To keep it on, import OpenVINO before nsm.
if "openvino_telemetry" not in sys.modules:
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

__all__ = [
    "BUDGETS",
    "TARGETS",
    "Budget",
    "CheckedRuntime",
    "Handles",
    "NotCopyable",
    "ParityReport",
    "Progress",
    "Runtime",
    "Session",
    "State",
    "Target",
    "all_finite",
    "compare",
    "find_budget",
    "find_target",
    "open_bundle",
]
