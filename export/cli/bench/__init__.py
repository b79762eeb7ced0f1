"""`nsm bench` and `nsm roofline`: measure a bundle, all targets of a model, or a session's overhead."""

from typing import TYPE_CHECKING

from nsm.lazy import lazy_names

if TYPE_CHECKING:
    from nsm.export.cli.bench.bundle import bench_bundle as bench_bundle
    from nsm.export.cli.bench.bundle import lane_tokens as lane_tokens
    from nsm.export.cli.bench.bundle import speed as speed
    from nsm.export.cli.bench.everything import bench_all as bench_all
    from nsm.export.cli.bench.overhead import measure_overhead as measure_overhead
    from nsm.export.cli.bench.roofline_command import roofline as roofline
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "bundle": ("bench_bundle", "lane_tokens", "speed"),
            "everything": ("bench_all",),
            "overhead": ("measure_overhead",),
            "roofline_command": ("roofline",),
        },
    )
