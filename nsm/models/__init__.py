"""Models of the family, and their checkpoints."""

from nsm.models.checkpoint import Checkpoint, fingerprint, load, load_checkpoint, save
from nsm.models.simple import SimpleNSM
from nsm.models.stream import StreamModel

__all__ = ["Checkpoint", "SimpleNSM", "StreamModel", "fingerprint", "load", "load_checkpoint", "save"]
