"""The trace of a model's run, with its routing."""

from __future__ import annotations
