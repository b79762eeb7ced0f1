"""Measurements of sessions: latency in rounds, the overhead of a session, peak memory."""

from typing import TYPE_CHECKING

from nsm.lazy import lazy_names

if TYPE_CHECKING:
    from nsm.runtimes.bench.peak_memory import fresh_peak_mb as fresh_peak_mb
    from nsm.runtimes.bench.rounds import ROUNDS as ROUNDS
    from nsm.runtimes.bench.rounds import Calls as Calls
    from nsm.runtimes.bench.rounds import Latency as Latency
    from nsm.runtimes.bench.rounds import Steppable as Steppable
    from nsm.runtimes.bench.rounds import bench as bench
    from nsm.runtimes.bench.rounds import check_steps as check_steps
    from nsm.runtimes.bench.rounds import not_faster as not_faster
    from nsm.runtimes.bench.rounds import paired_ratio as paired_ratio
    from nsm.runtimes.bench.session_overhead import CALLS as CALLS
    from nsm.runtimes.bench.session_overhead import OVERHEAD_ROUNDS as OVERHEAD_ROUNDS
    from nsm.runtimes.bench.session_overhead import overhead as overhead
    from nsm.runtimes.bench.timing import median_interval as median_interval
    from nsm.runtimes.bench.timing import times_us as times_us
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "peak_memory": ("fresh_peak_mb",),
            "rounds": (
                "Calls",
                "Latency",
                "ROUNDS",
                "Steppable",
                "bench",
                "check_steps",
                "not_faster",
                "paired_ratio",
            ),
            "session_overhead": ("CALLS", "OVERHEAD_ROUNDS", "overhead"),
            "timing": ("median_interval", "times_us"),
        },
    )
