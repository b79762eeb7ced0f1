"""The session: B streams on one runtime, its inputs and outputs, its snapshots."""

from nsm.runtimes.session.bad_lanes import usable_tokens
from nsm.runtimes.session.inputs import as_array
from nsm.runtimes.session.session import Session

__all__ = [
    "Session",
    "as_array",
    "usable_tokens",
]
