"""One session over every backend. Nothing here imports torch, and a backend is imported only when it is used."""

import sys

from nsm.runtimes.budgets import BUDGETS, Budget, find_budget
from nsm.runtimes.opening import open_bundle
from nsm.runtimes.parity import compare
from nsm.runtimes.report import ParityReport
from nsm.runtimes.session import Session
from nsm.runtimes.targets import TARGETS, Target, find_target

# OpenVINO reports its imports and conversions to its makers, each from a copy of the whole process. What uses nsm tells
# nobody: where OpenVINO does not find this package it goes without. Who wants it imports OpenVINO before nsm.
if "openvino_telemetry" not in sys.modules:
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

__all__ = [
    "BUDGETS",
    "TARGETS",
    "Budget",
    "ParityReport",
    "Session",
    "Target",
    "compare",
    "find_budget",
    "find_target",
    "open_bundle",
]
