"""One examination of a foreign step, whichever way in it comes: `EXPERIMENTS` is the list, `examine` runs it.

A module, a .pt2 and an .onnx each stand behind the small protocol `Step`, over numpy arrays. Nothing here needs torch.
"""

from nsm.adapters.validate.examine import EXPERIMENTS as EXPERIMENTS
from nsm.adapters.validate.examine import Examination as Examination
from nsm.adapters.validate.examine import examine as examine
from nsm.adapters.validate.examine import summary as summary
from nsm.adapters.validate.splits import check_offline as check_offline
from nsm.adapters.validate.step import Advice as Advice
from nsm.adapters.validate.step import Keeps as Keeps
from nsm.adapters.validate.step import Step as Step

__all__ = ["EXPERIMENTS", "Advice", "Examination", "Keeps", "Step", "check_offline", "examine", "summary"]
