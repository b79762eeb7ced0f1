"""What the Neural State Machine is compared with: the usual sequence models as step models, each in its strong form."""

from nsm.baselines.mamba import MambaLM
from nsm.baselines.recurrent import RecurrentLM
from nsm.baselines.rwkv import RWKVLM
from nsm.baselines.transformer import TransformerLM

__all__ = ["RWKVLM", "MambaLM", "RecurrentLM", "TransformerLM"]
