"""Two paths take each other's names in one step, where the system can."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_CURRENT_FOLDER = -100
_EXCHANGE = 2

# Of an old kernel or a sandbox; of a file system that has no such call, NFS for instance; between two file systems.
_UNABLE = (errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV)

_LIBRARY = ctypes.CDLL(None, use_errno=True)


def exchange(first: Path, second: Path) -> bool:
    """Whether `first` and `second`, which both exist, have taken each other's names (Linux: renameat2).

    Returns:
        False where the system or the file system cannot do it in one step; then both are as they were.

    Raises:
        OSError: it can, and refuses.
    """
    rename = getattr(_LIBRARY, "renameat2", None)
    if rename is None:
        return False
    names = [os.fsencode(path) for path in (first, second)]
    if rename(_CURRENT_FOLDER, names[0], _CURRENT_FOLDER, names[1], ctypes.c_uint(_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNABLE:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))
