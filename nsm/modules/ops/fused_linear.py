"""One product in place of several."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class JoinedProduct(nn.Module):
    """x [..., d] times several matrices [n_i, d] at once: [..., sum of n_i].

    It has no weights of its own. Being a module, it has a place in the model, by which the product can be found in an
    exported graph.
    """

    def forward(self, x: Tensor, *weights: Tensor) -> Tensor:
        return x @ torch.cat(weights).t()
