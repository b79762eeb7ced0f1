"""What a calibration found, as data that a bundle keeps: with it, int8 can be built where torch is not."""

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
class Calibration:
    """What was seen.

    scales: of each product's activations, by the product's key: what 1 of an int8 stands for.
    streams, calls: sequences that were rolled, and calls that were looked at.
    ages: of the calls, in calls since the reset.
    occupancy: least and largest share of active slots in the calls, None for models without masks.
    """

    scales: Mapping[str, float]
    streams: int
    calls: int
    ages: tuple[int, ...]
    occupancy: tuple[float, float] | None

    def __post_init__(self) -> None:
        for key, scale in self.scales.items():
            if not (math.isfinite(scale) and scale > 0):
                raise ConfigError(f"A scale is a number above 0; that of {key} is {scale}.")

    def save(self, directory: Path) -> None:
        """Write it into the directory of a bundle."""
        write_json(directory / CALIBRATION, asdict(self))

    def summary(self) -> dict[str, Any]:
        """Without the scales."""
        data = asdict(self)
        del data["scales"]
        return data


def read_calibration(bundle: Bundle) -> Calibration:
    """The calibration that a bundle holds. Verified.

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
    return decode(Calibration, data, CALIBRATION)
