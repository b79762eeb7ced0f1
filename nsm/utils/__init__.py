"""What helps to look at a model while it is worked on: how much it takes, and what it does with its slots.

Importing this needs neither torch nor matplotlib; each is imported by what uses it.
"""

from nsm.utils.monitor import PerformanceMonitor
from nsm.utils.visualizer import AdvancedNSMVisualizer

__all__ = [
    "AdvancedNSMVisualizer",
    "PerformanceMonitor",
]
