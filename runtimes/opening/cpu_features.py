"""Features of the processor that artifacts depend on."""

from __future__ import annotations

from pathlib import Path

from nsm.errors import DeviceUnavailableError

CPU_DOT = "cpu-dot"
"""The device of artifacts in int8 that need `int8_dot_products`; those for "cpu" are right on every processor."""

_CPUINFO = Path("/proc/cpuinfo")
_DOT = {"avx512_vnni", "avx_vnni", "avx512vnni", "asimddp"}


def int8_dot_products() -> bool | None:
    """Whether the processor adds up products of int8 in 32 bits: VNNI on x86, dotprod on Arm. None if it is not known.

    Without it, pairs are added in 16 bits, which saturates; see `nsm.quantization.policy`.
    """
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return None
    found = next((line for line in lines if line.lower().startswith(("flags", "features"))), None)
    return None if found is None else not _DOT.isdisjoint(found.lower().split())


def require_device(device: str, precision: str) -> None:
    """Refuse an artifact that this processor would compute incorrectly.

    Raises:
        DeviceUnavailableError: int8 for another kind of processor.
    """
    if device == CPU_DOT and precision == "int8" and int8_dot_products() is False:
        raise DeviceUnavailableError(
            "This artifact in int8 was built for processors with VNNI (or dotprod on Arm), with --device cpu-dot. The "
            "one in this machine has none: its sums of products would be cut off. Build it here for any processor: "
            "nsm build BUNDLE --target TARGET --precision int8 --force"
        )
