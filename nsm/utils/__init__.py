"""Tools for development: memory and time of a model, and pictures of its slots.

The import needs neither torch nor matplotlib; each is imported on first use.
"""

from nsm.utils.monitor import PerformanceMonitor
from nsm.utils.visualizer import AdvancedNSMVisualizer

__all__ = [
    "AdvancedNSMVisualizer",
    "PerformanceMonitor",
]
