"""Verification: golden traces, comparison of artifacts with them, acceptance of low precision."""

from typing import TYPE_CHECKING

from nsm.lazy import lazy_names

if TYPE_CHECKING:
    from nsm.export.verify.acceptance import DRIFT_STEPS as DRIFT_STEPS
    from nsm.export.verify.acceptance import Limits as Limits
    from nsm.export.verify.acceptance import Maker as Maker
    from nsm.export.verify.acceptance import build_checked as build_checked
    from nsm.export.verify.acceptance import judged_briefly as judged_briefly
    from nsm.export.verify.another_target import add_target as add_target
    from nsm.export.verify.artifact import PRECISIONS as PRECISIONS
    from nsm.export.verify.artifact import Acceptance as Acceptance
    from nsm.export.verify.artifact import TargetPlan as TargetPlan
    from nsm.export.verify.artifact import build_target as build_target
    from nsm.export.verify.artifact import check_artifact as check_artifact
    from nsm.export.verify.artifact import check_precision as check_precision
    from nsm.export.verify.artifact import plan_targets as plan_targets
    from nsm.export.verify.artifact import try_artifact as try_artifact
    from nsm.export.verify.capacity import Reach as Reach
    from nsm.export.verify.capacity import find_reach as find_reach
    from nsm.export.verify.capacity import may_count as may_count
    from nsm.export.verify.capacity import with_limit as with_limit
    from nsm.export.verify.golden import checked_sequences as checked_sequences
    from nsm.export.verify.golden import record as record
    from nsm.export.verify.golden import synthetic as synthetic
    from nsm.export.verify.keeping import Outcome as Outcome
    from nsm.export.verify.keeping import settle as settle
    from nsm.export.verify.offline import compared_offline as compared_offline
    from nsm.export.verify.positions import check_positions as check_positions
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "acceptance": ("DRIFT_STEPS", "Limits", "Maker", "build_checked", "judged_briefly"),
            "another_target": ("add_target",),
            "artifact": (
                "PRECISIONS",
                "Acceptance",
                "TargetPlan",
                "build_target",
                "check_artifact",
                "check_precision",
                "plan_targets",
                "try_artifact",
            ),
            "capacity": ("Reach", "find_reach", "may_count", "with_limit"),
            "golden": ("checked_sequences", "record", "synthetic"),
            "keeping": ("Outcome", "settle"),
            "offline": ("compared_offline",),
            "positions": ("check_positions",),
        },
    )
