"""Several linear maps of one input as one MatMul."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FusedLinear(nn.Module):
    """x [..., d] times several matrices [n_i, d] in one MatMul: [..., sum of n_i].

    It has no parameters. It is a module so that its MatMul has a name in an exported graph.
    """

    def forward(self, x: Tensor, *weights: Tensor) -> Tensor:
        return x @ torch.cat(weights).t()
