"""Sampling the next token, and scoring long sequences, with a session."""

from nsm.runtimes.generate.sampling import Sampler
from nsm.runtimes.generate.scoring import digest, score

__all__ = [
    "Sampler",
    "digest",
    "score",
]
