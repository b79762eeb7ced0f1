"""PerformanceMonitor: peak memory of a piece of work, and latency and throughput of repeated ones."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nsm.errors import InputError, MissingDependencyError
from nsm.utils.live_bytes import LiveBytes, counting


@dataclass
class _Memory:
    """Of all memory contexts so far. MB are 10^6 bytes."""

    contexts: int = 0
    wall_time_s: float = 0.0
    rss_growth_mb: float = 0.0
    peaks_mb: dict[str, float] = field(default_factory=dict)

    def add(self, seconds: float, growth: float, peaks: dict[str, float]) -> None:
        self.contexts += 1
        self.wall_time_s += seconds
        self.rss_growth_mb += growth
        for device, peak in peaks.items():
            self.peaks_mb[device] = max(peak, self.peaks_mb.get(device, 0.0))


@dataclass
class _Timing:
    """Of all time contexts of one name so far."""

    seconds: list[float] = field(default_factory=list)
    items: int = 0


class PerformanceMonitor:
    """Measures the work inside its contexts; `get_stats` returns the results.

        monitor = PerformanceMonitor()
        with monitor.memory_context():
            output = model(ids)
        monitor.get_stats()["memory"]["peak_allocated_mb"]

        for ids in batches:
            with monitor.time_context("forward", items=ids.numel()):
                output = model(ids)
        monitor.get_stats()["timing"]["forward"]["p99_ms"]

    Work that raises is not counted. Counting memory slows operators down, so latency is measured apart from it.
    """

    def __init__(self) -> None:
        self._open: list[str] = []
        self._memory = _Memory()
        self._timing: dict[str, _Timing] = {}

    def reset(self) -> None:
        """Forget everything measured so far.

        Raises:
            InputError: inside a context.
        """
        if self._open:
            raise InputError(f"reset was called inside {self._open[-1]}. Leave the context first.")
        self._memory = _Memory()
        self._timing = {}

    @contextmanager
    def memory_context(self) -> Iterator[None]:
        """Measure the peak of memory allocated to tensors, minus the memory allocated at the start.

        On the CPU it is counted storage by storage (see `nsm.utils.live_bytes.counting`); on CUDA devices it is
        `torch.cuda.max_memory_allocated` (its peak is reset) minus the memory allocated before.

        Raises:
            InputError: inside another context of this monitor.
            MissingDependencyError: torch is not installed.
        """
        if self._open:
            raise InputError(
                f"memory_context was entered inside {self._open[-1]}, and neither would measure its own work alone. "
                "Measure one after the other."
            )
        try:
            import torch
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                "memory_context counts torch's tensors, and torch is not installed. "
                'Install it with: pip install "nsm-toolkit[torch]"'
            ) from error
        held = {}
        if torch.cuda.is_initialized():
            for index in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(index)
                held[index] = torch.cuda.memory_allocated(index)
        counts, rss = LiveBytes(), _peak_rss_mb()
        with self._inside("memory_context"), counting(counts):
            begin = _now()
            yield
            seconds = _now() - begin
        peaks = {"cpu": counts.peak / 1e6}
        if torch.cuda.is_initialized():
            for index in range(torch.cuda.device_count()):
                peak = torch.cuda.max_memory_allocated(index) - held.get(index, 0)
                peaks[f"cuda:{index}"] = peak / 1e6
        self._memory.add(seconds, _peak_rss_mb() - rss, peaks)

    @contextmanager
    def time_context(self, name: str = "default", items: int = 0) -> Iterator[None]:
        """Measure how long the work takes, and with `items` how many of them (tokens, say) a second.

        CUDA devices are waited for before and after. Contexts of different names may contain each other.

        Raises:
            InputError: inside a context of the same name, or inside memory_context; or `items` < 0.
        """
        if items < 0:
            raise InputError(f"items is how many things the work goes through, 0 or more; given {items}.")
        here = f"time_context({name!r})"
        if here in self._open:
            raise InputError(f"{here} was entered inside itself. Give the inner one another name.")
        if "memory_context" in self._open:
            raise InputError(
                f"{here} was entered inside memory_context, where counting memory takes time of its own. "
                "Measure one after the other."
            )
        with self._inside(here):
            begin = _now()
            yield
            seconds = _now() - begin
        timing = self._timing.setdefault(name, _Timing())
        timing.seconds.append(seconds)
        timing.items += items

    def get_stats(self) -> dict[str, Any]:
        """Results since the start or the last `reset`, as plain values for JSON.

        Returns:
            memory: `contexts`, how many; `peak_allocated_mb`, the largest peak of all contexts, on the device where it
                was largest (None before the first); `by_device_mb`, the largest of each; `wall_time_s` spent in them,
                counting included; `peak_rss_mb`, the most memory this process ever had resident, and
                `rss_growth_mb`, how much of it came up inside the contexts. MB are 10^6 bytes.
            timing: by name, `count`, `total_s`, `mean_ms`, `p50_ms`, `p99_ms`, `max_ms`; `items` and `items_per_s`
                (None where no items were told).
        """
        memory = self._memory
        return {
            "memory": {
                "contexts": memory.contexts,
                "peak_allocated_mb": max(memory.peaks_mb.values(), default=None),
                "by_device_mb": dict(memory.peaks_mb),
                "wall_time_s": memory.wall_time_s,
                "peak_rss_mb": _peak_rss_mb(),
                "rss_growth_mb": memory.rss_growth_mb,
            },
            "timing": {name: _summary(timing) for name, timing in self._timing.items()},
        }

    @contextmanager
    def _inside(self, name: str) -> Iterator[None]:
        self._open.append(name)
        try:
            yield
        finally:
            self._open.remove(name)


def _summary(timing: _Timing) -> dict[str, Any]:
    milliseconds = 1e3 * np.asarray(timing.seconds)
    total = sum(timing.seconds)
    return {
        "count": len(timing.seconds),
        "total_s": total,
        "mean_ms": float(milliseconds.mean()),
        "p50_ms": float(np.percentile(milliseconds, 50)),
        "p99_ms": float(np.percentile(milliseconds, 99)),
        "max_ms": float(milliseconds.max()),
        "items": timing.items,
        "items_per_s": timing.items / total if timing.items else None,
    }


def _now() -> float:
    """Seconds, after all CUDA devices have finished their work."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)
    return time.perf_counter()


def _peak_rss_mb() -> float:
    # Linux tells kibibytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
