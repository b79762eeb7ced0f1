"""One examination of a foreign step, whichever way in it comes: `EXPERIMENTS` is the list, `examine` runs it.

A module, a .pt2 and an .onnx each stand behind the small protocol `Step`, over numpy arrays. Nothing here needs torch.
"""

from nsm.adapters.validate.examine import EXPERIMENTS, Examination, examine, summary
from nsm.adapters.validate.splits import OFFLINE_TOLERANCE, check_offline
from nsm.adapters.validate.step import Advice, Keeps, Results, Step
from nsm.adapters.validate.subject import close

__all__ = [
    "EXPERIMENTS",
    "OFFLINE_TOLERANCE",
    "Advice",
    "Examination",
    "Keeps",
    "Results",
    "Step",
    "check_offline",
    "close",
    "examine",
    "summary",
]
