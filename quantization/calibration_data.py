"""Calibration results as data in a bundle, so that int8 can be built without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nsm.bundle import CALIBRATION, Bundle
from nsm.decode import decode
from nsm.errors import ConfigError, InputError
from nsm.files import write_json


@dataclass(frozen=True)
class Asymmetric:
    """Asymmetric uint8: a level q means scale * (q - zero), so all 256 levels cover the activation's range."""

    scale: float
    zero: int

    def __post_init__(self) -> None:
        _require_scale(self.scale, "a uint8")
        if not 0 <= self.zero <= 255:
            raise ConfigError(f"The zero point of a uint8 must lie in 0 .. 255; given {self.zero}.")


@dataclass(frozen=True)
class Calibration:
    """Results of a calibration.

    scales: int8 scale of the activations of each linear op, by its key.
    asymmetric: for activations that are hardly ever negative, and lose less that way: scale and zero point of an
        asymmetric uint8, for backends with zero points.
    streams, calls: sequences that were rolled, and calls that were looked at.
    ages: of the calls, in calls since the reset.
    occupancy: least and largest share of active slots in the calls, None for models without masks.
    """

    scales: Mapping[str, float]
    asymmetric: Mapping[str, Asymmetric]
    streams: int
    calls: int
    ages: tuple[int, ...]
    occupancy: tuple[float, float] | None

    def __post_init__(self) -> None:
        for key, scale in self.scales.items():
            _require_scale(scale, key)

    def save(self, directory: Path) -> None:
        """Write it into the directory of a bundle."""
        write_json(directory / CALIBRATION, asdict(self))

    def summary(self) -> dict[str, Any]:
        """Without the scales."""
        data = asdict(self)
        del data["scales"], data["asymmetric"]
        return data


def _require_scale(scale: float, owner: str) -> None:
    if not (math.isfinite(scale) and scale > 0):
        raise ConfigError(f"A scale is a number above 0; that of {owner} is {scale}.")


def read_calibration(bundle: Bundle) -> Calibration:
    """Return the verified calibration of a bundle.

    Raises:
        InputError: it holds none.
        BundleError: it is damaged.
    """
    data = bundle.json(CALIBRATION)
    if data is None:
        raise InputError(
            f"{bundle.path} holds no calibration, which int8 needs. Export it with --precision int8 where torch is, or "
            "build int8-weights, which needs none."
        )
    if isinstance(data, dict):
        data = {"asymmetric": {}} | data  # absent in older bundles
    return decode(Calibration, data, CALIBRATION)
