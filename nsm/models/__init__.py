"""Models of the family, and their checkpoints."""

from nsm.models.adaptive import AdaptiveNSM
from nsm.models.checkpoint import Checkpoint, fingerprint, load, load_checkpoint, save
from nsm.models.hybrid import HybridModel
from nsm.models.presets import PRESETS, from_preset
from nsm.models.simple import SimpleNSM
from nsm.models.step import StepModel
from nsm.models.stream import StreamModel

__all__ = [
    "PRESETS",
    "AdaptiveNSM",
    "Checkpoint",
    "HybridModel",
    "SimpleNSM",
    "StepModel",
    "StreamModel",
    "fingerprint",
    "from_preset",
    "load",
    "load_checkpoint",
    "save",
]
