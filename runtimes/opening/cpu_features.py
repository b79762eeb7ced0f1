"""Processor features that artifacts depend on."""

from __future__ import annotations

from pathlib import Path

from nsm.errors import DeviceUnavailableError

CPU_DOT = "cpu-dot"
"""Device of int8 artifacts that need `int8_dot_products`; artifacts for "cpu" are correct on every processor."""

_CPUINFO = Path("/proc/cpuinfo")
_DOT = {"avx512_vnni", "avx_vnni", "avx512vnni", "asimddp"}


def int8_dot_products() -> bool | None:
    """Return whether the processor accumulates int8 products in 32 bits; None if unknown.

    The feature is VNNI on x86 and dotprod on Arm. Without it, the processor adds pairs in 16 bits, which saturates; see
    `nsm.quantization.policy`.
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
        DeviceUnavailableError: the artifact needs int8 features that this processor lacks.
    """
    if device == CPU_DOT and precision == "int8" and int8_dot_products() is False:
        raise DeviceUnavailableError(
            "This int8 artifact was built with --device cpu-dot, for processors with VNNI (or dotprod on Arm). The "
            "processor of this machine has neither, so its sums would saturate. Build it for any processor: "
            "nsm build BUNDLE --target TARGET --precision int8 --force"
        )
