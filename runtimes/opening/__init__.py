"""Opening an artifact: from a bundle on disk to a session, with its device and threads."""

from nsm.runtimes.opening.artifacts import chosen_artifact, entry_files, loader, open_artifact, open_bundle
from nsm.runtimes.opening.cpu_features import CPU_DOT, int8_dot_products
from nsm.runtimes.opening.status import refuse_failed
from nsm.runtimes.opening.threads import chosen_threads

__all__ = [
    "CPU_DOT",
    "chosen_artifact",
    "chosen_threads",
    "entry_files",
    "int8_dot_products",
    "loader",
    "open_artifact",
    "open_bundle",
    "refuse_failed",
]
