"""The presets: named sizes of the family, chosen by measured quality and time (docs/measurements.md)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from nsm.errors import ConfigError
from nsm.models.hybrid import HybridModel
from nsm.models.simple import SimpleNSM
from nsm.models.stream import StreamModel

VOCABULARY = 10_000
"""The vocabulary at which the presets have their stated parameter counts."""

_COMMON: Mapping[str, Any] = MappingProxyType({"num_heads": 8, "routing_heads": 4, "gate_type": "mingru"})

# Name -> class, its arguments, and the parameters (in millions) it has with a vocabulary of 10,000.
PRESETS: Mapping[str, tuple[type[SimpleNSM] | type[HybridModel], Mapping[str, Any], float]] = MappingProxyType(
    {
        "NSM-32": (
            SimpleNSM,
            {
                **_COMMON,
                "d_model": 320,
                "state_dim": 320,
                "num_states": 32,
                "num_layers": 4,
                "feed_forward": 3.5,
            },
            12,
        ),
        "NSM-64": (SimpleNSM, {**_COMMON, "d_model": 448, "state_dim": 448, "num_states": 64, "num_layers": 5}, 24),
        "NSM-128": (
            SimpleNSM,
            {
                **_COMMON,
                "d_model": 640,
                "state_dim": 640,
                "num_states": 128,
                "num_layers": 6,
                "feed_forward": 3.5,
            },
            48,
        ),
        "Hybrid": (
            HybridModel,
            {
                **_COMMON,
                "d_model": 512,
                "num_states": 64,
                "num_attention_layers": 2,
                "num_nsm_layers": 4,
                "feed_forward": 4.5,
            },
            37,
        ),
    }
)


def from_preset(name: str, vocab_size: int = VOCABULARY, **changes: Any) -> StreamModel:
    """A new model of a preset: NSM-32 (12 million parameters), NSM-64 (24), NSM-128 (48) or Hybrid (37).

    Args:
        name: of the preset.
        vocab_size: V.
        changes: arguments of the model's class that differ from the preset's.

    Raises:
        ConfigError: there is no such preset, or the changes do not fit.
    """
    if name not in PRESETS:
        raise ConfigError(f"There is no preset {name!r}. Presets: {', '.join(PRESETS)}.")
    kind, arguments, _ = PRESETS[name]
    return kind(**{"vocab_size": vocab_size, **arguments, **changes})
