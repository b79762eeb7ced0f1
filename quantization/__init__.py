"""Low precision: the quantization scheme of each target, calibration, rewriting of graphs.

Nothing here imports torch. `policy` is the table of schemes, `calibration` computes int8 scales on rollouts, `rewrite`
makes the graphs.
"""

from typing import TYPE_CHECKING

from nsm.lazy import lazy_names

if TYPE_CHECKING:
    from nsm.quantization.calibration import Range as Range
    from nsm.quantization.calibration import Watched as Watched
    from nsm.quantization.calibration import calibrate as calibrate
    from nsm.quantization.calibration import levels_of as levels_of
    from nsm.quantization.calibration import rollouts as rollouts
    from nsm.quantization.calibration_data import Calibration as Calibration
    from nsm.quantization.calibration_data import read_calibration as read_calibration
    from nsm.quantization.linear_ops import LinearOp as LinearOp
    from nsm.quantization.linear_ops import largest_weights as largest_weights
    from nsm.quantization.linear_ops import linear_ops_of as linear_ops_of
    from nsm.quantization.policy import Policy as Policy
    from nsm.quantization.policy import find_policy as find_policy
    from nsm.quantization.preconditions import check_enough as check_enough
    from nsm.quantization.preconditions import check_recurrent as check_recurrent
    from nsm.quantization.preconditions import check_trace as check_trace
    from nsm.quantization.rewrite import blocked as blocked
    from nsm.quantization.rewrite import dynamic as dynamic
    from nsm.quantization.rewrite import half as half
    from nsm.quantization.rewrite import looked_up as looked_up
    from nsm.quantization.rewrite import static as static
    from nsm.quantization.rewrite import weights_only as weights_only
    from nsm.quantization.unroll_rnn import unroll as unroll
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "calibration": ("Range", "Watched", "calibrate", "levels_of", "rollouts"),
            "calibration_data": ("Calibration", "read_calibration"),
            "linear_ops": ("LinearOp", "largest_weights", "linear_ops_of"),
            "policy": ("Policy", "find_policy"),
            "preconditions": ("check_enough", "check_recurrent", "check_trace"),
            "rewrite": ("blocked", "dynamic", "half", "looked_up", "static", "weights_only"),
            "unroll_rnn": ("unroll",),
        },
    )
