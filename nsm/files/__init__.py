"""Files: written whole or not at all, read within limits."""

from nsm.files.atomic_exchange import exchange
from nsm.files.partials import abandoned, locked, partial, replaced_name
from nsm.files.reading import (
    LIMITS,
    check_npy,
    check_regular,
    open_regular,
    open_zip,
    read_npy,
    read_regular,
    regular_size,
)
from nsm.files.writing import (
    check_declared,
    check_output_file,
    check_stored,
    followed,
    json_bytes,
    json_with,
    new_mode,
    replacing,
    settled,
    sha256,
    write_json,
)

__all__ = [
    "LIMITS",
    "abandoned",
    "check_declared",
    "check_npy",
    "check_output_file",
    "check_regular",
    "check_stored",
    "exchange",
    "followed",
    "json_bytes",
    "json_with",
    "locked",
    "new_mode",
    "open_regular",
    "open_zip",
    "partial",
    "read_npy",
    "read_regular",
    "regular_size",
    "replaced_name",
    "replacing",
    "settled",
    "sha256",
    "write_json",
]
