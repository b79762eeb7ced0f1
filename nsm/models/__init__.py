"""The models of the family, their base class, configuration, presets and checkpoints."""

from nsm.models.adaptive import AdaptiveNSM
from nsm.models.base import State, StepModel, check_float32, devices, duplicate, on_cpu
from nsm.models.checkpoint import (
    Checkpoint,
    check_records,
    fingerprint,
    load,
    load_checkpoint,
    load_plain,
    save,
    split_samples,
)
from nsm.models.compaction import compact, nsm_layers
from nsm.models.config import checked_sizes, embedding, output_head
from nsm.models.hybrid import HybridModel
from nsm.models.presets import PRESETS, from_preset
from nsm.models.simple import SimpleNSM
from nsm.models.stream import StreamModel

__all__ = [
    "PRESETS",
    "AdaptiveNSM",
    "Checkpoint",
    "HybridModel",
    "SimpleNSM",
    "State",
    "StepModel",
    "StreamModel",
    "check_float32",
    "check_records",
    "checked_sizes",
    "compact",
    "devices",
    "duplicate",
    "embedding",
    "fingerprint",
    "from_preset",
    "load",
    "load_checkpoint",
    "load_plain",
    "nsm_layers",
    "on_cpu",
    "output_head",
    "save",
    "split_samples",
]
