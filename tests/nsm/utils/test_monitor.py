from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch

from nsm.errors import InputError, UnsupportedError
from nsm.models.simple import SimpleNSM
from nsm.utils import PerformanceMonitor
from nsm.utils.live_bytes import LiveBytes, counting

MB = 250_000  # float32 numbers in a megabyte


def peak(work: Callable[[], object]) -> int:
    counts = LiveBytes()
    with counting(counts):
        work()
    return counts.peak


def test_the_peak_is_what_was_live_at_once() -> None:
    def work() -> None:
        first = torch.empty(4 * MB)
        second = torch.empty(8 * MB)
        del first
        third = torch.empty(2 * MB)
        del second, third
        torch.empty(11 * MB)

    assert peak(work) == 12_000_000


def test_a_view_costs_nothing_and_keeps_its_storage() -> None:
    def work() -> None:
        tensor = torch.empty(4 * MB)
        view = tensor[5:].view(-1)
        del tensor
        torch.empty(2 * MB)
        del view

    assert peak(work) == 6_000_000


def test_what_was_there_before_does_not_count_but_what_it_grows_by_does() -> None:
    old = torch.zeros(4 * MB)

    def work() -> None:
        old.add_(1.0)
        old[7:].neg_()

    assert peak(work) == 0
    assert peak(lambda: old.resize_(6 * MB)) == 2_000_000


def test_giving_up_what_was_there_before_makes_no_room() -> None:
    held = [torch.zeros(4 * MB)]

    def work() -> None:
        held[0].add_(1.0)
        held.clear()
        torch.empty(MB)

    assert peak(work) == 1_000_000


def test_a_block_that_shrinks_gives_back_no_more_than_counted() -> None:
    counts = LiveBytes()
    counts.found(1, 100)
    counts.made(1, 150)
    counts.made(1, 20)
    assert (counts.now, counts.peak) == (0, 50)
    counts.freed(1)
    assert counts.now == 0
    assert 1 not in counts


def test_what_the_gradient_needs_stays_live() -> None:
    def work() -> None:
        x = torch.zeros(MB, requires_grad=True)
        y = x.exp()
        total = y.sum()
        del y  # autograd keeps it
        torch.empty(MB)
        del total

    assert peak(work) == 3_000_000 + 4


def test_a_tensor_made_from_numbers_counts() -> None:
    assert peak(lambda: torch.tensor([0.0] * 1000)) == 4000


def test_a_sparse_tensor_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"Only dense tensors can be counted.*sparse_coo"):
        peak(lambda: torch.eye(3).to_sparse())


def test_the_monitor_as_documented(model: SimpleNSM) -> None:
    ids = torch.randint(0, 20, (2, 64))
    monitor = PerformanceMonitor()
    with monitor.memory_context():
        output = model(ids)
    stats = monitor.get_stats()
    assert stats["memory"]["peak_allocated_mb"] >= output.numel() * 4 / 1e6
    assert stats["memory"]["contexts"] == 1
    assert stats["memory"]["peak_rss_mb"] > 10
    assert stats["memory"]["wall_time_s"] > 0
    assert json.loads(json.dumps(stats)) == stats


def test_the_largest_of_several_contexts_is_told() -> None:
    monitor = PerformanceMonitor()
    assert monitor.get_stats()["memory"]["peak_allocated_mb"] is None
    for size in (1, 3, 2):
        with monitor.memory_context():
            torch.empty(size * MB)
    memory = monitor.get_stats()["memory"]
    assert (memory["contexts"], memory["peak_allocated_mb"], memory["by_device_mb"]["cpu"]) == (3, 3.0, 3.0)
    monitor.reset()
    assert monitor.get_stats()["memory"]["contexts"] == 0


def test_latency_and_throughput() -> None:
    monitor = PerformanceMonitor()
    for index in range(10):
        with monitor.time_context("sleep", items=5):
            time.sleep(0.03 if index == 9 else 0.001)
    timing = monitor.get_stats()["timing"]["sleep"]
    assert (timing["count"], timing["items"]) == (10, 50)
    assert 1.0 <= timing["p50_ms"] < timing["p99_ms"] <= timing["max_ms"]
    assert timing["p99_ms"] > 20
    assert timing["total_s"] >= 0.039
    assert timing["items_per_s"] == pytest.approx(50 / timing["total_s"])
    assert timing["mean_ms"] == pytest.approx(100 * timing["total_s"])
    json.dumps(monitor.get_stats())


def test_times_of_different_names_may_contain_each_other() -> None:
    monitor = PerformanceMonitor()
    with monitor.time_context("outer"), monitor.time_context("inner"):
        pass
    timing = monitor.get_stats()["timing"]
    assert timing["outer"]["total_s"] >= timing["inner"]["total_s"]
    assert timing["inner"]["items_per_s"] is None


def test_work_that_raises_is_not_counted() -> None:
    monitor = PerformanceMonitor()
    with pytest.raises(ZeroDivisionError), monitor.time_context("work"):
        _ = 1 / 0
    with pytest.raises(ZeroDivisionError), monitor.memory_context():
        _ = 1 / 0
    assert monitor.get_stats()["timing"] == {}
    assert monitor.get_stats()["memory"]["contexts"] == 0
    with monitor.memory_context():
        torch.empty(MB)
    assert monitor.get_stats()["memory"]["peak_allocated_mb"] == 1.0


def test_contexts_that_would_disturb_each_other_are_refused() -> None:
    monitor = PerformanceMonitor()
    with monitor.memory_context():
        with pytest.raises(InputError, match="memory_context was entered inside memory_context"):
            monitor.memory_context().__enter__()
        with pytest.raises(InputError, match=r"time_context\('a'\) was entered inside memory_context"):
            monitor.time_context("a").__enter__()
        with pytest.raises(InputError, match="reset was called inside memory_context"):
            monitor.reset()
    with monitor.time_context("a"):
        with pytest.raises(InputError, match=r"time_context\('a'\) was entered inside itself"):
            monitor.time_context("a").__enter__()
        with pytest.raises(InputError, match=r"memory_context was entered inside time_context\('a'\)"):
            monitor.memory_context().__enter__()
    with pytest.raises(InputError, match=r"items is how many.*given -1"):
        monitor.time_context("a", items=-1).__enter__()


def test_without_torch_time_is_measured_and_memory_names_the_extra() -> None:
    code = """
import sys
sys.modules["torch"] = None
from nsm.errors import MissingDependencyError
from nsm.utils import PerformanceMonitor
monitor = PerformanceMonitor()
with monitor.time_context("work"):
    pass
print(monitor.get_stats()["timing"]["work"]["count"])
try:
    monitor.memory_context().__enter__()
except MissingDependencyError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    count, message = done.stdout.splitlines()
    assert count == "1"
    assert 'torch is not installed. Install it with: pip install "nsm-toolkit[torch]"' in message


@pytest.mark.gpu
def test_on_a_gpu_the_allocator_tells() -> None:
    held = torch.zeros(4 * MB, device="cuda")
    monitor = PerformanceMonitor()
    with monitor.memory_context():
        torch.zeros(8 * MB, device="cuda")
    memory = monitor.get_stats()["memory"]
    assert memory["peak_allocated_mb"] == memory["by_device_mb"]["cuda:0"] == pytest.approx(8.0, rel=0.1)
    assert held.numel() == 4 * MB
